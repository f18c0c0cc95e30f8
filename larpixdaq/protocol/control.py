"""The messages of the control plane: typed, versioned, checked on arrival, limited in size and depth.

A message is a msgpack map with the field `type`, in one ZeroMQ frame; a large answer of a component to the core is cut
into several. `value`, `params`, `info` and `status` may contain numpy arrays without objects, as msgpack extension 1
with description, shape and bytes; the core passes them on without unpacking. Nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import functools
import hashlib
import time
from typing import Annotated, Any, Final, Literal, NoReturn

import msgspec
from msgspec import Meta

from larpixdaq.constants import Name
from larpixdaq.errors import ProtocolError
from larpixdaq.keys import Key
from larpixdaq.protocol.stream import RunNumber

_ARRAY: Final = 1
#: Maximum bytes of an array's description, some 500 fields: numpy's time grows with the square of their number.
MAX_DESCRIPTION: Final = 8 << 10
_descr_decoder: Final = msgspec.msgpack.Decoder(str | list[Any])
PROTOCOL: Final = 1
#: Maximum bytes of a request.
MAX_REQUEST: Final = 1 << 20
#: Maximum bytes of a registration or heartbeat: 1 kB for each of 255 boards. The core keeps the last ones of every
#: component, and sends them all in one answer.
MAX_KEPT: Final = 256 << 10
#: Maximum bytes of an answer, whose result may contain arrays, and of one of its frames. libzmq decrypts a frame as a
#: whole, and everybody else waits meanwhile: 64 MiB take 0.1 s.
MAX_ANSWER: Final = 64 << 20
MAX_FRAME: Final = MAX_REQUEST
#: Maximum characters of an answer's text.
MAX_TEXT: Final = 1 << 16
#: Maximum depth of containers in containers.
MAX_DEPTH: Final = 32
Id = Annotated[str, Meta(max_length=64)]
_Level = Annotated[str, Meta(max_length=16)]
_Amount = Annotated[int, Meta(ge=0)]
Kind = Literal["producer", "run_data", "storage", "log", "supervisor"]


def encode_numpy(value: Any) -> Any:
    """Convert a numpy array or scalar to msgpack; ProtocolError for other values, and for arrays of objects."""
    import numpy as np  # here: the core and the log need no numpy
    from numpy.lib import format as npy

    if isinstance(value, np.generic) and not isinstance(value, np.void):
        return value.item()
    if isinstance(value, np.ndarray | np.void):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ProtocolError(f"an array of dtype {array.dtype} cannot be sent: it holds Python objects")
        descr = msgspec.Raw(msgspec.msgpack.encode(npy.dtype_to_descr(array.dtype)))
        if len(bytes(descr)) > MAX_DESCRIPTION:
            raise ProtocolError(
                f"an array cannot be sent: the description of its {len(array.dtype.names or ())} fields has "
                f"{len(bytes(descr))} bytes, the limit is {MAX_DESCRIPTION}"
            )
        head = [descr, list(array.shape), array.tobytes()]
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(head))
    raise ProtocolError(f"a value of type {type(value).__name__} cannot be sent")


class _Array(msgspec.Struct, array_like=True):
    descr: msgspec.Raw
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=32)]
    data: bytes


_array_decoder: Final = msgspec.msgpack.Decoder(_Array)


def _descr(entry: Any) -> Any:
    """Convert lists to the tuples that numpy expects around fields and shapes, because msgpack has lists only."""
    if isinstance(entry, list) and entry and all(isinstance(field, list) for field in entry):
        return [(_descr(field[0]), _descr(field[1]), *map(tuple, field[2:])) for field in entry]
    return tuple(_descr(part) for part in entry) if isinstance(entry, list) else entry


def decode_array(code: int, data: memoryview) -> Any:
    """Unpack an array; ProtocolError if the extension is no array."""
    import numpy as np
    from numpy.lib import format as npy

    if code != _ARRAY:
        raise ProtocolError(f"unknown msgpack extension {code}")
    try:
        head = _array_decoder.decode(data)
        if (size := len(bytes(head.descr))) > MAX_DESCRIPTION:
            raise ProtocolError(f"array: its description has {size} bytes, the limit is {MAX_DESCRIPTION}")
        dtype = npy.descr_to_dtype(_descr(_descr_decoder.decode(head.descr)))
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, IndexError, RecursionError, SyntaxError) as error:
        raise ProtocolError(f"array with an impossible description: {error}") from None
    if dtype.hasobject or not dtype.itemsize:
        raise ProtocolError(f"array of dtype {dtype}: it holds Python objects or nothing at all")
    count = 1
    for length in head.shape:
        count *= length
    if count * dtype.itemsize != len(head.data):
        raise ProtocolError(f"array of {count} x {dtype.itemsize} bytes: found {len(head.data)} bytes")
    try:
        return np.frombuffer(bytearray(head.data), dtype, count).reshape(head.shape)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"array of shape {head.shape}: {error}") from None


class Message(msgspec.Struct, tag_field="type", kw_only=True):
    """The fields of all messages. `principal` is reserved for the sender by its key; it is not used yet."""

    version: int = PROTOCOL
    request: Id = ""
    session: Id = ""
    principal: Id = ""


class Register(Message, tag="register"):
    """Registration of a component. `instance` is a random id of its process; `run` is the run that it is in, if any.

    `module`: the part of the detector that it works for, by which people see components together; "": none.
    """

    name: Name
    kind: Kind
    instance: Id
    actions: Annotated[list[Name], Meta(max_length=1000)] = []
    info: dict[str, Any] = {}
    run: RunNumber | None = None
    begun: bool = False
    module: Annotated[str, Meta(max_length=64)] = ""


class Open(Message, tag="open"):
    """Registration of an Operator; `instance` is a random id of the Operator.

    `pid`: id of its process if a supervisor starts that under this name, else 0.
    """

    name: Name
    instance: Id
    pid: _Amount = 0


class Heartbeat(Message, tag="heartbeat"):
    """`progress`: work done so far; `queued`: waiting work; `status`: None if it has not changed.

    `idle`: seconds since the main loop last reported its work, which it does several times a second. `run` and `begun`
    are as in Register, because the answer about a step may have gone to a core that has died since.

    The request id is the time of sending. The core's Update carries it back, so that the sender knows which of its
    heartbeats have reached the core.

    `server`: the newest public key of the core that is stored with an invitation's key. `log_level`: from which on log
    records are written.
    """

    progress: _Amount = 0
    queued: _Amount = 0
    idle: Annotated[float, Meta(ge=0)] = 0.0
    run: RunNumber | None = None
    begun: bool = False
    status: dict[str, Any] | None = None
    server: Annotated[str, Meta(max_length=40)] = ""
    log_level: _Level = ""

    def stamp(self) -> None:
        """Set the request id to the sender's monotonic time, in ns."""
        self.request = str(time.monotonic_ns())


class ActionRequest(Message, tag="request"):
    """Do `action`. From an Operator: to a component by name, to the first of a kind, or (neither) to the core.

    `again` marks a repeated request that was acknowledged before: only its answer is wanted.
    """

    action: Name
    params: dict[str, Any] = {}
    component: Annotated[str, Meta(max_length=64)] = ""
    kind: Annotated[str, Meta(max_length=64)] = ""
    again: bool = False


class Answer(Message, tag="answer"):
    """An answer to the request with this id; `result` or `error` is the last. content() unpacks `value`.

    A long text is cut, not refused, because without answer the sender of the request would wait for ever.
    """

    kind: Literal["ack", "progress", "result", "error"]
    component: Annotated[str, Meta(max_length=64)] = ""
    text: Annotated[str, Meta(max_length=MAX_TEXT)] = ""
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    done: _Amount = 0
    total: _Amount = 0
    error: Id = ""
    by: Annotated[str, Meta(max_length=256)] = ""
    since: float = 0.0

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            self.text = f"{self.text[: MAX_TEXT - 4]} ..."


class Endpoint(msgspec.Struct, array_like=True, frozen=True):
    """Where a component listens: ZeroMQ address, and the public key of its socket ("": without keys)."""

    address: Annotated[str, Meta(max_length=256)] = ""
    key: Annotated[str, Meta(max_length=40)] = ""


class ConsumerSession(msgspec.Struct, array_like=True, frozen=True):
    """By which a producer knows a consumer: its public key ("": without keys), and session_digest() of its session."""

    key: Annotated[str, Meta(max_length=40)]
    digest: Annotated[str, Meta(max_length=32)]


@functools.lru_cache(1024)
def session_digest(session: str) -> str:
    """Return a digest of a session by which it can be recognised, but not used."""
    return hashlib.sha256(session.encode()).hexdigest()[:32]


class Update(Message, tag="update"):
    """State of the core: the answer to each heartbeat, and a message to all peers after each change.

    `keys`: for components that listen themselves, the keys that may connect to them, with the component's name to
    which a key belongs, or "" for any. `consumers`: for producers, the registered consumers by name. `registered`: for
    supervisors, the process ids of all components, and of Operators with `pid`, by name. `next_server`: for peers with
    an invitation's key, the core's public key from its next start on, "" if it stays. `alarms`: for Operators, the
    number of alarms raised since the core's start, and the last of them as a line. `log_level`: for components, the
    level of log records that an Operator has asked for, "" for none.
    """

    state: Literal["STOP", "READY", "RUN"] = "STOP"
    run: _Amount | None = None
    producers: dict[str, Endpoint] = {}
    log: Endpoint = Endpoint()
    insecure: bool = False
    keys: Annotated[dict[Key, Annotated[str, Meta(max_length=64)]], Meta(max_length=2000)] = {}
    consumers: dict[str, ConsumerSession] = {}
    registered: dict[str, int] = {}
    next_server: Annotated[str, Meta(max_length=40)] = ""
    alarms: tuple[_Amount, Annotated[str, Meta(max_length=2000)]] = (0, "")
    log_level: _Level = ""

    @property
    def heartbeat_sent(self) -> float:
        """Sending time of the answered heartbeat, by time.monotonic() of its sender; 0 if there is none."""
        return int(self.request) / 1e9 if self.request.isdecimal() else 0.0


class Welcome(Update, tag="welcome"):
    """The answer to Register and Open; `session` is the new one."""


class Bye(Message, tag="bye"):
    pass


class Join(Message, tag="join"):
    """Use of an invitation, over a connection with its key: `public` is the new member's key from now on."""

    public: Key


FromClient = Register | Open | Heartbeat | ActionRequest | Answer | Bye | Join

FromCore = Welcome | Update | ActionRequest | Answer


class Probe(msgspec.Struct):
    """The fields of a malformed message that an answer to it needs."""

    version: int = PROTOCOL
    request: Id = ""
    type: str = ""


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=encode_numpy)

_client_decoder: Final = msgspec.msgpack.Decoder(FromClient)

_core_decoder: Final = msgspec.msgpack.Decoder(FromCore, ext_hook=decode_array)

_value_decoder: Final = msgspec.msgpack.Decoder(ext_hook=decode_array)

_probe_decoder: Final = msgspec.msgpack.Decoder(Probe)


def _encode(value: Any, what: str) -> bytes:
    try:
        return _encoder.encode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"{what} cannot be sent: {error}") from None


def _max_bytes(message: Message) -> int:
    """Maximum bytes of a message of this kind."""
    if isinstance(message, Answer):
        return MAX_ANSWER
    return MAX_KEPT if isinstance(message, Register | Heartbeat) else MAX_REQUEST


def pack(message: FromClient | FromCore) -> bytes:
    """Pack a message; ProtocolError if it contains an unsupported value or is too large."""
    what = str(message.__struct_config__.tag)
    data = _encode(message, what)
    limit = _max_bytes(message)
    if len(data) > limit:
        raise ProtocolError(f"{what} of {len(data)} bytes cannot be sent: the limit is {limit}")
    return data


def split(data: bytes) -> list[bytes]:
    """Cut a packed message to the core into frames."""
    return [data[at : at + MAX_FRAME] for at in range(0, len(data), MAX_FRAME)]


def packed(value: Any) -> msgspec.Raw:
    """Pack the value of an Answer; ProtocolError if its type is unsupported or it is too large."""
    data = _encode(value, "value")
    if len(data) > MAX_ANSWER - (1 << 17):
        raise ProtocolError(f"value of {len(data)} bytes cannot be sent: the limit is {MAX_ANSWER - (1 << 17)}")
    return msgspec.Raw(data)


def content(answer: Answer) -> Any:
    """Unpack the value of an answer; ProtocolError if it is malformed."""
    try:
        value = _value_decoder.decode(answer.value)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"value from {answer.component or 'core'}: {error}") from None
    _check_depth(value, f"value from {answer.component or 'core'}")
    return value


def _check_depth(value: Any, what: str) -> None:
    layer = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for container in layer:
            if isinstance(container, dict):
                inner.extend(part for part in container.values() if isinstance(part, dict | list))
            elif isinstance(container, list):
                inner.extend(part for part in container if isinstance(part, dict | list))
        if not inner:
            return
        layer = inner
    raise ProtocolError(f"{what}: more than {MAX_DEPTH} containers in each other")


def _unpack(data: Any, decoder: msgspec.msgpack.Decoder[Any], sender: str) -> Any:
    try:
        message = decoder.decode(data)
    except (msgspec.MsgspecError, ProtocolError, ValueError, TypeError, RecursionError) as error:
        _refuse(data, sender, str(error))
    if message.version != PROTOCOL:
        _refuse(data, sender, "")
    limit = _max_bytes(message)
    if len(data) > limit:
        raise ProtocolError(f"message from {sender}: {len(data)} bytes, the limit is {limit}")
    for field in ("params", "info", "status"):
        _check_depth(getattr(message, field, None), f"{field} in a message from {sender}")
    return message


def _refuse(data: Any, sender: str, reason: str) -> NoReturn:
    """Raise the ProtocolError of a malformed message. A wrong version comes before other reasons."""
    version = probe(data).version
    if version != PROTOCOL:
        reason = f"protocol version {version}, here it is {PROTOCOL}: install the same larpix-daq on both sides"
    raise ProtocolError(f"message from {sender}: {reason}")


def probe(data: Any) -> Probe:
    """Return the readable fields of a malformed message; the defaults if nothing is readable."""
    try:
        return _probe_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return Probe()


def unpack_client(data: Any, sender: str) -> FromClient:
    """Unpack a message of a component or an Operator to the core; ProtocolError if it is malformed."""
    if len(data) > MAX_ANSWER:
        raise ProtocolError(f"message from {sender}: {len(data)} bytes, the limit is {MAX_ANSWER}")
    message: FromClient = _unpack(data, _client_decoder, sender)
    return message


def unpack_core(data: Any) -> FromCore:
    """Unpack a message of the core; ProtocolError if it is malformed."""
    message: FromCore = _unpack(data, _core_decoder, "core")
    return message
