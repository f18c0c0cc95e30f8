"""Runs over real brokers: producers with --stream, storages and monitors that read from there."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import Brokers, brokers
from emulated_board import emulator
from processes import LIMIT, Process, until
from system import System, rows_of, system

from larpixdaq.errors import ComponentError
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.verify import verify, verify_all
from larpixdaq.operator import Operator
from larpixdaq.protocol.stream_messages import ID, Identity
from larpixdaq.runtime.launcher import command
from larpixdaq.stream.jetstream import stream_name


@pytest.fixture(scope="module")
def one() -> Iterator[Brokers]:
    with brokers(1, fsync=True) as made:
        yield made


@pytest.fixture(scope="module")
def three() -> Iterator[Brokers]:
    with brokers(3) as made:
        yield made


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as made:
        yield made


def start(line: System, made: Brokers, *source: object, name: str) -> Operator:
    """Start all processes with --stream. `name`: of the producer, whose stream the brokers keep from test to test."""
    line.launch_core()
    line.launch_storage("--stream", made.urls, "--name", f"storage of {name}")
    line.launch_monitor("--stream", made.urls)
    return line.start(*source, "--stream", made.urls, "--stream-size", "1GiB", "--name", name)


def prepare(operator: Operator) -> None:
    """Prepare a run when the producer's stream is there: a monitor would miss what comes before."""

    def connected() -> bool:
        (producer,) = [c for c in operator.components().result(LIMIT) if c["kind"] == "producer"]
        return bool((producer["status"].get("uplink") or {}).get("connected"))

    until(connected, "the brokers to take blocks")

    def prepared() -> bool:
        try:
            operator.prepare_run().result(LIMIT)
        except ComponentError as error:  # the producer's stream is made meanwhile
            if "stream" not in str(error):
                raise
            return False
        return True

    until(prepared, "a run to be prepared")


def begin(line: System, operator: Operator) -> None:
    prepare(operator)
    operator.begin_run().result(LIMIT)
    flows(line, operator)


def flows(line: System, operator: Operator) -> None:
    """Wait for rows in the file: more than wait for the journal, because a part without blocks would be removed."""
    before = storage(operator)["status"].get("total_rows", 0)
    until(lambda: storage(operator)["status"].get("total_rows", 0) > before + 20_000, "rows in the file")


def storage(operator: Operator) -> dict[str, Any]:
    (found,) = [c for c in operator.components().result(LIMIT) if c["kind"] == "storage"]
    return found


def check(ended: dict[str, Any], condition: str = "COMPLETE") -> None:
    """Check that every block is in one of the run's files, once, and that the last file is good: a part that was
    recovered has no end record."""
    assert ended["condition"] == condition, ended
    blocks: list[tuple[int, int]] = []
    following: dict[int, int] = {}
    report = verify(Path(ended["files"][-1]))
    assert report.ok, report.findings
    for path in map(Path, ended["files"]):
        with DataFile(path) as file:
            table = file.table("run/blocks")
            blocks += zip(table["epoch"].tolist(), table["sequence"].tolist(), strict=True)
            ends = file.table("run/ends")
            following |= dict(zip(ends["epoch"].tolist(), ends["next"].tolist(), strict=True))
    assert {n: many for n, many in Counter(blocks).items() if many > 1} == {}
    assert sorted(blocks) == [(epoch, n) for epoch in sorted(following) for n in range(following[epoch])]


def test_two_runs_of_an_emulated_board_and_a_late_analysis(line: System, one: Brokers, tmp_path: Path) -> None:
    options = ("--io-groups", "2", "--rate", "50000", "--count", "200000", "--lossless", "--wait-for-go")
    with emulator(*options) as board:
        ports = [f"{group}=127.0.0.1:{port['data']}" for group, port in board.ready.items()]
        operator = start(line, one, "--pacman", *ports, name="emulated")
        prepare(operator)
        assert "PAUSED" not in line.processes["core"].stderr  # while the producer made its stream
        operator.begin_run().result(LIMIT)
        board.go()
        until(lambda: operator.summary().result(LIMIT)["rate"] > 10_000, "the monitor to show a rate")
        sent = board.finish()["sent"]
        first = operator.end_run().result(2 * LIMIT)
        check(first)
        rows = np.concatenate([rows_of(path) for path in first["files"]])
        kinds = rows["packet_type"]
        received = np.count_nonzero((kinds <= 3) & (rows["direction"] == 1))
        assert received + np.count_nonzero((kinds == 6) | (kinds == 7)) == sum(
            group["words"] for group in sent.values()
        )
        until(lambda: operator.summary().result(LIMIT)["packets"] == received, "the monitor to have the exact total")
        prepare(operator)
        operator.begin_run().result(LIMIT)
        second = operator.end_run().result(2 * LIMIT)
        check(second, "COMPLETE, suspect")  # the board is away
    folder = tmp_path / "late"
    folder.mkdir()
    done = subprocess.run(
        command("cli", "fetch", str(first["run"]), "--stream", one.urls, "-o", str(folder), "--json"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == first["rows"]
    assert verify_all([folder]).ok


def test_a_storage_that_is_killed_and_started_again(line: System, one: Brokers) -> None:
    operator = start(line, one, "--fake", "50000", name="storage killed")
    begin(line, operator)
    line.processes["offline_storage"].kill()
    line.restart("offline_storage")
    until(lambda: list(line.data.glob("*_001.h5.part")), "the further part")
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert len(ended["files"]) == 2
    check(ended)


def test_a_standby_in_another_directory_has_the_whole_run(line: System, one: Brokers) -> None:
    operator = start(line, one, "--fake", "50000", name="taken over")
    begin(line, operator)
    standby = launch_standby(line, one, "storage of taken over")
    until(lambda: "is at work on" in standby.stderr, "it to wait")
    flows(line, operator)
    line.processes["offline_storage"].kill()
    other = line.folder / "other"
    until(lambda: list(other.glob("*.h5.part")), "the standby to take over", 5.0)
    flows(line, operator)
    ended = operator.end_run().result(2 * LIMIT)
    assert {Path(path).parent for path in ended["files"]} == {other}
    check(ended)
    assert verify_all([other]).ok


@pytest.mark.cluster
def test_a_storage_that_stood_still_writes_no_more_after_a_standby_has_its_name(line: System, three: Brokers) -> None:
    operator = start(line, three, "--fake", "50000", name="stood still")
    begin(line, operator)
    standby = launch_standby(line, three, "storage of stood still")
    until(lambda: "is at work on" in standby.stderr, "it to wait")
    first = line.processes.pop("offline_storage")
    first.popen.send_signal(signal.SIGSTOP)
    last = last_identity(three, "stood still")
    other = line.folder / "other"
    until(lambda: list(other.glob("*.h5.part")), "the standby to take over", 2 * LIMIT)
    flows(line, operator)
    first.popen.send_signal(signal.SIGCONT)
    assert first.popen.wait(LIMIT) == 1
    flows(line, operator)
    assert len(durables(three, "stood still")) == 1
    ended = operator.end_run().result(2 * LIMIT)
    assert {Path(path).parent for path in ended["files"]} == {other}
    check(ended)
    assert verify_all([other]).ok
    (left,) = line.data.glob("*.h5")
    with DataFile(left) as file:
        assert file.table("run/blocks")["sequence"].max() < last.next
    assert first.stderr.splitlines()[-1].endswith(
        ": storage of stood still: another storage has taken this name and continues the run"
    )


@pytest.mark.cluster
def test_a_standby_that_takes_over_in_end_run_has_the_whole_run(line: System, three: Brokers) -> None:
    operator = start(line, three, "--fake", "50000", name="ended")
    begin(line, operator)
    standby = launch_standby(line, three, "storage of ended")
    until(lambda: "is at work on" in standby.stderr, "it to wait")
    line.processes["offline_storage"].kill()
    ended = operator.end_run().result(2 * LIMIT)
    check(ended)
    assert {Path(path).parent for path in ended["files"]} == {line.folder / "other"}
    assert verify_all([line.folder / "other"]).ok


@pytest.mark.cluster
@pytest.mark.parametrize("leads", [False, True], ids=["follower", "leader"])
def test_a_broker_that_does_not_answer_in_a_run(line: System, three: Brokers, leads: bool) -> None:
    name = f"broker stopped {leads:d}"
    operator = start(line, three, "--fake", "50000", name=name)
    begin(line, operator)
    leader = three.leader_of(stream_name(name))
    stopped = leader if leads else (leader + 1) % 3
    three.stop(stopped)
    try:
        flows(line, operator)
    finally:
        three.resume(stopped)
    three.await_ready(stopped)
    flows(line, operator)
    check(operator.end_run().result(2 * LIMIT))


def last_identity(made: Brokers, producer: str) -> Identity:
    """Return what the newest message of a producer's stream is."""

    async def ask(client: Any) -> Identity:
        context, stream = client.jetstream(), stream_name(producer)
        last = (await context.stream_info(stream)).state.last_seq
        return Identity.parse((await context.get_msg(stream, last)).headers[ID])

    found: Identity = made.call(ask)
    return found


def durables(made: Brokers, producer: str) -> list[str]:
    """Return the names of the durable consumers of a producer's stream."""

    async def ask(client: Any) -> list[str]:
        found = await client.jetstream().consumers_info(stream_name(producer))
        return sorted(each.config.durable_name for each in found if each.config.durable_name)

    names: list[str] = made.call(ask)
    return names


def launch_standby(line: System, made: Brokers, name: str) -> Process:
    other = line.folder / "other"
    other.mkdir()
    return line.launch(
        "offline_storage", "--core", line.core, "-o", other, "--stream", made.urls, "--name", name, "--standby",
        key="standby",
    )  # fmt: skip


def test_brokers_that_are_killed_and_started_again_in_a_run(line: System) -> None:
    with brokers(1, fsync=True) as made:
        operator = start(line, made, "--fake", "50000", name="broker killed")
        begin(line, operator)
        made.kill(0)
        until(lambda: storage(operator)["status"].get("paused"), "the storage to say why it waits")
        made.start(0)
        until(lambda: not storage(operator)["status"].get("paused"), "the storage to go on")
        flows(line, operator)
        check(operator.end_run().result(2 * LIMIT))


def test_producers_and_storages_must_agree(line: System, one: Brokers) -> None:
    line.launch_core()
    line.launch_storage("--stream", one.urls, "--name", "agrees")
    operator = line.start("--fake", "1000")
    with pytest.raises(ComponentError, match=r"--stream is needed for all.* agrees with it, LArPix board without"):
        operator.prepare_run().result(LIMIT)
    line.processes["offline_storage"].stop()
    line.launch_storage("--name", "plain", key="plain")
    line.processes["producer"].stop()
    line.launch_producer("--fake", "1000", "--stream", one.urls, "--stream-size", "1GiB")

    def refused() -> bool:
        with pytest.raises(ComponentError) as caught:
            operator.prepare_run().result(LIMIT)
        return "LArPix board with it, plain without" in str(caught.value)

    until(refused, "prepare_run to be refused")


def test_a_storage_that_is_restarted_without_stream_in_a_run_is_named(line: System, one: Brokers) -> None:
    operator = start(line, one, "--fake", "50000", name="restarted")
    begin(line, operator)
    line.processes["offline_storage"].kill()
    line.launch_storage("--name", "storage of restarted")
    named = ": --stream is needed for all producers and storages, or for none: restarted with it, storage of restarted"
    until(lambda: f"{named} without" in line.processes["core"].stderr, "the storage to be named")
    line.processes["offline_storage"].kill()
    line.launch_storage("--stream", one.urls, "--name", "storage of restarted")
    flows(line, operator)
    check(operator.end_run().result(2 * LIMIT))
