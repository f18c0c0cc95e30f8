"""Raw files: larpix-control reads in them the messages that the boards sent, byte for byte; each word is there once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from decoder_harness import data_word, legacy, message_1_0, run_messages
from example_counts import examples
from file_builder import ASIC, CLOCK64, NS, V1, V2, V3, Feed, random_rows, run_info, timed, words_to_rows, write
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix.format import rawhdf5format
from larpix_control import hdf5format, pacman_msg_format
from processes import LIMIT
from recorded_data import shared_data

from larpixdaq._native import decoders
from larpixdaq.cli import main
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import raw_file
from larpixdaq.hdf5.raw_file import make_raw, read_raw, verify_raw
from larpixdaq.hdf5.reader import count_words
from larpixdaq.hdf5.verify import verify_all
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import Gap
from larpixdaq.schema import RowLayout

SECONDS = 1_700_000_000
Sent = list[tuple[int, bytes]]  # io_group and message


class Recorder:
    """Writes the messages of boards into a part as a producer's blocks, cut anywhere."""

    def __init__(
        self, directory: Path, layout: RowLayout = V2, part: int = 0, feed: Feed | None = None, **options: Any
    ):
        self.layout = layout
        self.feed = feed or Feed(layout=layout)
        self.file = RunFile(directory, run_info(layout), part, {self.feed.origin: self.feed.sequence})
        self.options = options

    def rows(self, sent: Sent) -> np.ndarray:
        made = [np.zeros(0, self.layout.dtype)]
        for io_group, message in sent:
            decoder = decoders.PacmanDecoder(io_group, ASIC[self.layout], **self.options)
            made.append(run_messages(decoder, [message], self.layout.dtype)[0])
        return np.concatenate(made)

    def put(self, rows: np.ndarray, cuts: Sequence[int] = ()) -> None:
        for piece in np.split(rows, sorted(set(cuts))):
            if len(piece):
                self.file.add(*self.feed.block(piece))

    def close(self, **how: Any) -> Path:
        self.file.end(self.feed.end())
        return self.file.close(**how).path


def theirs(path: Path) -> Sent:
    """Return the messages of a raw file, as larpix-control reads them."""
    found = rawhdf5format.from_rawfile(str(path), io_version=None)
    assert found["version"] == "0.0"
    assert rawhdf5format.len_rawfile(str(path)) == len(found["msgs"])
    return list(zip(found["msg_headers"]["io_groups"], found["msgs"], strict=True))


def ledger(path: Path) -> list[tuple[int, ...]]:
    with read_raw(path) as raw:
        return [tuple(int(row[name]) for name in row.dtype.names[2:]) for row in raw.ledger]


def convert(packets: Path) -> Path:
    """Make the raw file, and verify it with its packet file and alone."""
    report = make_raw(packets)
    assert report.made
    found = theirs(report.path)
    assert (report.messages, report.bytes) == (len(found), sum(len(message) for _, message in found))
    assert report.words == sum(count_words(packets).values())
    words, findings, (note,) = verify_raw(report.path)
    assert (words, findings) == (report.words, [])
    assert note == f"{report.messages} messages with {words} words, from {packets.name}"
    alone = packets.parent / "alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(report.path, alone)
    assert verify_raw(alone / report.path.name)[:2] == (words, [])
    assert {path.suffix for path in packets.parent.iterdir()} <= {".h5", ""}
    return report.path


class Kind(NamedTuple):
    layout: RowLayout
    clock64: bool
    header: str  # larpix-control's io_version

    def message(self, draw: st.DrawFn) -> bytes:
        word = st.integers(0, 2**64 - 1).map(lambda value: value | (self.layout is V3))
        ticks = st.integers(0, 2**32 - 1)
        words = []
        # The rows of a v3 board without a data word do not say that its clock has 32 bits.
        letters = ["D"] if self.layout is V3 and self.header == "0.0" else []
        for letter in letters + draw(st.lists(st.sampled_from("DDDDST"), max_size=6)):
            if self.header == "1.0":
                time = draw(st.integers(2**32, 2**64 - 1))
                if letter == "D":
                    words.append(struct.pack("<cBH4xQQ", b"D", 0, draw(st.integers(0, 255)), time, draw(word)))
                else:
                    status = draw(ticks) if letter == "S" else 0
                    detail, source = draw(st.integers(0, 255)), draw(st.integers(0, 255))
                    words.append(struct.pack("<cBBB4xQI4x", letter.encode(), 0, detail, source, time, status))
            elif self.clock64:
                time = draw(st.integers(2**48, 2**64 - 1)) & ~0xFFFF
                if letter == "D":
                    words.append(bytes([ord("D"), draw(st.integers(0, 255))]) + struct.pack("<Q", time)[2:]
                                 + struct.pack("<Q", draw(word)))  # fmt: skip
                else:
                    source = draw(st.integers(0, 1)) if letter == "S" else 0
                    words.append(struct.pack("<cBB5xQ", letter.encode(), draw(st.integers(0, 255)), source, time))
            elif letter == "D":
                words.append(data_word(draw(word), draw(st.integers(0, 255)), draw(ticks) | 1))
            else:
                source = draw(st.integers(0, 1)) if letter == "S" else 0
                words.append(struct.pack("<cBBxI8x", letter.encode(), draw(st.integers(0, 255)), source, draw(ticks)))
        if self.header == "1.0":
            made = message_1_0(words, draw(st.integers(0, 2**32 - 1)) * 10**9)
            return made[:1] + b"\0" + made[2:]  # the number of the board, of which there is no column
        return legacy(words, draw(st.integers(0, 2**32 - 1)))


KINDS = {
    "legacy": Kind(V2, False, "0.0"),
    "64-bit clock": Kind(CLOCK64, True, "0.0"),
    "v3": Kind(V3, False, "0.0"),
    "format 1.0": Kind(CLOCK64, False, "1.0"),
    "v3, format 1.0": Kind(V3, False, "1.0"),
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=examples(10))
@given(data=st.data())
def test_messages_of_boards_come_back_byte_for_byte(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the blocks, between INFO messages and words that were sent, and in the order of the file."""
    kind = KINDS[name]
    folder = tmp_path_factory.mktemp("raw")
    recorder = Recorder(folder, kind.layout, clock64=kind.clock64)
    sent: Sent = []
    for _ in range(data.draw(st.integers(1, 3))):
        piece = [(data.draw(st.integers(1, 3)), kind.message(data.draw)) for _ in range(data.draw(st.integers(0, 6)))]
        sent += piece
        rows = recorder.rows(piece)
        recorder.put(rows, data.draw(st.lists(st.integers(0, max(1, len(rows))), max_size=4)))
        recorder.file.add(*recorder.feed.info("text of a routine"))
        recorder.put(words_to_rows(np.array([2, 3], np.uint64), kind.layout, 1, direction=0))
    path = convert(recorder.close())
    any_word = any(len(message) > 24 for _, message in sent)
    if any_word or kind.header == "0.0":  # messages without words do not say that they have format 1.0
        assert theirs(path) == sent
    with h5py.File(path) as file:
        meta = dict(file["meta"].attrs)
    assert meta["io_version"] == kind.header or not any_word
    assert (meta["run"], meta["subrun"], meta["data_stream"]) == (42, 420001, "test")
    assert all(row[-2:] == (0, 0) for row in ledger(path))
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", [V1, V2, CLOCK64, V3])
def test_every_word_of_random_rows_is_there(layout: RowLayout, tmp_path: Path) -> None:
    """Most of these words have no header before them. Every bit of a word is there, also where its parity is wrong."""
    feed = Feed(layout=layout)
    report, rows = write(tmp_path, feed, [3, 500, 16384, 7, 60_000])
    path = convert(report.path)
    groups = rows["io_group"] if layout is not V1 else np.array([int(key[:1] or 0) for key in rows["chip_key"]])
    kinds = rows["type" if layout is V1 else "packet_type"]
    received = (kinds < 4) & (rows["direction"] == 1) | (kinds == 6) | (kinds == 7)
    for number, (io_group, messages, words, _, divided, made) in enumerate(ledger(path)):
        assert io_group == number + 1
        assert words == np.count_nonzero(received & (groups == io_group))
        assert messages == np.count_nonzero((kinds == 4) & (groups == io_group)) + divided + made
        assert made == 1
    for io_group in (1, 2):
        decoder = decoders.PacmanDecoder(io_group, ASIC[layout])
        messages = [message for group, message in theirs(path) if group == io_group]
        again, _ = run_messages(decoder, messages, layout.dtype)
        words = again[again["type" if layout is V1 else "packet_type"] != 4]
        expected = rows[received & (groups == io_group)]
        if layout is CLOCK64:
            assert (words["receipt_timestamp"] == expected["receipt_timestamp"]).all()
        assert (words == expected).all()


def test_words_after_a_gap_do_not_join_the_message_before(tmp_path: Path) -> None:
    """Neither when rows were dropped nor when a block is missing: they get the time of their block."""
    recorder = Recorder(tmp_path)
    first = recorder.rows([(1, legacy([data_word(word, 2, word) for word in (1, 2, 3)], SECONDS))])
    last = recorder.rows([(1, legacy([data_word(9)], SECONDS + 9))])
    recorder.put(first[:2])
    gap = Gap(1, 5, NS, NS)
    recorder.file.add(*timed(*recorder.feed.block(first[2:3], gaps=[gap]), 7, 8))
    recorder.feed.block(first[:1])  # it never comes
    recorder.file.add(*timed(*recorder.feed.block(first[3:]), 10, 11))
    recorder.put(last)
    path = convert(recorder.close())
    seconds = NS // 10**9
    assert theirs(path) == [
        (1, legacy([data_word(1, 2, 1)], SECONDS)),
        (1, legacy([data_word(2, 2, 2)], seconds + 7)),
        (1, legacy([data_word(3, 2, 3)], seconds + 10)),
        (1, legacy([data_word(9)], SECONDS + 9)),
    ]
    assert ledger(path) == [(1, 4, 4, 4 * 24, 0, 2)]


def test_a_rotation_divides_a_message(tmp_path: Path) -> None:
    before = Recorder(tmp_path)
    message = legacy([data_word(word) for word in (1, 2, 3, 4)], SECONDS)
    rows = before.rows([(5, message)])
    before.put(rows[:3])
    first = before.file.close(continued=True).path
    after = Recorder(tmp_path, part=1, feed=before.feed)
    after.put(rows[3:])
    second = after.close()
    assert theirs(convert(first)) == [(5, legacy([data_word(1), data_word(2)], SECONDS))]
    path = convert(second)
    assert theirs(path) == [(5, legacy([data_word(3), data_word(4)], NS // 10**9))]
    assert ledger(path) == [(5, 1, 2, 40, 0, 1)]
    with h5py.File(path) as file:
        assert file["meta"].attrs["subrun"] == 420002


def test_messages_of_two_producers_whose_blocks_alternate(tmp_path: Path) -> None:
    recorder, other = Recorder(tmp_path), Feed(producer="second", epoch=8)
    one = legacy([data_word(word) for word in range(6)], SECONDS)
    two = legacy([data_word(word) for word in range(90, 96)], SECONDS + 1)
    for mine, others in zip(recorder.rows([(1, one)]), recorder.rows([(2, two)]), strict=True):
        recorder.put(mine.reshape(1))
        recorder.file.add(*other.block(others.reshape(1)))
    recorder.file.end(other.end())
    path = convert(recorder.close())
    assert theirs(path) == [(1, one), (2, two)]
    assert ledger(path) == [(1, 1, 6, 104, 0, 0), (2, 1, 6, 104, 0, 0)]


def test_io_groups_whose_words_alternate_in_one_block(tmp_path: Path) -> None:
    """A replay in a full ring can put rows of another board into a message."""
    recorder = Recorder(tmp_path)
    one, two = (recorder.rows([(group, legacy([data_word(group)] * 2, SECONDS + group))]) for group in (1, 2))
    recorder.put(np.concatenate((one[:2], two, one[2:])))
    path = convert(recorder.close())
    divided = legacy([data_word(1)], SECONDS + 1)
    assert theirs(path) == [(1, divided), (2, legacy([data_word(2)] * 2, SECONDS + 2)), (1, divided)]
    assert ledger(path) == [(1, 2, 2, 48, 1, 0), (2, 1, 2, 40, 0, 0)]


def test_more_words_than_a_header_can_count(tmp_path: Path) -> None:
    """The rows of a serial board have a header about once a second only."""
    recorder = Recorder(tmp_path)
    header = recorder.rows([(1, legacy([], SECONDS))])
    words = words_to_rows(np.arange(150_000, dtype=np.uint64) << np.uint64(2), V2, 1)
    recorder.put(np.concatenate((header, words)), range(0, 150_000, 16_000))
    path = convert(recorder.close())
    assert [(len(message) - 8) // 16 for _, message in theirs(path)] == [65_535, 65_535, 18_930]
    assert {message[1:5] for _, message in theirs(path)} == {struct.pack("<I", SECONDS)}
    assert ledger(path) == [(1, 3, 150_000, 24 + 16 * 150_000, 2, 0)]


def test_what_rows_do_not_have_is_counted_in_the_ledger(tmp_path: Path) -> None:
    """Unused bytes become 0, words without a row are left out, and wrong counts become right."""
    recorder = Recorder(tmp_path, format="legacy")
    dirty = bytearray(legacy([data_word(1), b"X" * 16, data_word(2)], SECONDS, count=9) + b"rest")
    dirty[5] = dirty[14] = 0xAA
    recorder.put(recorder.rows([(1, bytes(dirty))]))
    path = convert(recorder.close())
    assert theirs(path) == [(1, legacy([data_word(1), data_word(2)], SECONDS))]


def test_recorded_messages(tmp_path: Path) -> None:
    """1,200 messages of a run of 2020, and of two boards of 2023: as recorded, though the rows were packed in between.

    larpix-control's own script makes the rows of it.
    """
    log = shared_data("pacman_2020_messages.bin").read_bytes()
    spans, _ = decoders.split_log(log)
    vectors = json.loads(shared_data("vectors.json").read_text())["tpc12_2023_03_15"]
    recorded = [(1, log[start : start + length]) for start, length in spans.tolist()]
    recorded += list(zip(vectors["io_groups"], map(bytes.fromhex, vectors["msgs"]), strict=True))
    recorder = Recorder(tmp_path)
    rows = recorder.rows(recorded)
    recorder.put(rows, range(0, len(rows), 101))
    packets = recorder.close()
    path = convert(packets)
    assert theirs(path) == recorded
    files = importlib.metadata.files("larpix-control") or []
    (script,) = [file.locate() for file in files if file.name == "convert_rawhdf5_to_hdf5.py"]
    made = tmp_path / "theirs.h5"
    subprocess.run(
        [sys.executable, script, "-i", path, "-o", made, "--block_size", "500"],
        check=True, timeout=LIMIT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with h5py.File(made) as file:
        converted = file["packets"][:]
    rows["direction"] = 0  # larpix-control leaves it 0
    assert (converted == rows).all()


def test_larpix_control_parses_what_it_would_have_recorded(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    words = words_to_rows(rng.integers(0, 1 << 63, 200, dtype=np.uint64), V2, 1)
    recorder = Recorder(tmp_path)
    recorder.put(np.concatenate((recorder.rows([(1, legacy([], SECONDS))]), words)))
    path = convert(recorder.close())
    packets = [packet for group, one in theirs(path) for packet in pacman_msg_format.parse(one, io_group=group)]
    hdf5format.to_file(str(tmp_path / "theirs.h5"), packets, version="2.4", workers=1)
    with h5py.File(tmp_path / "theirs.h5") as file:
        found = file["packets"][1:]
    words["direction"] = 0
    assert (found == words).all()


def test_the_documentation_describes_every_column(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[2] / "docs" / "files.md").read_text().splitlines()
    with h5py.File(convert(part(tmp_path))) as file:
        described = [[text.decode() for text in line] for line in file["ledger/raw"].attrs["columns"]]
        assert [column for column, _, _ in described] == list(file["ledger/raw"].dtype.names)
    assert [f"| `{name}` | {unit} | {meaning} |" in lines for name, unit, meaning in described] == [True] * 8


# Files and processes


def part(directory: Path) -> Path:
    report, _ = write(directory, Feed(), [500])
    return Path(report.path)


def test_a_raw_file_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = part(tmp_path)
    made = make_raw(path)
    again = make_raw(path)
    assert again == made._replace(made=False)
    assert main(["raw", str(tmp_path)]) == 0
    assert "was there already" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))
    os.rename(made.path, tmp_path / "other.raw.h5")
    shutil.copy(tmp_path / "other.raw.h5", made.path)
    with h5py.File(made.path, "r+") as file:
        file["meta"].attrs["packet_file"] = "another.h5"
    with pytest.raises(FileError, match=r"exists, and was made from another\.h5, not from run0000042"):
        make_raw(path)
    made.path.write_bytes(b"something else")
    with pytest.raises(FileError, match="is no raw file"):
        make_raw(path)
    assert made.path.read_bytes() == b"something else"
    assert main(["raw", str(tmp_path)]) == 1


def test_only_finished_packet_files_are_taken(tmp_path: Path) -> None:
    file = RunFile(tmp_path, run_info(run=43))
    with pytest.raises(FileError, match="expected a finished packet file"):
        make_raw(file.path)
    file.abandon()
    path = part(tmp_path)
    raw = make_raw(path).path
    with pytest.raises(FileError, match="expected a finished packet file"):
        make_raw(raw)
    with h5py.File(tmp_path / "foreign.h5", "w") as foreign:
        foreign.create_group("_header").attrs["version"] = "2.4"
        foreign["packets"] = np.zeros(3, V2.dtype)
    with pytest.raises(FileError, match="has no /run, so larpix-daq did not write it"):
        make_raw(tmp_path / "foreign.h5")
    with pytest.raises(FileError, match="there is no such file"):
        make_raw(tmp_path / "absent.h5")


def test_a_killed_process_leaves_no_raw_file_and_the_next_one_makes_it(tmp_path: Path) -> None:
    """While one process makes it, another one waits for it."""
    path = part(tmp_path)
    expected = theirs(make_raw(path).path)
    raw = raw_file.raw_path(path)
    raw.unlink()
    script = """if True:
        import pathlib, sys, time
        from larpixdaq.hdf5 import raw_file
        raw_file.publish_file = lambda *paths: (print("written", flush=True), time.sleep(1000))
        raw_file.make_raw(pathlib.Path(sys.argv[1]))
    """
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        left = raw.with_name(raw.name.replace(".raw.h5", ".raw.part"))
        assert left.exists()
        assert verify_all([tmp_path]).ok
        with ThreadPoolExecutor() as threads:
            second = threads.submit(make_raw, path)
            assert not raw.exists()
            process.send_signal(signal.SIGKILL)
            assert second.result(LIMIT).made
    assert theirs(raw) == expected
    assert set(tmp_path.iterdir()) == {path, raw}
    for _ in range(examples(20)):
        raw.unlink()
        with ThreadPoolExecutor() as threads:
            made = [report.made for report in threads.map(make_raw, [path] * 3)]
        assert sorted(made) == [False, False, True]
        assert set(tmp_path.iterdir()) == {path, raw}
    assert theirs(raw) == expected


def test_a_full_disk_keeps_room_for_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = part(tmp_path)

    class Full:
        f_bavail, f_frsize = 1000, 4096

    monkeypatch.setattr(raw_file.os, "statvfs", lambda directory: Full)
    with pytest.raises(FileError, match="has 3 MiB left, a raw file leaves at least 256 MiB"):
        make_raw(path)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_no_message_can_have_are_refused(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(1), 100)
    rows["channel_id"][50] = 77
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(rows))
    file.end(feed.end())
    with pytest.raises(FileError, match=r"rows of io_group \d that no board message can have made"):
        make_raw(file.close().path)
    assert len(list(tmp_path.iterdir())) == 1


def test_verify_finds_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = part(tmp_path)
    raw = make_raw(path).path
    assert verify_all([tmp_path]).ok
    assert main(["verify", str(tmp_path)]) == 0
    words = sum(count_words(path).values())
    assert f"{raw}: good, {words} words" in capsys.readouterr().out
    assert main(["info", str(path)]) == 0
    assert f"{raw.name}: " in capsys.readouterr().out
    with h5py.File(raw, "r+") as file:
        message = file["msgs"][3]
        message[-1] ^= 1
        file["msgs"][3] = message
    assert verify_raw(raw)[1] == [f"message 3 is not that of {path.name}"]
    with h5py.File(raw, "r+") as file:
        message[-1] ^= 1
        file["msgs"][3] = message
        file["msg_headers"][2] = (9,)
    assert verify_raw(raw)[1] == [f"message 2 is not that of {path.name}"]
    with h5py.File(raw, "r+") as file:
        count = len(file["msgs"])
        for name in ("msgs", "msg_headers"):
            file[name].resize((count - 1,))
    assert not verify_all([raw]).ok
    path.unlink()
    (line,) = [line for line in verify_raw(raw)[1] if line.startswith("io_group 9")]
    assert line.startswith("io_group 9: messages, words, bytes [1, ")
    raw.write_bytes(raw.read_bytes()[: raw.stat().st_size // 2])
    assert not verify_all([raw]).ok


@pytest.mark.parametrize("name", ["", "..", "/etc/passwd", "../a.h5", np.bytes_(b"a.h5"), 7])
def test_a_raw_file_names_only_a_file_beside_it(name: Any, tmp_path: Path) -> None:
    raw = make_raw(part(tmp_path)).path
    with h5py.File(raw, "r+") as file:
        file["meta"].attrs["packet_file"] = name
    (report,) = verify_all([raw]).files
    assert "expected the name of a file" in report.findings[0]


def test_damaged_raw_files_are_one_line(tmp_path: Path) -> None:
    raw = make_raw(part(tmp_path)).path
    good = raw.read_bytes()
    dice = np.random.default_rng(1)
    for _ in range(examples(20)):
        bad = bytearray(good)
        bad[int(dice.integers(len(bad)))] = int(dice.integers(256))
        raw.write_bytes(bad)
        (report,) = verify_all([raw]).files
        assert all("\n" not in line for line in report.findings + report.notes)


def test_short_messages_of_boards_that_alternate(tmp_path: Path) -> None:
    """Their order is that of the packet file, over many pieces of it."""
    recorder = Recorder(tmp_path)
    count = 100_000
    rows = np.zeros(2 * count, V2.dtype)
    rows["packet_type"][::2], rows["timestamp"][::2] = 4, SECONDS
    rows[1::2] = words_to_rows(np.arange(count, dtype=np.uint64) << np.uint64(2), V2, 1)
    groups = rows["io_group"] = 1 + np.arange(2 * count) // 2 % 3
    recorder.put(rows, range(0, 2 * count, 16_000))
    path = convert(recorder.close())
    found = theirs(path)
    assert [group for group, _ in found] == groups[::2].tolist()
    assert [int.from_bytes(message[16:], "little") >> 2 for _, message in found] == list(range(count))
