"""The process of an IO class, larpix-control's or anybody's: it alone has the class, and hands over what that gets.

Started by `io_class.IoClassSource` with the descriptor of its socket, it ends with its parent. It is run by path, so
that neither the working directory nor this folder can hide a module of the library. Modules of the working directory
can be named too, but hide nothing either.
"""

import os
import sys

if __spec__ is None:
    # The last places, so that only a package that is not installed is found by them.
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
from larpixdaq.protocol.io_class import (
    MAX_MESSAGE,
    Data,
    Failed,
    FromChild,
    Hello,
    Idle,
    Order,
    Send,
    Sent,
    pack,
    requests,
)
from larpixdaq.runtime.child_process import parent_socket
from larpixdaq.schema import Asic

#: When nothing comes, the class is asked again after so long (seconds).
_IDLE: Final = 0.005
#: Bytes that are handed over at once, and words of one message: both stay below io_class.MAX_MESSAGE.
_MOST_BYTES: Final = 60_000
_MOST_WORDS: Final = 1_000

#: Words of PACMAN messages, legacy and 1.0: chips' words, the board's own, and any other.
_CHIPS, _BOARDS, _OTHER = range(3)
_LEGACY: Final = [struct.Struct(form) for form in ("<cBIxxQ", "<cBBxI8x", "<c15s")]
_1_0: Final = [struct.Struct(form) for form in ("<cxH4xQQ", "<cxBB4xQ8x", "<c23s")]
_HEADER_LEGACY: Final = struct.Struct("<cIxH")
_HEADER_1_0: Final = struct.Struct("<cxBxIQ8x")

_ORDER: Final = struct.Struct("<c3xI4xI")

#: Which of these a word is, and what is in it.
Word = tuple[Any, ...]


def make(name: str, arguments: Sequence[str]) -> Any:
    """An object of the class NAME: of larpix.io, or package.module:Class, or package.module.Class. Arguments that look
    like numbers are numbers. ConfigError, in one line, when there is no such class."""
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "larpix.io"), attribute, None)
    except ImportError as error:
        raise ConfigError(f"module {module} cannot be imported: {error}") from None
    needed = ("send", "start_listening", "empty_queue")
    if not isinstance(found, type) or not all(callable(getattr(found, method, None)) for method in needed):
        raise ConfigError(f"no class {attribute} with {', '.join(needed)} in {module or 'larpix.io'}")
    return found(*map(_value, arguments))


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class Encoder:
    """Packets as messages of a PACMAN. A TimestampPacket begins one, and its time is that of all until the next; before
    the first the host's time stands in.

    `io_groups`: those that the class has; packets without one are of the first, and those of others become words that
    nobody can understand. `wide`: all messages are of format 1.0, whose clocks have 64 bits; else those that need it.
    """

    def __init__(self, io_groups: Sequence[int], *, wide: bool) -> None:
        self._io_groups = io_groups
        self._wide = wide
        self._seconds: dict[int, int] = {}  # of the last TimestampPacket

    def messages(self, packets: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        """(io_group, message). Messages of an io_group have their order, those of several are side by side."""
        opened: dict[int, tuple[int, list[Word]]] = {}
        for packet in packets:
            word = _word(packet)
            io_group = getattr(packet, "io_group", None) or self._io_groups[0]
            if io_group not in self._io_groups:
                io_group, word = self._io_groups[0], _other(f"io_group {io_group}")
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
        """The same, as they are handed over."""
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
            body = b"".join(_fit(_1_0, word) for word in words)
        return _HEADER_1_0.pack(b"D", 1, len(body), seconds * 10**9 & (1 << 64) - 1) + body


def _word(packet: Any) -> Word | None:
    """What is in a packet; None for one that begins a message."""
    if isinstance(packet, TimestampPacket):
        return None
    if isinstance(packet, SyncPacket):
        return _BOARDS, b"S", _byte(packet.sync_type), packet.clk_source or 0, packet.timestamp or 0
    if isinstance(packet, TriggerPacket):
        return _BOARDS, b"T", _byte(packet.trigger_type), 0, packet.timestamp or 0
    try:
        bits = int.from_bytes(packet.bytes(), "little")
        return _CHIPS, b"D", packet.io_channel or 0, getattr(packet, "receipt_timestamp", None) or 0, bits
    except (AttributeError, TypeError):
        return _other(type(packet).__name__)


def _byte(value: Any) -> int:
    return value[0] if isinstance(value, bytes) and value else int(value or 0)


def _other(text: str) -> Word:
    return _OTHER, b"?", text.encode("ascii", "replace")


def _body(forms: Sequence[struct.Struct], words: Iterable[Word]) -> bytes:
    return b"".join([forms[which].pack(*content) for which, *content in words])


def _fit(forms: Sequence[struct.Struct], word: Word) -> bytes:
    try:
        return forms[word[0]].pack(*word[1:])
    except struct.error:
        return forms[_OTHER].pack(*_other(str(word[1:]))[1:])


def packets_of(request: Send, asic: Asic) -> list[Any]:
    """What the class is to send."""
    made = []
    for at, io_channel in enumerate(request.io_channels):
        bits = request.words[8 * at : 8 * at + 8]
        packet = Packet_v1(bits[:7]) if asic == Asic.V1 else Packet_v2(bits)
        packet.io_group, packet.io_channel = request.io_group, io_channel
        made.append(packet)
    return made


def ordered(io: Any, request: Order) -> bytes:
    """What the board says to each word of an order: by the methods that larpix-control's PACMAN_IO has for them."""
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


def _line(error: BaseException) -> str:
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:500]


class _ParentGone(Exception):
    pass


def _say(sock: socket.socket, message: FromChild) -> None:
    try:
        sock.send(pack(message))
    except OSError:
        raise _ParentGone from None


def _serve(sock: socket.socket, io: Any, encoder: Encoder, asic: Asic) -> None:
    """Until the parent closes its end."""
    busy = False
    while True:
        if select.select([sock], [], [], 0 if busy else _IDLE)[0]:
            data = sock.recv(MAX_MESSAGE)
            if not data:
                raise _ParentGone
            request = requests.decode(data)
            body, error = b"", ""
            try:
                if isinstance(request, Order):
                    body = ordered(io, request)
                else:
                    io.send(packets_of(request, asic))
            except Exception as told:
                traceback.print_exc()
                error = _line(told)
            _say(sock, Sent(request.number, request.io_group, body, error))
        packets, _ = io.empty_queue()
        if busy and not packets:
            _say(sock, Idle())
        busy = bool(packets)
        for batch in encoder.batches(packets):
            _say(sock, batch)


def main() -> None:
    fd, asic, wide, name, *arguments = sys.argv[1:]
    sock = parent_socket(fd)
    try:
        io = make(name, arguments)
        io.start_listening()
        io_groups = sorted(map(int, getattr(io, "_io_group_table", None) or [1]))
        registers = all(callable(getattr(io, method, None)) for method in ("ping", "get_reg", "set_reg"))
        _say(sock, Hello(io_groups, registers))
        try:
            _serve(sock, io, Encoder(io_groups, wide=wide == "wide"), Asic(int(asic)))
        except _ParentGone:
            with contextlib.suppress(Exception):
                io.stop_listening()
        status = 0
    except BaseException as error:
        if not isinstance(error, ConfigError | OSError):  # a mistake in the class; the others say what they are about
            traceback.print_exc()
        with contextlib.suppress(_ParentGone):
            _say(sock, Failed(_line(error)))
        status = 1
    sys.stdout.flush()
    os._exit(status)  # without waiting for what the class may have started


if __name__ == "__main__":
    main()
