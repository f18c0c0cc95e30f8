"""Processes that die, restart or are ended during a run; boards that never stop."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from emulated_board import emulator
from processes import LIMIT, until
from system import System, rows_of, system

from larpixdaq.constants import COUNTS, rows_made
from larpixdaq.control.run_list import RunList, run_lines
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.verify import verify
from larpixdaq.offline_storage import DEFAULT_NAME
from larpixdaq.operator import Operator


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def begin(line: System, *source: object) -> Operator:
    operator = line.start(*source)
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > 1000, "1000 packets")
    return operator


def subscribed(line: System, operator: Operator) -> None:
    until(
        lambda: DEFAULT_NAME in line.status_of(operator, "producer").get("subscribers", []), "the storage to subscribe"
    )
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 0, "rows in it")


def sequences(path: Path) -> list[int]:
    """Return the sequences of all blocks of a part."""
    with DataFile(path) as file:
        found: list[int] = file.table("run/blocks")["sequence"].tolist()
    return found


def test_a_restarted_storage_has_every_block_once(line: System) -> None:
    operator = begin(line, "--fake", "50000")
    subscribed(line, operator)  # a part without blocks would be removed
    line.processes["offline_storage"].kill()
    line.launch_storage()
    until(lambda: list(line.data.glob("*_001.h5.part")), "the further part")
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 50_000, "a second of data in it")
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE"
    first, path = ended["files"]
    assert verify(Path(path)).ok, verify(Path(path)).findings
    with h5py.File(path, "r") as file:
        following = int(file["run/ends"]["next"][0])
    assert sequences(Path(first)) + sequences(Path(path)) == list(range(following))
    until(lambda: line.status_of(operator, "producer").get("owed_blocks") == 0, "no pending blocks")


def test_a_restarted_producer_resumes_the_run_under_a_new_epoch(line: System) -> None:
    operator = begin(line, "--fake", "20000")
    subscribed(line, operator)
    line.processes["producer"].kill()

    def producer() -> dict[str, Any]:
        (found,) = [c for c in operator.components().result(LIMIT) if c["kind"] == "producer"]
        return found

    until(lambda: not producer()["alive"], "the producer to be lost")
    line.launch_producer("--fake", "20000")
    until(lambda: producer()["alive"], "the producer to be back")
    until(lambda: producer()["status"].get("state") == "RUN", "it to be in the run again")
    until(lambda: producer()["status"].get("packets", 0) > 1000, "1000 packets")
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE, suspect", ended
    (path,) = ended["files"]
    assert verify(Path(path)).ok, verify(Path(path)).findings
    with h5py.File(path, "r") as file:
        texts = [text.decode() for text in file["messages"]["message"]]
        assert len(np.unique(file["run/blocks"]["epoch"])) == 2
    assert texts == ["Beginning run", "Resuming run", "Ending run"]


def test_a_producer_ended_during_a_run_delivers_all_blocks_and_an_end_record(line: System) -> None:
    operator = begin(line, "--fake", "20000")
    assert line.processes["producer"].stop() == 0
    ended = operator.end_run().result(2 * LIMIT)
    (path,) = ended["files"]
    with h5py.File(path, "r") as file:
        assert [how.decode() for how in file["run/ends"]["how"]] == ["aborted"]
        counts = file["ledger/counts"][:]
    assert counts["stored"].sum() == len(rows_of(path)) > 1000
    assert verify(Path(path)).ok, verify(Path(path)).findings
    with contextlib.closing(RunList(line.folder / "state")) as catalogue:
        facts = catalogue.describe(catalogue.find(ended["run"]))
    assert sum(rows_made([group[name] for name in COUNTS]) for group in facts["ledger"]) == len(rows_of(path))
    assert not any("in the files alone" in text for _, text in run_lines(facts))


@pytest.mark.parametrize("rate", [5_000, 50_000])
def test_a_board_that_never_stops_does_not_delay_end_run(line: System, rate: int) -> None:
    options = ("--rate", str(rate), "--words-per-message", "1", "--lossless", "--wait-for-subscriber")
    with emulator("--io-groups", "1", *options) as board:
        operator = begin(line, "--pacman", f"1=127.0.0.1:{board.ready['1']['data']}")
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        assert ended["reasons"] == []
        until(lambda: line.status_of(operator, "producer").get("owed_blocks") == 0, "no pending blocks")
        board.stop()
        board.finish()
