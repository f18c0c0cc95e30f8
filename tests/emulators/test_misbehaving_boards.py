"""Emulated boards with faults on request, on real sockets: the verdicts agree with the emulator's counts."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from emulated_board import Emulator, emulator
from processes import LIMIT, until
from source_driver import Driver
from system import System, rows_of, system

from larpixdaq.hdf5.verify import verify
from larpixdaq.protocol.stream import LossVerdict
from larpixdaq.sources.data_quality import FINDINGS
from larpixdaq.sources.pacman import PacmanSource

RATE = 20_000
WORDS = 40_000


def read(board: Emulator) -> tuple[dict[str, int], Driver, list[LossVerdict]]:
    """Return the board's own counts, the source that has read all words, and the verdicts."""
    source = PacmanSource(1, "127.0.0.1", board.ready["1"]["data"])
    source.open()
    try:
        driver = Driver(source)
        driver.until(board.ended, "the board's last word")
        counts = board.summary["sent"]["1"]
        driver.until(lambda: driver.count("words_in") == counts["words"], "all words")
        return counts, driver, source.evidence(time.time_ns())
    finally:
        source.close()


def board(*options: str) -> Any:
    return emulator(
        "--count", str(WORDS), "--rate", str(RATE), "--words-per-message", "20", "--lossless", "--stay", *options
    )


def of(kind: str, found: list[LossVerdict]) -> LossVerdict:
    pattern = re.escape(FINDINGS[kind].text).replace(r"\{events\}", r"\d+").replace(r"\{amount\}", r"\d+")
    (verdict,) = [line for line in found if re.fullmatch(pattern, line.why)]
    return verdict


def numbers(verdict: LossVerdict) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", verdict.why)]


@pytest.mark.parametrize("options", [(), ("--pps",), ("--odd", "0.1")])
def test_an_ordinary_board_is_complete(options: tuple[str, ...]) -> None:
    with board(*options) as emulated:
        counts, _, found = read(emulated)
    assert counts["words"] == WORDS
    assert found == [LossVerdict(1, "complete", "", 0, 0, 0)]


def test_wrong_headers_and_doubled_messages_are_counted_exactly() -> None:
    with board("--skip", "0.1", "--double", "0.1", "--lie", "0.1") as emulated:
        counts, driver, found = read(emulated)
    assert counts["words"] == WORDS - counts["skipped"] + counts["doubled"]
    assert min(counts["skipped"], counts["doubled"], counts["lied"]) > 0
    assert np.count_nonzero(driver.rows["packet_type"] != 4) == counts["words"]
    assert len(found) == 2
    lied, doubled = of("short", found), of("doubled", found)
    assert (lied.verdict, lied.lost) == ("lost", counts["lied"])
    assert numbers(lied) == [counts["lied"], counts["lied_messages"]]
    assert (doubled.verdict, doubled.lost) == ("suspect", 0)
    assert numbers(doubled) == [counts["doubled_messages"], counts["doubled"]]


def test_full_fifos_are_counted_exactly() -> None:
    with board("--fifo-full", "0.01") as emulated:
        counts, driver, found = read(emulated)
    assert counts["full"] == np.count_nonzero(driver.rows["local_fifo"] & 2) > 0
    assert found == [of("full", found)]
    assert numbers(found[0]) == [counts["full"]]


@pytest.mark.parametrize(
    ("options", "kind"), [(("--jump", "1:100"), "ahead"), (("--jump", "1:-100"), "back"), (("--restart", "1"), "back")]
)
def test_clocks_that_jump(options: tuple[str, ...], kind: str) -> None:
    with board(*options) as emulated:
        counts, _, found = read(emulated)
    assert counts["words"] == WORDS
    assert found == [of(kind, found)]
    assert found[0].first_ns <= found[0].last_ns


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def test_a_board_disconnected_for_two_seconds(line: System) -> None:
    """The run continues, all received data are stored, and the file has the time without connection."""
    words = 5 * RATE
    with board("--away", "1:2", "--wait-for-go", "--count", str(words)) as emulated:
        operator = line.start("--pacman", f"127.0.0.1:{emulated.ready['1']['data']}")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        began = time.time_ns()
        emulated.go()
        line.await_status(operator, "producer", "verdicts", {"1": "suspect"})
        assert operator.state().result(LIMIT) == "RUN"
        assert "; io_group 1 is suspect" in operator.status().readable(LIMIT)
        counts = emulated.line()["sent"]["1"]
        until(lambda: line.status_of(operator, "producer").get("packets", 0) == counts["D"], "the rest of the words")
        ended = operator.end_run().result(LIMIT)
        over = time.time_ns()
    assert counts["words"] + counts["skipped"] == words
    assert counts["skipped"] > 0
    assert ended["condition"] == "COMPLETE, suspect"
    (path,) = ended["files"]
    assert verify(Path(path)).ok
    rows = rows_of(path)
    assert np.count_nonzero((rows["direction"] == 1) & (rows["packet_type"] != 4)) == counts["words"]
    with h5py.File(path) as file:
        (away,) = [line for line in file["ledger/verdicts"] if line["verdict"] != b"complete"]
    assert away["why"].startswith(b"board disconnected: ")
    assert began < away["first_ns"] < away["last_ns"] < over
    (reason,) = [line for line in ended["reasons"] if "from the host's" not in line]  # its clock had stopped
    assert "io_group 1: suspect: board disconnected" in reason
    assert "io_group 1 is suspect: board disconnected" in line.processes["producer"].stderr
