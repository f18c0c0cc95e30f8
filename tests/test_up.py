"""`larpixdaq up`, `status` and `down`: a whole system on this machine, and nothing left of it."""

import json
import sys
from pathlib import Path

import pytest
from processes import LIMIT, Process, free_port, until

from larpixdaq.launch import read_running, start_time
from larpixdaq.operator import Operator


def said(folder: Path, *arguments: object) -> str:
    """What the command prints; it must succeed, and have nothing to complain about."""
    with Process("larpixdaq.cli", *arguments, directory=folder / "said") as process:
        assert process.wait(2 * LIMIT) == 0, process.stderr
        assert process.stderr == ""
        return process.stdout


@pytest.mark.once
def test_up_takes_a_run_and_down_leaves_nothing(tmp_path):
    core, log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    state, data, ring = tmp_path / "state", tmp_path / "data", tmp_path / "ring"
    data.mkdir()
    ring.mkdir()
    # The producer's own options go to the producer.
    options = ("--fake", "2000", "--io-groups", "2", "--ring", "16MiB", "--ring-dir", ring, "--when-full", "wait")
    # And the storage's own to the storage.
    closed = tmp_path / "closed files"
    closed.mkdir()
    script = "import os, sys; os.link(sys.argv[2], os.path.join(sys.argv[1], os.path.basename(sys.argv[2])))"
    command = f"{sys.executable} -c '{script}'"
    options += (
        "--rotate",
        "1000rows",
        "--rotate",
        "2h",
        "--on-close",
        f"{command} '{closed}'",
        "--durability",
        "fsync",
    )
    said(tmp_path, "up", "--address", core, "--log-address", log, "--state-dir", state, "-o", data, *options)
    running = read_running(state)
    try:
        assert running is not None
        assert len(list(ring.iterdir())) == 1
        with Operator(core) as operator:
            operator.prepare_run(comment="cosmics [1]").result(LIMIT)
            text = said(tmp_path, "status", "--core", core)
            assert text.startswith("state READY, run 1 (physics): cosmics [1]\ncontrol: ")
            assert "fake board io_group 1; fake board io_group 2; " in text
            operator.begin_run().result(LIMIT)
            until(lambda: list(data.glob("*_001.h5")), "the second part")
            ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        files = [Path(file) for file in ended["files"]]
        assert {file.parent for file in files} == {data}
        assert [file.name[-7:] for file in files] == [f"_{part:03d}.h5" for part in range(len(files))]
        assert "last run: 1 COMPLETE, " in said(tmp_path, "status", "--core", core)
        assert json.loads(said(tmp_path, "status", "--core", core, "--json"))["last_run"]["run"] == 1
    finally:
        assert said(tmp_path, "down", "--state-dir", state) == ""
    assert {file.name for file in closed.iterdir()} == {file.name for file in files}
    assert {path.suffix for path in data.iterdir()} == {".h5", ".json"}
    assert [entry.module for entry in running.processes if start_time(entry.pid) is not None] == []
    assert list(ring.iterdir()) == []
    assert read_running(state) is None


@pytest.mark.once
def test_up_that_others_can_reach_must_be_asked_for(tmp_path):
    state, port = tmp_path / "state", free_port()
    where = ("--address", f"tcp://0.0.0.0:{port}", "--log-address", f"tcp://127.0.0.1:{free_port()}")
    common = ("--state-dir", state, "-o", tmp_path, "--fake")
    with Process("larpixdaq.cli", "up", *where, *common, directory=tmp_path / "refused") as process:
        assert process.wait() == 1
        assert "--insecure" in process.stderr
    said(tmp_path, "up", "--insecure", *where, *common, "10", "--ring", "16MiB")
    try:
        assert "INSECURE" in said(tmp_path, "status", "--core", f"tcp://127.0.0.1:{port}")
    finally:
        said(tmp_path, "down", "--state-dir", state)
