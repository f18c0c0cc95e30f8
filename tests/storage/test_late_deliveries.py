"""Blocks that are delivered after the end of a run are added to it in the catalogue."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import LIMIT, until
from system import System, system

from larpixdaq.hdf5.run_report import survey_run
from larpixdaq.operator import Operator


def taking(line: System, *storage: str, copies: Sequence[str] = ()) -> Operator:
    """Start a run, and wait for a second of data."""
    line.launch_core()
    for name in copies:
        line.launch_storage("--name", name, key=name)
    line.launch_storage(*storage)
    line.launch_monitor()
    line.launch_producer("--fake", "20000")
    operator = line.operator()
    line.await_kinds(operator, "storage", "run_data", "producer")
    names = {*copies, "Offline storage"}
    until(lambda: names <= {facts["name"] for facts in operator.components().result(LIMIT)}, f"{names}")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 20_000, "a second of data in the file")
    return operator


@pytest.mark.parametrize("core", ["lives on", "is killed too"])
def test_a_storage_killed_in_the_run_and_restarted_after_it(tmp_path: Path, core: str) -> None:
    with system(tmp_path) as line:
        operator = taking(line)
        line.processes["offline_storage"].kill()
        ended = operator.end_run().result(2 * LIMIT)
        assert (ended["condition"], ended["files"]) == ("INTERRUPTED", [])
        assert "Offline storage: has not reported" in ended["reasons"]
        assert ended["stored"] is None
        if core == "is killed too":
            line.processes["core"].kill()
            line.restart("core")
            operator = line.operator()
        line.restart("offline_storage")
        line.await_kinds(operator, "storage", "producer")
        info = until(lambda: settled(operator, "COMPLETE"), "all to be delivered and the run to be complete", 2 * LIMIT)
        assert info["rows"] == info["stored"] > 20_000
        assert info["reasons"] == []
        until(lambda: line.status_of(operator, "producer").get("owed_blocks") == 0, "nothing to be owed")
        details = until(lambda: summed(operator, len(info["files"])), "the checksums")
        assert [facts["path"] for facts in details] == info["files"]
        for facts in details:
            sidecar = json.loads(Path(facts["path"]).with_suffix(".json").read_text())
            assert (facts["bytes"], facts["sha256"]) == (sidecar["bytes"], sidecar["sha256"])
        found = survey_run(line.data, 1)
        assert (found.condition, [str(path) for path in found.files]) == ("COMPLETE", info["files"])


def test_a_producer_killed_in_the_run_and_restarted_after_it(tmp_path: Path) -> None:
    with system(tmp_path) as line:
        operator = taking(line)
        line.processes["producer"].kill()
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"] == "INTERRUPTED"
        assert any("totals" in reason for reason in ended["reasons"])
        line.restart("producer")
        line.await_kinds(operator, "producer")
        info = until(lambda: settled(operator, "COMPLETE, suspect"), "what its ring held to be delivered", 2 * LIMIT)
        assert info["rows"] == info["stored"] > 20_000
        assert any("was down for part of the run" in reason for reason in info["reasons"])
        assert operator.prepare_run().result(LIMIT)["run"] == 2
        assert operator.end_run().result(LIMIT)["condition"] == "COMPLETE"


def test_a_producer_killed_and_restarted_in_the_run(tmp_path: Path) -> None:
    with system(tmp_path) as line:
        operator = taking(line)

        def epoch() -> int | None:
            """Return the epoch of the producer when it is in the run."""
            (facts,) = [facts for facts in operator.components().result(LIMIT) if facts["kind"] == "producer"]
            return facts["info"]["epoch"] if facts["status"].get("state") == "RUN" else None

        before = until(epoch, "the producer to be in the run")
        line.processes["producer"].kill()
        line.restart("producer")
        until(lambda: epoch() not in (None, before), "another to be in the run", 2 * LIMIT)
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"] == "COMPLETE, suspect", ended
        assert ended["rows"] == ended["stored"]


def settled(operator: Operator, condition: str) -> dict | None:
    info = operator.run_info(1).result(LIMIT)
    return info if info["condition"] == condition else None


def summed(operator: Operator, files: int) -> list[dict] | None:
    """Return the files of run 1 in the catalogue when it has this number of them with checksums."""
    details = operator.run_info(1).result(LIMIT)["file_details"]
    return details if len(details) == files and all(facts["sha256"] for facts in details) else None


def test_closed_parts_are_in_the_catalogue_during_the_run(tmp_path: Path) -> None:
    with system(tmp_path) as line:
        operator = taking(line, "--rotate", "10krows")
        known = lambda: operator.run_info(1).result(LIMIT)["file_details"]  # noqa: E731
        details = until(lambda: [facts for facts in known() if facts["sha256"]], "closed parts in the catalogue")
        assert details[0]["condition"] == "CONTINUED"
        assert operator.run_info(1).result(LIMIT)["phase"] == "RUN"
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        details = until(lambda: summed(operator, len(ended["files"])), "all parts in the catalogue")
        assert [facts["path"] for facts in details] == ended["files"]


def test_two_storages_of_which_one_is_killed(tmp_path: Path) -> None:
    with system(tmp_path) as line:
        operator = taking(line, copies=("copy",))
        line.processes["copy"].kill()
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"] == "COMPLETE"
        assert ended["stored"] == ended["rows"]
        assert ended["reasons"] == ["copy is lost", "copy: has not reported"]
        assert sorted(operator.run_info().result(LIMIT)["storages"]) == ["Offline storage", "copy"]
