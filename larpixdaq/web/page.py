"""What one open page gets: a snapshot of the state, then deltas, arrays, and the responses to its requests.

A page that reads slowly has at most one state waiting for it, whose parts are always the newest: only the names of
changed sections are kept, and of each array the last one.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
import numpy as np

from larpixdaq.runtime.record_file import zlib_library

#: Highest integer that every number of JavaScript holds exactly.
_EXACT: Final = 2**53
#: Maximum number of appended items of a section that wait for a page; it gets the whole section after that.
_APPENDED: Final = 300
#: Maximum bytes of responses that wait for a page; it is closed when it has more.
MAX_WAITING: Final = 16 << 20


def plain(value: Any) -> Any:
    """Return a value of a request's result as JSON has it.

    numpy scalars become numbers, NaN and infinity null, structured arrays lists of dicts, integers above 2^53 texts,
    and bytes texts.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value) if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value) if -_EXACT <= value <= _EXACT else str(int(value))
    if isinstance(value, float):
        return float(value)  # msgspec writes NaN and infinity as null
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return _plain_array(value)
    if isinstance(value, np.void) and value.dtype.names:
        return {name: plain(value[name]) for name in value.dtype.names}
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    return plain(str(value))


def _plain_array(array: np.ndarray[Any, Any]) -> Any:
    names = array.dtype.names
    if names and array.ndim == 1:
        columns = [_plain_array(array[name]) for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    kind = array.dtype.kind
    if kind in "bf" or (kind in "iu" and (array.dtype.itemsize < 8 or not array.size or _is_exact(array))):
        return array.tolist()
    return plain(array.tolist())


def _is_exact(array: np.ndarray[Any, Any]) -> bool:
    return int(array.max()) <= _EXACT and int(array.min()) >= -_EXACT


def to_json(value: Any) -> bytes:
    return msgspec.json.encode(plain(value))


def binary_frame(header: dict[str, Any], values: np.ndarray[Any, Any]) -> bytes:
    """Return a frame: length of the header (u32, little-endian), header in JSON, and the deflated values."""
    deflate = zlib_library.compressobj(1, zlib_library.DEFLATED, -15)
    content = deflate.compress(np.ascontiguousarray(values).data.cast("B") if values.size else b"") + deflate.flush()
    head = to_json({**header, "shape": list(values.shape), "coding": "deflate-raw"})
    return b"".join((struct.pack("<I", len(head)), head, content))


class Section:
    """A part of the state that is replaced as a whole."""

    def __init__(self, value: Any = None) -> None:
        self._json = to_json(value)

    def set(self, value: Any) -> bool:
        """Replace the value. Returns whether it has changed."""
        new = to_json(value)
        changed = new != self._json
        self._json = new
        return changed

    @property
    def json(self) -> bytes:
        return self._json


class Tail:
    """A section to which items are appended; it keeps the last ones."""

    def __init__(self, kept: int) -> None:
        self._items: deque[bytes] = deque(maxlen=kept)

    def clear(self) -> None:
        self._items.clear()

    def append(self, item: Any) -> bytes:
        json = to_json(item)
        self._items.append(json)
        return json

    @property
    def json(self) -> bytes:
        return b"[" + b",".join(self._items) + b"]"


class History:
    """A section with rates over time, in columns: times (unix s), rate of each io_group and their total (packets/s).

    An io_group has null before its first rate. Appended items are {"time", "rates", "total"}.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._items: deque[tuple[float, dict[str, float], float]] = deque(maxlen=kept)
        self._json = b""

    def append(self, when: float, rates: Mapping[int, float], total: float) -> bytes:
        by_name = {str(io_group): _short(rate) for io_group, rate in rates.items()}
        self._items.append((round(when, 3), by_name, _short(total)))
        self._json = b""
        return to_json({"time": round(when, 3), "rates": by_name, "total": _short(total)})

    @property
    def json(self) -> bytes:
        if not self._json:
            names: dict[str, None] = {}
            for _, rates, _ in self._items:
                names |= dict.fromkeys(rates)
            groups = {name: [rates.get(name) for _, rates, _ in self._items] for name in names}
            times, totals = [item[0] for item in self._items], [item[2] for item in self._items]
            self._json = msgspec.json.encode({"times": times, "io_groups": groups, "total": totals})  # all plain
        return self._json


def _short(rate: float) -> float:
    """Return a rate with six digits, which are enough for a picture."""
    return float(f"{rate:.6g}")


class Outbox:
    """What a page has not got yet. `sections`: the state, which others change.

    Snapshot and deltas have the time (unix s) of the web server, from which a page computes ages.
    """

    def __init__(self, sections: Mapping[str, Section | Tail | History], viewer: Mapping[str, str]) -> None:
        self._sections, self._viewer = sections, viewer
        self._sequence = 0
        self._changed: dict[str, None] = {}  # names of sections
        self._own: dict[str, bytes] = {}  # sections of this page alone
        self._appended: dict[str, list[bytes]] = {}
        self._arrays: dict[str, bytes] = {}
        self._responses: OrderedDict[tuple[str, str] | int, bytes] = OrderedDict()
        self._number = 0
        #: Bytes of the responses that wait.
        self.waiting = 0

    def change(self, name: str) -> None:
        """Note that a section has another value."""
        self._changed[name] = None
        self._appended.pop(name, None)

    def append(self, name: str, items: Iterable[bytes]) -> None:
        """Note items that were appended to a section."""
        if name in self._changed:
            return
        waiting = self._appended.setdefault(name, [])
        waiting.extend(items)
        if len(waiting) > _APPENDED:
            self.change(name)

    def set_own(self, name: str, json: bytes) -> None:
        """Set a section that only this page has."""
        self._own[name] = json

    def set_array(self, name: str, frame: bytes) -> None:
        """Replace an array by a newer one."""
        self._arrays[name] = frame

    def drop_array(self, name: str) -> None:
        """Forget an array that this page does not show any more."""
        self._arrays.pop(name, None)

    def respond(self, request: str, kind: str, json: bytes) -> None:
        """Add a response to a request; a progress replaces an earlier one that still waits."""
        self._number += 1
        key: tuple[str, str] | int = (request, kind) if kind == "progress" else self._number
        self.waiting += len(json) - len(self._responses.pop(key, b""))
        self._responses[key] = json

    def take(self) -> list[str | bytes]:
        """Return the frames to send now, texts and arrays, and forget them."""
        frames: list[str | bytes] = []
        if not self._sequence:
            self._sequence = 1
            state = b",".join(b'"%b":%b' % (name.encode(), part.json) for name, part in self._sections.items())
            head = {"type": "snapshot", "sequence": 1, "time": round(time.time(), 3), "viewer": self._viewer}
            frames.append((msgspec.json.encode(head)[:-1] + b',"state":{' + state + b"}}").decode())
            self._changed.clear()
            self._appended.clear()
        if self._changed or self._own or self._appended:
            self._sequence += 1
            values = {name: self._sections[name].json for name in self._changed} | self._own
            changed = b",".join(b'"%b":%b' % (name.encode(), json) for name, json in values.items())
            appended = b",".join(
                b'"%b":[%b]' % (name.encode(), b",".join(items)) for name, items in self._appended.items()
            )
            head = {"type": "delta", "sequence": self._sequence, "time": round(time.time(), 3)}
            parts = b',"set":{%b},"append":{%b}}' % (changed, appended)
            frames.append((msgspec.json.encode(head)[:-1] + parts).decode())
            self._changed, self._own, self._appended = {}, {}, {}
        frames += [json.decode() for json in self._responses.values()]
        self._responses.clear()
        self.waiting = 0
        frames += self._arrays.values()
        self._arrays = {}
        return frames
