"""Process of an IO class of larpix-control or of a user: it passes the packets of the class on to its parent.

`io_class.IoClassSource` starts it with the descriptor of its socket, and it ends with its parent. It is run by its
path, so that neither the working directory nor this folder hides a module of the library. The class may be in a module
of the working directory.
"""

import os
import sys

if __spec__ is None:
    # At the end, so that Python finds only packages there that are not installed.
    sys.path += [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), os.getcwd()]
    del sys.path[0]

import contextlib
import importlib
import select
import socket
import struct
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from larpix.packet import Packet_v1, Packet_v2, SyncPacket, TimestampPacket, TriggerPacket

from larpixdaq.errors import ConfigError
from larpixdaq.protocol.io_class import LIMIT, Data, Failed, FromChild, Hello, Idle, Order, Send, Sent, pack, requests
from larpixdaq.runtime.child_process import parent_socket
from larpixdaq.schema import Asic

#: Seconds between two calls of the class while it has no packets.
_IDLE: Final = 0.005
#: Maximum bytes of Data, and words of a board message: both stay below io_class.LIMIT.
_MOST_BYTES: Final = 60_000
_MOST_WORDS: Final = 1_000

#: Kinds of words in PACMAN messages, and their formats, legacy and 1.0: words of chips, of the board, and others.
_CHIP, _BOARD, _OTHER = range(3)
_LEGACY: Final = [struct.Struct(form) for form in ("<cBIxxQ", "<cBBxI8x", "<c15s")]
_1_0: Final = [struct.Struct(form) for form in ("<cxH4xQQ", "<cxBB4xQ8x", "<c23s")]
_HEADER_LEGACY: Final = struct.Struct("<cIxH")
_HEADER_1_0: Final = struct.Struct("<cxBxIQ8x")

_ORDER: Final = struct.Struct("<c3xI4xI")

#: The kind of a word, and the values of its format.
Word = tuple[Any, ...]


def make(name: str, arguments: Sequence[str]) -> Any:
    """Make an object of a class of larpix.io, or of package.module:Class or package.module.Class.

    Arguments that look like numbers become numbers. ConfigError, in one line, when there is no such class."""
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        io_class = getattr(importlib.import_module(module or "larpix.io"), attribute, None)
    except ImportError as error:
        raise ConfigError(f"module {module} cannot be imported: {error}") from None
    needed = ("send", "start_listening", "empty_queue")
    if not isinstance(io_class, type) or not all(callable(getattr(io_class, method, None)) for method in needed):
        raise ConfigError(f"no class {attribute} with {', '.join(needed)} in {module or 'larpix.io'}")
    return io_class(*map(_value, arguments))


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class Encoder:
    """Encodes packets as messages of a PACMAN.

    A TimestampPacket begins a message and gives the time of all messages up to the next one. Before the first one it is
    the host's time. `io_groups`: of the class; packets without an io_group count as the first, packets of another one
    become unknown words. `wide`: all messages have format 1.0 with its clock of 64 bits, otherwise those that need it.
    """

    def __init__(self, io_groups: Sequence[int], *, wide: bool) -> None:
        self._io_groups = io_groups
        self._wide = wide
        self._seconds: dict[int, int] = {}  # of the last TimestampPacket, by io_group

    def messages(self, packets: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        """Yield (io_group, message), in the order of the packets within each io_group."""
        opened: dict[int, tuple[int, list[Word]]] = {}
        for packet in packets:
            word = _word(packet)
            io_group = getattr(packet, "io_group", None) or self._io_groups[0]
            if io_group not in self._io_groups:
                io_group, word = self._io_groups[0], _unknown_word(f"io_group {io_group}")
            if io_group in opened and (word is None or len(opened[io_group][1]) == _MOST_WORDS):
                yield io_group, self._message(*opened.pop(io_group))
            if word is None:
                self._seconds[io_group] = int(packet.timestamp or 0)
            if io_group not in opened:
                opened[io_group] = self._seconds.get(io_group, int(time.time())), []
            if word is not None:
                opened[io_group][1].append(word)
        for io_group, (seconds, words) in opened.items():
            yield io_group, self._message(seconds, words)

    def batches(self, packets: Iterable[Any]) -> Iterator[Data]:
        """Yield the messages of the packets in batches for the parent."""
        groups, log = bytearray(), bytearray()
        for io_group, message in self.messages(packets):
            if len(log) + len(message) > _MOST_BYTES:
                yield Data(bytes(groups), bytes(log))
                groups.clear()
                log.clear()
            groups.append(io_group)
            log += len(message).to_bytes(4, "little") + message
        if log:
            yield Data(bytes(groups), bytes(log))

    def _message(self, seconds: int, words: list[Word]) -> bytes:
        if not self._wide:
            with contextlib.suppress(struct.error):  # a clock of more than 32 bits, an io_channel of more than 8
                return _HEADER_LEGACY.pack(b"D", seconds, len(words)) + _body(_LEGACY, words)
        try:
            body = _body(_1_0, words)
        except struct.error:  # no clock or io_channel is that large
            body = b"".join(_pack_fitting(_1_0, word) for word in words)
        return _HEADER_1_0.pack(b"D", 1, len(body), seconds * 10**9 & (1 << 64) - 1) + body


def _word(packet: Any) -> Word | None:
    """Return the word of a packet; None for a packet that begins a message."""
    if isinstance(packet, TimestampPacket):
        return None
    if isinstance(packet, SyncPacket):
        return _BOARD, b"S", _byte(packet.sync_type), packet.clk_source or 0, packet.timestamp or 0
    if isinstance(packet, TriggerPacket):
        return _BOARD, b"T", _byte(packet.trigger_type), 0, packet.timestamp or 0
    try:
        bits = int.from_bytes(packet.bytes(), "little")
        return _CHIP, b"D", packet.io_channel or 0, getattr(packet, "receipt_timestamp", None) or 0, bits
    except (AttributeError, TypeError):
        return _unknown_word(type(packet).__name__)


def _byte(value: Any) -> int:
    return value[0] if isinstance(value, bytes) and value else int(value or 0)


def _unknown_word(text: str) -> Word:
    return _OTHER, b"?", text.encode("ascii", "replace")


def _body(forms: Sequence[struct.Struct], words: Iterable[Word]) -> bytes:
    return b"".join([forms[kind].pack(*content) for kind, *content in words])


def _pack_fitting(forms: Sequence[struct.Struct], word: Word) -> bytes:
    try:
        return forms[word[0]].pack(*word[1:])
    except struct.error:
        return forms[_OTHER].pack(*_unknown_word(str(word[1:]))[1:])


def packets_of(request: Send, asic: Asic) -> list[Any]:
    """Return the packets for the words of a request."""
    made = []
    for at, io_channel in enumerate(request.io_channels):
        bits = request.words[8 * at : 8 * at + 8]
        packet = Packet_v1(bits[:7]) if asic == Asic.V1 else Packet_v2(bits)
        packet.io_group, packet.io_channel = request.io_group, io_channel
        made.append(packet)
    return made


def execute(io: Any, request: Order) -> bytes:
    """Execute each word of an order by the methods of larpix-control's PACMAN_IO. Returns the board's answers."""
    answer = b""
    for kind, register, value in _ORDER.iter_unpack(request.body):
        if kind == b"R":
            value = io.get_reg(register, io_group=request.io_group)
        elif kind == b"W":
            io.set_reg(register, value, io_group=request.io_group)
        elif not io.ping(io_group=request.io_group):
            raise TimeoutError("no answer")
        answer += _ORDER.pack(kind, register, value)
    return answer


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:500]


class _ParentGone(Exception):
    pass


def _send(sock: socket.socket, message: FromChild) -> None:
    try:
        sock.send(pack(message))
    except OSError:
        raise _ParentGone from None


def _serve(sock: socket.socket, io: Any, encoder: Encoder, asic: Asic) -> None:
    """Pass packets and requests on until the parent closes its socket."""
    busy = False
    while True:
        if select.select([sock], [], [], 0 if busy else _IDLE)[0]:
            data = sock.recv(LIMIT)
            if not data:
                raise _ParentGone
            request = requests.decode(data)
            body, error = b"", ""
            try:
                if isinstance(request, Order):
                    body = execute(io, request)
                else:
                    io.send(packets_of(request, asic))
            except Exception as failure:
                traceback.print_exc()
                error = _one_line(failure)
            _send(sock, Sent(request.number, request.io_group, body, error))
        packets, _ = io.empty_queue()
        if busy and not packets:
            _send(sock, Idle())
        busy = bool(packets)
        for batch in encoder.batches(packets):
            _send(sock, batch)


def main() -> None:
    fd, asic, wide, name, *arguments = sys.argv[1:]
    sock = parent_socket(fd)
    try:
        io = make(name, arguments)
        io.start_listening()
        io_groups = sorted(map(int, getattr(io, "_io_group_table", None) or [1]))
        registers = all(callable(getattr(io, method, None)) for method in ("ping", "get_reg", "set_reg"))
        _send(sock, Hello(io_groups, registers))
        try:
            _serve(sock, io, Encoder(io_groups, wide=wide == "wide"), Asic(int(asic)))
        except _ParentGone:
            with contextlib.suppress(Exception):
                io.stop_listening()
        status = 0
    except BaseException as error:
        if not isinstance(error, ConfigError | OSError):  # a mistake in the class; the other errors explain themselves
            traceback.print_exc()
        with contextlib.suppress(_ParentGone):
            _send(sock, Failed(_one_line(error)))
        status = 1
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads that the class may have started


if __name__ == "__main__":
    main()
