"""`larpixdaq cat --follow`: a growing run of real processes, to the last row, across parts and storages that die."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_board import emulator
from processes import LIMIT, Process, until
from system import System, rows_of, system


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def shown(process: Process) -> list[dict[str, Any]]:
    """Return the whole lines that a `cat --json` has printed so far."""
    return [json.loads(text) for text in process.stdout.split("\n")[:-1]]


def count(process: Process) -> int:
    """Return the number of lines that a `cat` has printed so far."""
    assert process.popen.poll() in (None, 0), process.stderr
    return process.stdout.count("\n")


@pytest.mark.parametrize("rate", ["100", "100000"])
def test_rows_appear_while_the_run_goes_on(line: System, tmp_path: Path, rate: str) -> None:
    """Rows that only the journal has are shown, too; at the end every row of all parts was shown once, in order."""
    line.launch_core()
    line.launch_storage(*(["--rotate", "20krows"] if rate == "100000" else []))
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(emulator("--rate", rate, "--lossless", "--stay"))
        operator = line.start("--pacman", f"1=127.0.0.1:{board.ready['1']['data']}")
        operator.prepare_run().result(LIMIT)
        until(lambda: list(line.data.glob("*.part")), "the first part")
        cat = stack.enter_context(
            Process("larpixdaq.cli", "cat", "--follow", "--json", line.data, directory=tmp_path / "cat")
        )
        operator.begin_run().result(LIMIT)
        until(lambda: '"packet_type":0,' in cat.stdout, "a data row")
        if rate == "100":  # below four chunks no block is in the tables of the part
            assert not rows_in_blocks(line)
        until(lambda: count(cat) > 150, "more rows")
        ended = operator.end_run().result(LIMIT)
        assert cat.wait() == 0, cat.stderr
    parts = [rows_of(path) for path in ended["files"]]
    assert (len(parts) > 3) == (rate == "100000")
    rows, found = np.concatenate(parts), shown(cat)
    assert [row["row"] for row in found] == [number for part in parts for number in range(len(part))]
    for name in ("packet_type", "timestamp", "dataword", "counter", "receipt_timestamp"):
        assert [row[name] for row in found] == rows[name].tolist()
    assert next(row["message"] for row in found if row["packet_type"] == 5) == "Beginning run"


def rows_in_blocks(line: System) -> int:
    from larpixdaq.hdf5.reader import DataFile

    (part,) = line.data.glob("*.part")
    with DataFile(part) as file:
        return file.length("run/blocks")


def test_a_storage_that_is_killed(line: System, tmp_path: Path) -> None:
    """The next part is followed; rows that were shown once are not shown again."""
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(emulator("--rate", "2000", "--lossless", "--stay"))
        operator = line.start("--pacman", f"1=127.0.0.1:{board.ready['1']['data']}")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        until(lambda: list(line.data.glob("*.part")), "the first part")
        cat = stack.enter_context(
            Process("larpixdaq.cli", "cat", "--follow", "--json", line.data, directory=tmp_path / "cat")
        )
        until(lambda: count(cat) > 3000, "rows")
        line.processes["offline_storage"].popen.send_signal(signal.SIGKILL)
        line.processes["offline_storage"].popen.wait(LIMIT)
        before = count(cat)
        line.restart("offline_storage")
        until(lambda: count(cat) > before + 6000, "rows of the next part")
        ended = operator.end_run().result(LIMIT)
        assert cat.wait() == 0, cat.stderr
    total = sum(len(rows_of(path)) for path in ended["files"])
    found = shown(cat)
    assert len(found) == total
