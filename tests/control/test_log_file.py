"""The log's file: lines and records, the order of their times, rotations, and files that are not as they should be."""

import logging
import math
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.control import log_file
from larpixdaq.control.log_file import (
    HOLD,
    Follower,
    LogFiles,
    LogRecord,
    Merger,
    Wanted,
    component,
    line,
    parse,
)
from larpixdaq.errors import FileError, printable

#: From the year 2106 on a float does not tell microseconds apart.
TIMES = st.floats(-(2.0**32), 2.0**32) | st.floats(3e11) | st.floats(max_value=-3e11) | st.just(math.nan)
NAMES = st.text(max_size=8) | st.sampled_from(["core", "LArPix board", "a: b", "a:", ": ", ""])
RECORDS = st.builds(
    LogRecord,
    time=TIMES,
    level=st.sampled_from([0, 10, 20, 30, 40, 50, 15, -3, 2**63 - 1]),
    component=NAMES,
    text=st.text(max_size=20),
)
#: Lines as they are after crashes: records, pieces of them, and anything else.
LINES = st.one_of(
    RECORDS.map(lambda record: line(record).encode("utf-8", "replace")[:-1]),
    st.tuples(RECORDS, st.integers(0, 60)).map(lambda pair: line(pair[0]).encode("utf-8", "replace")[:-1][: pair[1]]),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
)


def stamped(second, name="core", level=logging.INFO, text="x"):
    return line(LogRecord(1_700_000_000 + second, level, name, str(text))).encode()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(log_file, "_BLOCK", 100)
    monkeypatch.setattr(log_file, "_BLOCKS", 2)


@pytest.fixture
def opened():
    """Function that opens the log's files and closes them at the end of the test."""
    files = []

    def open_files(path, **options):
        files.append(LogFiles(path, **options))
        return files[-1]

    yield open_files
    for one in files:
        one.close()


@given(RECORDS)
def test_a_record_is_one_line_and_is_read_back(record):
    text = line(record)
    assert len(text.splitlines()) == 1
    found = parse(text.encode()[:-1])
    assert found is not None
    assert line(found) == text
    assert (found.level, found.component, found.text) == (
        record.level,
        component(record.component),
        printable(record.text),
    )
    assert math.isnan(found.time) or abs(found.time - record.time) <= max(1e-6, math.ulp(record.time))


@given(st.binary(max_size=60) | LINES)
def test_any_line_is_a_record_or_none(data):
    found = parse(data)
    assert found is None or line(found).encode("utf-8", "replace")[:-1] == data or b"\\" in data or not data.isascii()


def reference(lines: list[bytes], wanted: Wanted) -> Iterator[tuple[int, bytes]]:
    """Select lines one by one, without skipping."""
    wanted._skip = None
    for text in lines:
        for start, end, time in wanted.select(text + b"\n"):
            assert (start, end) == (0, len(text))
            yield time, text


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "level": st.sampled_from([10, 15, 20, 30, 50]),
        "components": st.lists(NAMES, max_size=2),
        "since": st.floats(0, 2e9),
        "until": st.floats(0, 2e9),
    },
)


@given(st.lists(LINES, max_size=30), FILTERS)
def test_skipped_lines_are_those_that_are_not_selected(lines, filters):
    data = b"".join(text + b"\n" for text in lines)
    found = [(time, data[start:end]) for start, end, time in Wanted(**filters).select(data)]
    assert found == list(reference(lines, Wanted(**filters)))


@given(
    st.lists(LINES, max_size=40), st.lists(st.integers(0, 40), max_size=3), FILTERS, st.integers(0, 40), st.booleans()
)
def test_files_in_the_order_of_times(tmp_path_factory, lines, cuts, filters, number, unfinished):
    folder = tmp_path_factory.mktemp("log")
    places = sorted({0, *(cut for cut in cuts if cut < len(lines)), len(lines)})
    pieces = [lines[start:end] for start, end in pairwise(places)] or [[]]
    for index, piece in enumerate(reversed(pieces)):
        data = b"".join(text + b"\n" for text in piece)
        (folder / f"log.txt.{index}".removesuffix(".0")).write_bytes(data[:-1] if unfinished else data)
    # A line without any byte at the end of an unfinished file cannot be told from no line.
    expected = [text for piece in pieces for text in (piece[:-1] if unfinished and piece and not piece[-1] else piece)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_file, "_BLOCK", 64)
        patch.setattr(log_file, "_CLOCK_AHEAD", math.inf)
        files = LogFiles(folder / "log.txt")
        found = list(files.in_order(Wanted(**filters)))
        last = files.last(number, Wanted(**filters))
        files.close()
    selected = list(reference(expected, Wanted(**filters)))
    assert found == [text for _, text in sorted(selected, key=lambda pair: pair[0])]
    tail = list(selected)[max(0, len(selected) - number) :]
    if not {"since", "until"} & filters.keys():  # a line without time may be selected, because it begins a block
        assert sorted(text for _, text in last) == sorted(text for _, text in tail)
    assert [time for time, _ in last] == sorted(time for time, _ in last)


def test_records_of_a_late_starter_come_at_their_times(tmp_path, small_blocks, opened):
    lines = [stamped(second, text="y" * (second % 90)) for second in range(200)]
    late = [stamped(second + 0.5, "late", logging.WARNING) for second in range(0, 100, 7)]
    (tmp_path / "log.txt.1").write_bytes(b"".join(lines[:90]))
    (tmp_path / "log.txt").write_bytes(b"".join(lines[90:150] + late + lines[150:]))
    expected = [text[:-1] for text in sorted(lines + late)]
    files = opened(tmp_path / "log.txt")
    assert list(files.in_order(Wanted())) == expected
    assert list(files.in_order(Wanted(level=logging.WARNING))) == [text[:-1] for text in late]
    assert list(files.in_order(Wanted(since=1_700_000_099))) == expected[-101:]
    assert [text for _, text in files.last(60, Wanted())] == [text[:-1] for text in sorted(late[-10:] + lines[150:])]


def test_a_line_without_form_follows_its_predecessor(tmp_path, opened):
    pieces = [b"torn\n", stamped(5), stamped(9)[:35] + b"\n", b"\xff\x00\n", stamped(3), b"\n", stamped(7)]
    (tmp_path / "log.txt").write_bytes(b"".join(pieces))
    files = opened(tmp_path / "log.txt")
    order = [pieces[index][:-1] for index in (0, 4, 5, 1, 2, 3, 6)]
    assert list(files.in_order(Wanted())) == order
    assert [text for _, text in files.last(100, Wanted())] == order
    shown = list(files.in_order(Wanted(level=logging.ERROR)))
    assert shown == [b"torn", b"", pieces[2][:-1], b"\xff\x00"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"log\.txt: no such file"):
        LogFiles(tmp_path / "log.txt")
    with pytest.raises(FileError, match="No such file or directory"):
        LogFiles(tmp_path / "none" / "log.txt")
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(FileError, match="not a regular file"):
        LogFiles(tmp_path / "log.txt")


def test_a_long_line_is_cut_and_none_is_lost(tmp_path, small_blocks, opened, monkeypatch):
    monkeypatch.setattr(log_file, "_LONGEST", 300)
    content = stamped(1) + b"z" * 5000 + b"\n" + stamped(2)
    (tmp_path / "log.txt").write_bytes(content)
    files = opened(tmp_path / "log.txt")
    assert b"".join(files.in_order(Wanted())) == content.replace(b"\n", b"")
    assert sum(len(text) for _, text in files.last(1000, Wanted())) == len(content) - 3


def follow(follower):
    return b"".join(follower.read())


@pytest.fixture
def followed(tmp_path):
    """A log with one line, and a follower that begins after it."""
    (tmp_path / "log.txt").write_bytes(stamped(0) + stamped(1)[:10])
    files = LogFiles(tmp_path / "log.txt", growing=True)
    follower = files.follow(tmp_path / "log.txt")
    files.close()
    yield tmp_path / "log.txt", follower
    follower.close()


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


def rotate(path, older=4):
    for number in range(older, 0, -1):
        source = path.with_name(f"{path.name}.{number - 1}".removesuffix(".0"))
        if source.exists():
            source.replace(path.with_name(f"{path.name}.{number}"))


def test_following_across_rotations(followed):
    path, follower = followed
    assert follow(follower) == b""
    append(path, stamped(1)[10:] + stamped(2))
    assert follow(follower) == stamped(1) + stamped(2)
    append(path, stamped(3))
    rotate(path)
    assert follow(follower) == stamped(3)  # there is no new file yet
    append(path, stamped(4))
    rotate(path)
    append(path, stamped(5))
    rotate(path)
    append(path, stamped(6)[:20])
    assert follow(follower) == stamped(4) + stamped(5)
    append(path, stamped(6)[20:])
    assert follow(follower) == stamped(6)
    assert not follower.missed


def test_following_more_rotations_than_files_are_kept(followed):
    path, follower = followed
    append(path, stamped(1)[10:])
    for second in range(2, 9):
        rotate(path, 2)
        append(path, stamped(second))
    assert follow(follower) == stamped(1) + stamped(6) + stamped(7) + stamped(8)
    assert follower.missed


def test_following_a_file_that_is_removed_or_emptied(followed):
    path, follower = followed
    append(path.with_name("log.txt.1"), stamped(-1))  # read before
    os.utime(path.with_name("log.txt.1"), (1, 1))
    append(path, stamped(1)[10:])
    path.unlink()
    assert follow(follower) == stamped(1)
    assert follow(follower) == b""
    append(path, stamped(2))
    assert follow(follower) == stamped(2)
    os.truncate(path, 0)
    append(path, b"new\n")
    assert follow(follower) == b"new\n"
    assert not follower.missed


def test_following_before_there_is_a_file(tmp_path):
    follower = Follower(tmp_path / "log.txt")
    assert follow(follower) == b""
    append(tmp_path / "log.txt", stamped(1))
    assert follow(follower) == stamped(1)
    follower.close()


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 0.3)), max_size=30))
def test_followed_lines_wait_for_earlier_ones(arrivals):
    merger, now, shown, arrived = Merger(), 0.0, [], []
    for number, (time, pause) in enumerate(arrivals):
        merger.add(time, b"%d" % number, now)
        arrived.append((now, time))
        shown += merger.take(now, 1e12)
        now += pause
    shown += merger.take(now + 2 * HOLD, 1e12)
    assert sorted(int(text) for text, _ in shown) == list(range(len(arrivals)))
    highest = -1
    for text, late in shown:
        time = arrivals[int(text)][0]
        assert late == (time < highest)
        waited = [own for before, own in arrived if arrived[int(text)][0] - before > HOLD - 1e-6]
        assert not late or time < max(waited, default=-1)
        highest = max(highest, time)


def test_lines_after_one_from_the_future_are_not_late():
    merger = Merger()
    merger.add(99_000_000, b"ahead", 0.0)
    assert list(merger.take(HOLD, 50.0)) == [(b"ahead", False)]
    merger.add(51_000_000, b"in time", 1.0)
    merger.add(20_000_000, b"late", 1.1)
    assert list(merger.take(1.0 + HOLD, 52.0)) == [(b"late", True), (b"in time", False)]
