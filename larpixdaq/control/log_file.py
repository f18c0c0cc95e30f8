"""The log's file: the form of its lines, and its lines in the order of their times, also while it grows.

A line is a record: UTC time, level, component, text. A full file is renamed to NAME.1, and older ones to NAME.2, ...
Records of a component that was not connected to the log stand later in the file than their times say. Anything may
be in a file after a crash: a line without the form of a record is shown as it is, after the line before it.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import re
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import accumulate, chain
from operator import itemgetter
from pathlib import Path
from typing import Final

import msgspec

from larpixdaq.errors import FileError, printable
from larpixdaq.runtime.file_access import in_place, open_regular
from larpixdaq.runtime.units import utc_datetime

#: Seconds for which a followed line waits for earlier ones of other components.
HOLD: Final = 0.5
#: Bytes that are read at once.
_BLOCK: Final = 256 << 10
#: Maximum number of blocks in memory.
_BLOCKS: Final = 64
#: Maximum bytes of a line, above that of any record. A longer line is cut into several.
_LONGEST: Final = 4 << 20
#: An older file is not read if it was last written this number of seconds before the first wanted time: so far may
#: the clock of a component be ahead.
_CLOCK_AHEAD: Final = 86400.0
#: Time of a line, in unix microseconds, that has none and follows no other line.
UNKNOWN: Final = -(1 << 62)
_EPOCH: Final = datetime(1970, 1, 1)
_MICROSECOND: Final = timedelta(microseconds=1)
_IMPOSSIBLE: Final = "(impossible time)"
_LEVELS: Final = {name: getattr(logging, name) for name in ("NOTSET", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
_LEVEL_NUMBERS: Final = {name.encode(): number for name, number in _LEVELS.items()}
_STAMP: Final = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
_STAMP_SIZE: Final = 27
_LEVEL: Final = "|".join(_LEVELS).encode()
#: The beginning of a line: time, level, component.
_HEAD: Final = re.compile(rb"(%b|\(impossible time\)) (%b|Level -?\d{1,19}) (.*?): " % (_STAMP, _LEVEL), re.DOTALL)
#: The component of each line in a text.
_COMPONENTS: Final = re.compile(
    rb"^(?:%b|\(impossible time\)) (?:%b|Level -?\d{1,19}) (.*?): " % (_STAMP, _LEVEL), re.MULTILINE
)


class LogRecord(msgspec.Struct, array_like=True, frozen=True):
    """One log record, also as it is sent; `time` in unix seconds, `level` as in logging."""

    time: float
    level: int
    component: str
    text: str


def line(record: LogRecord) -> str:
    """Convert a record to one line: UTC time, level, component, text, with escapes for invisible characters."""
    try:
        when = utc_datetime(record.time).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except ValueError:
        when = _IMPOSSIBLE
    return f"{when} {logging.getLevelName(record.level)} {component(record.component)}: {printable(record.text)}\n"


def component(name: str) -> str:
    """Return the name of a component as in a line, where ": " ends it."""
    return printable(name).replace(": ", "\\x3a ")


def parse(text: bytes) -> LogRecord | None:
    """Convert a line without its end back to its record, whose texts keep their escapes. None if it is no record.

    The time is rounded to microseconds, and NaN if it was impossible.
    """
    found = _HEAD.match(text)
    if found is None:
        return None
    try:
        time = math.nan if found[1] == _IMPOSSIBLE.encode() else _microseconds(found[1]) / 1e6
    except ValueError:
        return None
    name, words = (part.decode("utf-8", "backslashreplace") for part in (found[3], text[found.end() :]))
    return LogRecord(time, _level(found[2]), name, words)


def _microseconds(stamp: bytes) -> int:
    """Return the unix microseconds of a time in a line. Raises ValueError if there is no such day or hour."""
    return (datetime.fromisoformat(stamp[:-1].decode()) - _EPOCH) // _MICROSECOND


def _level(name: bytes) -> int:
    number = _LEVEL_NUMBERS.get(name)
    return int(name.removeprefix(b"Level ")) if number is None else number


def _earlier(seconds: float) -> bytes:
    """Return a pattern for the beginnings of times before this one, in unix seconds. It leaves out impossible times."""
    try:
        stamp = utc_datetime(seconds).strftime("%Y-%m-%dT%H:%M:%S").encode()
    except ValueError:
        return b"(?!)"
    # A time is earlier if it is so in a digit, and the same before it.
    smaller = [stamp[:i] + b"[0-%d]" % (digit - 49) for i, digit in enumerate(stamp) if 48 < digit <= 57]
    return b"(?:%b)" % b"|".join(smaller)


class Wanted:
    """Selects lines: from a level on, of some components, in a time. A line without the form of a record is selected
    if its place in time is."""

    def __init__(
        self, level: int = 0, components: Iterable[str] = (), since: float = -math.inf, until: float = math.inf
    ) -> None:
        """`components`: none for all. `since` and `until`: unix seconds."""
        self.since = since
        self._level = level
        names = {component(name).encode("utf-8", "replace"): name for name in components}
        self._components = frozenset(names)
        #: Wanted components of which no line from the level on has come, by their name in lines.
        self.missing = names
        self._since, self._until = since * 1e6, until * 1e6
        self._second, self._second_start = b"", 0
        self._time = UNKNOWN  # of the last line, also of one that is not wanted
        unwanted = [b"%b %b " % (_STAMP, name.encode()) for name, number in _LEVELS.items() if number < level]
        if self._components:
            choice = b"|".join(map(re.escape, sorted(self._components)))
            unwanted.append(b"%b (?:%b) (?!(?:%b): )" % (_STAMP, _LEVEL, choice))
        if since > -math.inf:
            unwanted.append(b"(?=%b)%b (?:%b) " % (_earlier(since), _STAMP, _LEVEL))
        #: Matches unwanted lines that follow each other, most of them: only for speed.
        self._skip = re.compile(b"(?:(?:%b).*?: .*\n)+" % b"|".join(unwanted)) if unwanted else None

    def select(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        """Yield start, end, and time in unix microseconds, of the selected lines in `data`, which has whole lines.

        A line without time has that of the line before it, also of an earlier call, or UNKNOWN.
        """
        at = 0
        while at < len(data):
            if self._skip is not None and (skipped := self._skip.match(data, at)) is not None:
                at = skipped.end()
                last = data.rfind(b"\n", 0, at - 1) + 1
                self._note(data[last : last + _STAMP_SIZE])
                continue
            start, end = at, data.index(b"\n", at)
            at = end + 1
            found = _HEAD.match(data, start, end)
            if found is not None:
                stamp, level, name = found.groups()
                self._note(stamp)
                if (self._components and name not in self._components) or _level(level) < self._level:
                    continue
                if self.missing:
                    self.missing.pop(name, None)
            if self._since <= self._time <= self._until or self._time == UNKNOWN:
                yield start, end, self._time

    def forget(self) -> None:
        """Forget the line before the next call of select()."""
        self._time = UNKNOWN

    def _note(self, stamp: bytes) -> None:
        second = stamp[:19]
        if second != self._second:
            try:
                self._second_start = _microseconds(second + b".000000Z")
            except ValueError:  # an impossible time
                return
            self._second = second
        self._time = self._second_start + int(stamp[20:26])


def _open_all(path: Path) -> list[int]:
    """Open the file and its older files. Returns the descriptors, the oldest file first.

    The newest file is opened first, so that a rotation meanwhile hides no file; one that comes twice is left out.
    """
    files: dict[tuple[int, int], int] = {}
    try:
        found = (re.fullmatch(re.escape(path.name) + r"\.([1-9]\d{0,5})", name) for name in os.listdir(path.parent))
        numbers = {int(match[1]) for match in found if match is not None}
        older = sorted(numbers | {number + 1 for number in numbers} | {1})
        for name in (path.name, *(f"{path.name}.{number}" for number in older)):
            try:
                file = open_regular(path.with_name(name).resolve())
            except FileNotFoundError:
                continue
            status = os.fstat(file)
            if files.setdefault((status.st_dev, status.st_ino), file) != file:
                os.close(file)
    except OSError as error:
        for file in files.values():
            os.close(file)
        raise error if isinstance(error, FileError) else FileError(f"log file {path}: {error.strerror}") from None
    return list(files.values())[::-1]


class LogFiles:
    """The log's file and its older files, as they are now: a rotation changes nothing here."""

    def __init__(self, path: Path, *, growing: bool = False) -> None:
        """FileError if a file cannot be read, or there is none. `growing`: without a last line that has no end yet."""
        self._files = _open_all(path)
        if not self._files:
            raise FileError(f"log file {path}: no such file")
        self._sizes = [os.fstat(file).st_size for file in self._files]
        if growing:
            self._sizes[-1] = self._end_of_lines()
        #: Position of the first byte of each file in all of them together.
        self._starts = [0, *accumulate(self._sizes)]
        self._block = lru_cache(_BLOCKS)(self._read_block)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def follow(self, path: Path) -> Follower:
        """Return a Follower that begins at the end of the newest file."""
        return Follower(path, os.dup(self._files[-1]), self._sizes[-1])

    def in_order(self, wanted: Wanted) -> Iterator[bytes]:
        """Yield the wanted lines, without their ends, in the order of their times.

        Needs 20 bytes of memory for each of them, and 36 if they are not in order in the files.
        """
        times, positions, lengths = array("q"), array("q"), array("i")
        in_order, last = True, UNKNOWN
        for number, file in enumerate(self._files):
            if os.fstat(file).st_mtime < wanted.since - _CLOCK_AHEAD:
                continue
            for position, data in self._whole_lines(number):
                for start, end, time in wanted.select(data):
                    in_order = in_order and time >= last
                    last = time
                    times.append(time)
                    positions.append(position + start)
                    lengths.append(end - start)
        order: Iterable[int] = range(len(times))
        if not in_order:
            import numpy as np  # here, because its import takes longer than reading the last lines

            order = map(int, np.frombuffer(times, np.int64).argsort(kind="stable"))
        for index in order:
            yield self._read(positions[index], lengths[index])

    def unknown(self, wanted: Wanted) -> tuple[list[str], list[str]]:
        """Return the wanted components that have no record in the files at all, and, if there are any, those that have.

        Reads all files if `wanted` has found no line of a component. The known names are as in the lines.
        """
        if not wanted.missing:
            return [], []
        found: set[bytes] = set()
        for number in range(len(self._files)):
            for _, data in self._whole_lines(number):
                found.update(_COMPONENTS.findall(data))
        unknown = [name for in_line, name in wanted.missing.items() if in_line not in found]
        return unknown, sorted(name.decode("utf-8", "backslashreplace") for name in found) if unknown else []

    def last(self, count: int, wanted: Wanted) -> list[tuple[int, bytes]]:
        """Return the last wanted lines of the files, at most `count`, with their times, in the order of their times."""
        found: list[tuple[int, bytes]] = []
        blocks = chain.from_iterable(map(self._blocks_from_end, reversed(range(len(self._files)))))
        while len(found) < count and (data := next(blocks, None)) is not None:
            wanted.forget()
            found[:0] = [(time, data[start:end]) for start, end, time in wanted.select(data)]
        found = found[max(0, len(found) - count) :]
        time = UNKNOWN
        for index, (own, text) in enumerate(found):
            time = time if own == UNKNOWN else own
            found[index] = time, text
        return sorted(found, key=itemgetter(0))

    def _whole_lines(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield the lines of a file, many at once, with the position of the first."""
        at, rest = 0, b""
        while at < self._sizes[number]:
            read = os.pread(self._files[number], min(_BLOCK, self._sizes[number] - at), at)
            if not read:  # the file was cut
                break
            position = self._starts[number] + at - len(rest)
            at += len(read)
            data, rest = _cut(rest + read)
            if data:
                yield position, data
        if rest:
            yield self._starts[number] + at - len(rest), rest + b"\n"

    def _blocks_from_end(self, number: int) -> Iterator[bytes]:
        """Yield the lines of a file, many at once, the last lines first."""
        end, rest = self._sizes[number], b""
        while end > 0:
            start = max(0, end - _BLOCK)
            data = os.pread(self._files[number], end - start, start) + rest
            end, rest = start, b""
            if start:
                # The first line of the block began before it.
                cut = data.find(b"\n") + 1 or len(data)
                if cut < _LONGEST:
                    data, rest = data[cut:], data[:cut]
            if data:
                yield data if data.endswith(b"\n") else data + b"\n"

    def _end_of_lines(self) -> int:
        """Return the position after the last line end of the newest file."""
        file, end = self._files[-1], self._sizes[-1]
        while end > 0:
            start = max(0, end - _BLOCK)
            found = os.pread(file, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def _read_block(self, number: int, index: int) -> bytes:
        start = index * _BLOCK
        return os.pread(self._files[number], min(_BLOCK, max(0, self._sizes[number] - start)), start)

    def _read(self, position: int, length: int) -> bytes:
        number = bisect_right(self._starts, position) - 1
        index, start = divmod(position - self._starts[number], _BLOCK)
        data = self._block(number, index)[start : start + length]
        while len(data) < length:
            index += 1
            more = self._block(number, index)[: length - len(data)]
            if not more:  # the file was cut
                break
            data += more
        return data


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """Return the whole lines in `data`, and the rest after the last of them. A line that is too long is cut."""
    end = data.rfind(b"\n") + 1
    if not end and len(data) >= _LONGEST:
        return data + b"\n", b""
    return data[:end], data[end:]


class Follower:
    """Reads what is added to the log's file, across rotations, and if the file is removed and made anew."""

    def __init__(self, path: Path, file: int | None = None, at: int = 0) -> None:
        """Begin at the position `at` of an open file, or, without one, when there is a file at the path."""
        self._path, self._file, self._at = path, file, at
        self._rest = b""
        #: Whether lines may be missing, because files were removed before they were read.
        self.missed = False

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self) -> Iterator[bytes]:
        """Yield the new lines, many at once."""
        yield from self._read_on()
        while self._file is None or not in_place(self._file, self._path.resolve()):
            yield from self._read_on()  # what was written before the renaming
            following = self._following()
            if following is None:
                return
            if self._rest:
                yield self._rest + b"\n"
            self.close()
            self._file, self._at, self._rest = following, 0, b""
            yield from self._read_on()

    def _read_on(self) -> Iterator[bytes]:
        if self._file is None:
            return
        if os.fstat(self._file).st_size < self._at:  # somebody has emptied it
            self._at, self._rest = 0, b""
        while read := os.pread(self._file, _BLOCK, self._at):
            self._at += len(read)
            data, self._rest = _cut(self._rest + read)
            if data:
                yield data

    def _following(self) -> int | None:
        """Open the file that follows the present one; None if there is none yet."""
        files = _open_all(self._path)
        following = files
        if self._file is not None:
            own = os.fstat(self._file)
            status = [os.fstat(file) for file in files]
            places = [index for index, other in enumerate(status) if os.path.samestat(own, other)]
            if places:
                following = files[places[0] + 1 :]
            else:  # removed: by a rotation, or by somebody
                following = [f for f, other in zip(files, status, strict=True) if other.st_mtime_ns >= own.st_mtime_ns]
                self.missed = self.missed or len(following) > 1
        for file in files:
            if file not in following[:1]:
                os.close(file)
        return following[0] if following else None


class Merger:
    """Brings followed lines into the order of their times: each line waits HOLD seconds for earlier ones."""

    def __init__(self, shown: int = UNKNOWN) -> None:
        """`shown`: time of the last line that was shown already, unix microseconds."""
        self._shown = shown
        self._waiting: list[tuple[int, int, bytes]] = []  # heap of time, number, line
        self._arrived: deque[tuple[float, int]] = deque()  # monotonic seconds, time of the line
        self._number = 0

    def add(self, time: int, text: bytes, now: float) -> None:
        """Add a line with its time in unix microseconds. `now`: monotonic seconds."""
        heapq.heappush(self._waiting, (time, self._number, text))
        self._arrived.append((now, time))
        self._number += 1

    def take(self, now: float, clock: float) -> Iterator[tuple[bytes, bool]]:
        """Yield the lines that have waited, and those before them, and whether each is late: before a line that was
        shown. `now`: monotonic seconds, `clock`: unix seconds."""
        until = None
        while self._arrived and now - self._arrived[0][0] >= HOLD:
            time = self._arrived.popleft()[1]
            until = time if until is None else max(until, time)
        while until is not None and self._waiting and self._waiting[0][0] <= until:
            time, _, text = heapq.heappop(self._waiting)
            yield text, UNKNOWN < time < self._shown
            # After a line of a clock that is ahead, the others are not late.
            self._shown = max(self._shown, min(time, round(clock * 1e6)))
