"""Storages that are stopped, doubled or killed, or whose disk fails: never two writers, and nothing is lost."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import Disk
from injector import Faults
from processes import LIMIT, until
from system import System, system

from larpixdaq.constants import NO_CORE
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.verify import verify
from larpixdaq.operator import Operator
from larpixdaq.storage.directory_lock import Lock
from larpixdaq.stream.subscriber import STALL_LIMIT, SessionCheck

#: Rows after which a run counts as running.
MORE = 20_000


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as made:
        yield made


def begin(line: System, *options: object) -> Operator:
    operator = line.start("--fake", "200000", *options)
    operator.prepare_run(comment="cosmics").result(LIMIT)
    operator.begin_run().result(LIMIT)
    flows(line, operator)
    return operator


def flows(line: System, operator: Operator) -> None:
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > MORE, "packets")
    before = storage(operator)["status"].get("rows", 0)
    until(lambda: storage(operator)["status"].get("rows", 0) > before + MORE, "rows in the file")


def storage(operator: Operator) -> dict[str, Any]:
    (component,) = [c for c in operator.components().result(LIMIT) if c["kind"] == "storage"]
    found: dict[str, Any] = component
    return found


def instance_is(operator: Operator, state: str) -> bool:
    component = storage(operator)
    return state == ("lost" if not component["alive"] else "stuck" if component["stuck"] else "fine")


def check(ended: dict[str, Any], files: list[Path] | None = None) -> None:
    """Every block is in one of the files, once, in order, and each file is good."""
    files = files or [Path(path) for path in ended["files"]]
    blocks: list[int] = []
    following = set()
    for path in files:
        with DataFile(path) as file:
            blocks += file.table("run/blocks")["sequence"].tolist()
            following |= set(file.table("run/ends")["next"].tolist())
            assert file.run_info()["missing_blocks"] == 0
    assert {n: many for n, many in Counter(blocks).items() if many > 1} == {}
    assert sorted(blocks) == list(range(next(iter(following))))
    assert len(following) == 1


def test_a_second_storage_waits_and_takes_over(line: System) -> None:
    """It does not register and writes nothing until the first storage is dead."""
    operator = begin(line)
    first = line.processes["offline_storage"]
    second = line.launch_storage()
    until(lambda: "is locked" in second.stderr, "the second one to wait")
    before = {path.name for path in line.data.iterdir()}
    flows(line, operator)
    assert {path.name for path in line.data.iterdir()} == before
    first.kill()
    until(lambda: len(list(line.data.glob("*_001.h5.part"))) == 1, "the second part")
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    assert len(ended["files"]) == 2
    check(ended)
    line.await_status(operator, "producer", "owed_blocks", 0)
    assert second.stderr.count("is locked") == 1


def test_a_waiting_storage_ends_on_a_signal(line: System) -> None:
    line.start("--fake", "2000")
    second = line.launch_storage()
    until(lambda: "is locked" in second.stderr, "the second one to wait")
    assert second.stop() == 0
    del line.processes["offline_storage"]
    assert [path.name for path in line.data.iterdir()] == [".larpixdaq.lock"]  # the first one's, still locked


def test_storages_with_different_names_write_at_the_same_time(line: System) -> None:
    operator = line.start("--fake", "2000")
    line.launch_storage("--name", "copy", key="copy")
    until(lambda: sum(c["kind"] == "storage" for c in operator.components().result(LIMIT)) == 2, "both")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > 1000, "1000 packets")
    ended = operator.end_run().result(LIMIT)
    assert ended["condition"] == "COMPLETE"
    assert ["copy" in Path(path).name for path in ended["files"]] == [False, True]


def test_a_stopped_storage_continues_by_itself(line: System) -> None:
    operator = begin(line)
    faults = Faults(line, 1)
    faults.stop("offline_storage")
    until(lambda: instance_is(operator, "lost"), "the storage to be lost")
    faults.resume("offline_storage")
    until(lambda: instance_is(operator, "fine"), "the storage to be back")
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    assert len(ended["files"]) == 1
    check(ended)
    assert "stalled for" in line.processes["offline_storage"].stderr


def test_a_storage_whose_name_was_taken_closes_its_part_and_ends(line: System, tmp_path: Path) -> None:
    """Acknowledged blocks are in its file, the others in the file of its successor in another directory."""
    operator = begin(line)
    stopped = line.processes["offline_storage"]
    stopped.popen.send_signal(signal.SIGSTOP)
    until(lambda: instance_is(operator, "lost"), "the storage to be lost")
    other = tmp_path / "other"
    other.mkdir()
    line.launch_storage("-o", other)
    until(lambda: instance_is(operator, "fine"), "the other storage")
    flows(line, operator)
    stopped.popen.send_signal(signal.SIGCONT)
    assert stopped.wait() == 1
    assert stopped.stderr.splitlines()[-1].endswith("another storage has taken this name and continues the run")
    flows(line, operator)
    operator.end_run().result(2 * LIMIT)
    line.await_status(operator, "producer", "owed_blocks", 0)
    (mine,), (others,) = line.data.glob("*.h5"), other.glob("*.h5")
    assert {path.suffix for path in line.data.iterdir()} == {".h5", ".json"}
    with DataFile(mine) as file:
        (text,) = file.texts()["superseded from"]
        sequences = file.table("run/blocks")["sequence"].tolist()
        epoch = int(file.table("run/blocks")["epoch"][0])
    ((producer, of, following),) = json.loads(text)
    assert (producer, of) == ("LArPix board", epoch)
    # Acknowledged blocks are in the first file; its further blocks are in the other file, too.
    assert sequences == list(range(len(sequences)))
    assert 0 < following <= len(sequences)
    with DataFile(others) as file:
        theirs = file.table("run/blocks")["sequence"].tolist()
        (last,) = file.table("run/ends")["next"].tolist()
    assert theirs[0] <= following
    assert sorted(set(sequences) | set(theirs)) == list(range(last))


def test_a_hanging_disk_makes_a_storage_stuck_not_lost(line: System, tmp_path: Path) -> None:
    disk = Disk(tmp_path, line.data)
    line.env["offline_storage"] = disk.env
    operator = begin(line)
    seen = set()

    def sees(state: str) -> bool:
        component = storage(operator)
        seen.add(component["alive"])
        return instance_is(operator, state)

    began = time.monotonic()
    disk.hang()
    until(lambda: sees("stuck"), "the storage to be stuck")
    until(lambda: sees("stuck") and time.monotonic() - began > 3, "three seconds")
    disk.heal()
    until(lambda: sees("fine"), "the storage to move again")
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert seen == {True}
    assert ended["condition"] == "COMPLETE", ended
    check(ended)
    disk.close()


@pytest.mark.parametrize("ends", ["after", "in the pause"])
def test_a_full_disk_pauses_the_storage(line: System, tmp_path: Path, ends: str) -> None:
    disk = Disk(tmp_path, line.data)
    line.env["offline_storage"] = disk.env
    operator = begin(line)
    disk.full(64 << 20)  # exactly the reserve, so that the next write exceeds it
    until(lambda: storage(operator)["status"].get("paused"), "the storage to pause")
    (part,) = line.data.glob("*.part")
    with DataFile(part) as file:
        assert file.rows > 0
    if ends == "in the pause":
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"] == "INTERRUPTED", ended
        disk.heal()
        until(lambda: operator.run_info(1).result(LIMIT)["condition"] == "COMPLETE", "the rest of the run")
        ended = operator.run_info(1).result(LIMIT)
    else:
        disk.heal()
        until(lambda: not storage(operator)["status"].get("paused"), "the storage to go on")
        flows(line, operator)
        ended = operator.end_run().result(2 * LIMIT)
        assert len(ended["files"]) == 1
    assert ended["condition"] == "COMPLETE", ended
    check(ended)
    for path in ended["files"][-1:]:
        assert verify(Path(path)).ok, verify(Path(path)).findings
    disk.close()


def test_a_disk_error_costs_a_part_and_no_row(line: System, tmp_path: Path) -> None:
    disk = Disk(tmp_path, line.data)
    line.env["offline_storage"] = disk.env
    operator = begin(line)
    disk.fail()
    until(lambda: storage(operator)["status"].get("paused"), "the error")
    disk.heal()
    until(lambda: not storage(operator)["status"].get("paused"), "a further part")
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    assert len(ended["files"]) == 2
    check(ended)
    until(lambda: not [*line.data.glob("*.part"), *line.data.glob("*.journal")], "the end of the first part's journal")
    disk.close()


class Core:
    def __init__(self) -> None:
        self.heard = self.confirmed = 0.0


def test_a_stalled_process_waits_for_the_core() -> None:
    core, now = Core(), [100.0]
    session_check = SessionCheck(core, lambda: now[0])
    for _ in range(3):
        assert session_check.may_act()
        now[0] += STALL_LIMIT
    now[0] += 0.1
    assert not session_check.may_act()
    core.heard = now[0] + 0.2  # a message that was sent earlier
    core.confirmed = now[0] - 1
    now[0] += 0.3
    assert not session_check.may_act()
    core.confirmed = now[0]
    now[0] += 0.1
    assert session_check.may_act()
    now[0] += STALL_LIMIT + 0.1
    for _ in range(3):
        assert not session_check.may_act()  # the core lives, because it sends other messages
        now[0] += NO_CORE / 3
        core.heard = now[0]
    for _ in range(3):
        assert not session_check.may_act()
        now[0] += NO_CORE / 3 + 0.01
    assert session_check.may_act()  # the core is silent, so no other storage can have registered


def test_one_lock_per_name(tmp_path: Path) -> None:
    first, second, other = Lock(tmp_path, ""), Lock(tmp_path, ""), Lock(tmp_path, "copy")
    assert first.take() is None
    assert second.take() == first.path
    assert other.take() is None
    first.release()
    assert second.take() is None
    for lock in (second, other):
        lock.release()
    assert list(tmp_path.iterdir()) == []
