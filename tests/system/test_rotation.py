"""Rotation with real processes at full speed: every row is in one part, once, and the parts are consistent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from emulated_board import emulator
from processes import LIMIT, until
from system import System, system

from larpixdaq.hdf5 import verify
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.operator import Operator


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def test_rotation_at_full_speed(line: System, tmp_path: Path) -> None:
    """Several parts a second, with a command for each part: the boards' own counts equal the rows of all parts."""
    moved = tmp_path / "moved"
    moved.mkdir()
    script = "import os, sys; os.link(sys.argv[1], sys.argv[2] + '/' + os.path.basename(sys.argv[1]))"
    (tmp_path / "copy.py").write_text(script)
    (tmp_path / "copy").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/copy.py "$1" {moved}\n')
    (tmp_path / "copy").chmod(0o755)
    words = 750_000
    options = ("--io-groups", "2", "--rate", "500000", "--count", str(words), "--lossless", "--wait-for-go")
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(emulator(*options))
        line.launch_core()
        line.launch_storage("--rotate", "60krows", "--rotate", "1h", "--on-close", tmp_path / "copy")
        ports = [f"{group}=127.0.0.1:{port['data']}" for group, port in board.ready.items()]
        line.launch_producer("--pacman", *ports)
        operator = stack.enter_context(Operator(line.core, timeout=LIMIT))
        line.await_kinds(operator, "storage", "producer")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        board.go()
        sent = board.finish()["sent"]
        ended = operator.end_run().result(2 * LIMIT)
        last = line.status_of(operator, "storage")["finished"][-1]
    assert ended["condition"] == "COMPLETE", ended
    files = [Path(path) for path in ended["files"]]
    assert len(files) >= 20
    assert [path.name[-7:-3] for path in files] == [f"_{part:03d}" for part in range(len(files))]
    blocks: list[int] = []
    groups = np.zeros(256, int)
    for path in files:
        with DataFile(path) as file:
            assert file.rows <= 60_000
            blocks += file.table("run/blocks")["sequence"].tolist()
            rows = file.packets()
        kinds = rows["packet_type"]
        counted = (rows["direction"] == 1) & ((kinds <= 3) | (kinds == 6) | (kinds == 7))
        groups += np.bincount(rows["io_group"][counted], minlength=256)
    outcome = verify.verify_all([line.data])
    assert outcome.ok, outcome.runs
    assert [(run.condition, run.rows, run.files) for run in outcome.runs] == [("COMPLETE", ended["rows"], files)]
    assert blocks == list(range(len(blocks)))
    assert {group: int(groups[int(group)]) for group in sent} == {
        group: counts["words"] for group, counts in sent.items()
    }
    assert last["run"] == ended["run"]
    until(lambda: len(list(moved.iterdir())) == len(files), "the command to have run on each")
    for path in files:
        about = json.loads(path.with_suffix(".json").read_text())
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (moved / path.name).samefile(path)
