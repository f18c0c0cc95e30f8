"""All processes together: from bytes of boards to a verified file with all sent words."""

import contextlib
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from emulated_board import Emulator
from processes import LIMIT, until, wait_for_line
from recorded_data import shared_data
from system import System, rows_of

from larpixdaq import schema
from larpixdaq._native import board_emulator, decoders, word_codec
from larpixdaq.hdf5.verify import verify
from larpixdaq.runtime import launcher
from larpixdaq.schema import Asic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def check(ended: dict, condition: str = "COMPLETE") -> np.ndarray:
    """Check that the run's only file is good and complete. Returns its rows without INFO rows."""
    assert ended["condition"] == condition, ended
    (path,) = ended["files"]
    report = verify(Path(path))
    assert report.ok, report.findings
    rows = rows_of(path)
    assert len(rows) == ended["rows"] == ended["stored"]
    kinds = rows["packet_type"]
    info = np.flatnonzero(kinds == 5)
    assert (rows["counter"][info] == np.arange(len(info))).all()
    with h5py.File(path, "r") as file:
        texts = [text.decode() for text in file["messages"]["message"]]
    assert texts == ["Beginning run", "Ending run"]
    return rows[kinds != 5]


def test_demo(tmp_path: Path) -> None:
    """A run in one command: the emulated board's own counts equal those of the file."""
    options = ["demo", "--seconds", "1", "--rate", "200000", "-o", str(tmp_path), "--json"]
    done = subprocess.run(launcher.command("cli", *options), capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr.decode()
    outcome = json.loads(done.stdout)
    assert outcome["ok"]
    assert outcome["lost"] == 0
    assert outcome["condition"] == "COMPLETE"
    assert {g: c["sent"] for g, c in outcome["io_groups"].items()} == {"1": 100_000, "2": 100_000}
    (path,) = outcome["files"]
    assert verify(Path(path)).ok
    reads_with_larpix_control(path, rows_of(path)[:2000])


READER = """
import sys, zlib, h5py
file, seen, crc = h5py.File(sys.argv[1], "r", swmr=True, locking=False), 0, 0
packets = file["packets"]
for line in sys.stdin:  # one look a line
    packets.refresh()
    rows = packets[seen:]
    seen, crc = seen + len(rows), zlib.crc32(rows.tobytes(), crc)
    print(seen, crc, flush=True)
"""


def test_plain_h5py_reads_a_growing_file(line: System) -> None:
    """Another process without larpixdaq reads the file during the run: its rows stay, and the writer continues."""
    operator = line.start("--fake", "300000")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    (part,) = line.data.glob("*.h5.part")
    command = [sys.executable, "-c", READER, str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as reader:
        assert reader.stdin is not None
        looks: list[tuple[int, int]] = []

        def grown() -> bool:
            assert reader.stdin is not None
            reader.stdin.write(b"look\n")
            seen, crc = map(int, wait_for_line(reader).split())
            looks.append((seen, crc))
            return seen > 1_000_000

        until(grown, "a million rows in the reader")
        ended = operator.end_run().result(2 * LIMIT)
        reader.stdin.close()
        assert reader.wait(LIMIT) == 0
    assert len({seen for seen, _ in looks}) > 1  # it has read several times during the run
    check(ended)
    rows = rows_of(ended["files"][0])
    for seen, crc in looks:
        assert zlib.crc32(rows[:seen].tobytes()) == crc


def test_the_monitor_has_the_numbers_of_the_file(line: System) -> None:
    # So slow that the monitor sees all rows also on a busy machine.
    options = ["--io-groups", "2", "--rate", "10000", "--count", "20000", "--pps", "--lossless"]
    options += ["--stay", "--wait-for-go"]
    with contextlib.closing(Emulator(*options)) as board:
        operator = line.start("--pacman", *board.addresses)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        board.go()

        def words() -> int:
            kinds = operator.summary().result(LIMIT)["rows_by_type"]
            return sum(kinds[kind] for kind in ("data", "sync", "trigger"))

        until(lambda: words() == 40_000, "all words in the monitor")
        ended = operator.end_run().result(2 * LIMIT)
    summary, found = operator.summary().result(LIMIT), operator.pixel_map("packets").result(LIMIT)
    rows = rows_of(ended["files"][0])
    data = rows[(rows["packet_type"] == 0) & (rows["direction"] == 1)]
    assert summary["seen"] == 1.0
    assert summary["rows_by_type"]["data"] == len(data)
    assert {kind["io_group"]: kind["rows"] for kind in summary["sync"]} == {
        io_group: np.count_nonzero(rows[rows["packet_type"] == 6]["io_group"] == io_group) for io_group in (1, 2)
    }
    assert [kind["ticks"] for kind in summary["sync"]] == [10_000_000, 10_000_000]
    keys = data[["io_group", "io_channel", "chip_id"]]
    assert np.array_equal(np.sort(found["chips"]), np.unique(keys))
    channels = np.unique(data[["io_group", "io_channel", "chip_id", "channel_id"]])
    assert np.count_nonzero(found["values"]) == len(channels)
    at = int(np.argmax(found["values"].max(axis=1)))
    chip, channel = found["chips"][at].tolist(), int(found["values"][at].argmax())
    here = data[(keys == found["chips"][at]) & (data["channel_id"] == channel)]
    pixel = operator.pixel(*chip, channel).result(LIMIT)
    assert pixel["seen_packets"] == len(here)
    assert pixel["mean_adc"] == pytest.approx(here["dataword"][here["valid_parity"] == 1].mean())


@pytest.mark.parametrize("option", ["--io-groups 0", "--io-groups 300", "--seconds nan", "--rate 0", "--rate x"])
def test_demo_reports_invalid_options_in_one_line(option: str, tmp_path: Path) -> None:
    command = launcher.command("cli", "demo", *option.split(), "-o", str(tmp_path))
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith(f"larpixdaq demo: error: argument {option.split()[0]}: ")


def reads_with_larpix_control(path: str, rows: np.ndarray) -> None:
    """Check that larpix-control reads the file, with the same words as in its rows."""
    from larpix import Packet_v2
    from larpix.format import hdf5format

    found = hdf5format.from_file(path, end=len(rows))["packets"]
    assert len(found) == len(rows)
    rows = rows[rows["packet_type"] <= 3]
    words = [packet for packet in found if isinstance(packet, Packet_v2)]
    assert b"".join(packet.bytes() for packet in words) == word_codec.encode(rows, asic=Asic.V2).tobytes()
    assert [(packet.io_group, packet.io_channel) for packet in words] == rows[["io_group", "io_channel"]].tolist()


def test_recorded_messages_become_identical_rows(line: System) -> None:
    """All columns of 1,200 recorded PACMAN messages are as larpix-control decodes them."""
    from larpix.format import hdf5format, pacman_msg_format

    log = shared_data("pacman_2020_messages.bin")
    operator = line.start("--replay", log, "--speed", "max")
    operator.prepare_run(comment="replay").result(LIMIT)
    operator.begin_run().result(LIMIT)
    line.await_status(operator, "producer", "finished", True)
    ended = operator.end_run().result(LIMIT)
    rows = check(ended)
    (path,) = ended["files"]
    reads_with_larpix_control(path, rows_of(path))
    data, expected, start = log.read_bytes(), [], 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "little")
        expected += pacman_msg_format.parse(data[start + 4 : start + 4 + size], io_group=1)
        start += 4 + size
    other = line.folder / "larpix-control.h5"
    hdf5format.to_file(str(other), packet_list=expected, version="2.4", workers=1)
    reference = rows_of(other)
    assert len(rows) == len(reference)
    for name in reference.dtype.names:
        if name == "direction":  # larpix-control's parse() leaves it 0; here it is 1 in received words
            assert (rows["direction"] == (rows["packet_type"] != 4)).all()
        elif name == "io_group":  # larpix-control loses it where a message begins
            assert (rows["io_group"] == 1).all()
        else:
            assert (rows[name] == reference[name]).all(), name


def test_serial_line_with_garbage_between_frames(line: System) -> None:
    """A serial board with garbage between frames: every whole frame is in the file, and every other byte counted."""
    master, slave = os.openpty()
    try:
        operator = line.start("--serial", os.ttyname(slave), "--asic", "2")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        sent = packet_words(3000)
        garbage = 0
        for i in range(0, len(sent), 100):
            os.write(master, decoders.encode_serial(sent[i : i + 100]))
            garbage += os.write(master, b"\x00\x01\x02garbage"[: i % 11])
        line.await_status(operator, "producer", "packets", len(sent))
        ended = operator.end_run().result(LIMIT)
        rows = check(ended, "COMPLETE, suspect")
        assert [re.sub(r"\d+", "#", reason.rpartition(": ")[2]) for reason in ended["reasons"]] == [
            "# bytes outside of frames"
        ]
    finally:
        os.close(master)
        os.close(slave)
    words = rows[rows["packet_type"] <= 3]
    assert (word_codec.encode(words, asic=Asic.V2) == sent).all()
    assert (rows["packet_type"] == 4).any()  # the host's seconds
    (path,) = ended["files"]
    reads_with_larpix_control(path, rows_of(path))
    with h5py.File(path, "r") as file:
        counts = {row["io_group"]: row for row in file["ledger/counts"][:]}
    assert counts[1]["messages"] == len(sent)
    assert counts[1]["resync_bytes"] + counts[1]["pending_after"] == garbage


def packet_words(n: int) -> np.ndarray:
    words = np.zeros(n, np.uint64)
    board_emulator.PacmanBoard(Asic.V2, rate=1e5, seed=3).packets(words)
    return words


@pytest.mark.parametrize(("asic", "code"), [("1", 1), ("3", 4)])
def test_other_chips_have_their_layouts(line: System, asic: str, code: int) -> None:
    operator = line.start("--fake", "20000", "--io-groups", "2", "--asic", asic)
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > 5000, "5000 packets")
    ended = operator.end_run().result(LIMIT)
    assert ended["condition"] == "COMPLETE"
    (path,) = ended["files"]
    assert verify(Path(path)).ok
    rows = rows_of(path)
    assert rows.dtype == schema.layout(code).dtype
    assert len(rows) == ended["rows"]


def test_consecutive_runs_never_reuse_a_number(line: System) -> None:
    operator = line.start("--fake", "20000")
    numbers = []
    for _ in range(3):
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        until(lambda: line.status_of(operator, "producer").get("packets", 0) > 500, "500 packets")
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        numbers.append(ended["run"])
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    operator.prepare_run().result(LIMIT)
    ended = operator.abort_run().result(LIMIT)
    assert ended["condition"] == "ABORTED"
    assert ended["run"] == numbers[-1] + 1
    for path in ended["files"]:
        assert verify(Path(path)).ok


def test_packets_outside_of_runs_are_in_the_next_ledger(line: System) -> None:
    operator = line.start("--fake", "50000")
    until(lambda: line.status_of(operator, "producer").get("outside_run", 0) > 1000, "packets outside of a run")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    ended = operator.end_run().result(LIMIT)
    with h5py.File(ended["files"][0], "r") as file:
        outside = file["ledger/outside"][:]
    until(lambda: line.status_of(operator, "producer").get("counted_run") == ended["run"], "the counts of the run")
    assert operator.run_info().result(LIMIT)["kind"] == "test"  # a fake board
    assert outside["packets"].sum() > 1000
