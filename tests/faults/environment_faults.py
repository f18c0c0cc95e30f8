"""Rows of the fault table: faults of disks, networks, boards and clocks."""

from __future__ import annotations

import errno

from process_faults import MORE_ROWS, PRODUCER, STORAGE
from processes import until
from table import row
from trial import STEP, Trial

HOSTS = {"producer": "daq", "board": "daq"}
BOARD_APART = {"board": "board"}
#: Bytes of free space on a disk that is about to be full.
ROOM = 3 << 20


@row("none, with boards that do not wait", "0 lost, no finding", lossless=False)
def undisturbed(trial: Trial) -> None:
    trial.begin_fault()
    trial.faults.pause(5.0)


@row("disk hangs for 10 s", "storage is `stuck` within 1.25 s, 0 lost", becomes="stuck", disk=True)
def disk_hangs(trial: Trial) -> None:
    assert trial.disk is not None
    before = trial.disk.affected
    trial.disk.hang()
    until(lambda: trial.disk.affected > before, "the disk to be used", STEP)
    trial.begin_fault(STORAGE)
    trial.faults.note("disk hangs")
    trial.faults.pause(10.0)
    trial.disk.heal()
    trial.faults.note("disk in order")
    trial.await_component(STORAGE)
    trial.await_rows(MORE_ROWS)


@row("disk slow (10 MB/s) for 10 s", "0 lost", disk=True)
def disk_slow(trial: Trial) -> None:
    assert trial.disk is not None
    trial.begin_fault(STORAGE)
    trial.disk.slow(10_000_000)
    trial.faults.note("disk slow")
    trial.faults.pause(10.0)
    trial.disk.heal()
    trial.faults.note("disk in order")
    trial.await_component(STORAGE)


@row("disk error (EIO) on every write for 5 s", "alarm; continues when writes work again, 0 lost", disk=True)
def disk_error(trial: Trial) -> None:
    assert trial.disk is not None
    trial.begin_fault(STORAGE)
    trial.disk.fail(errno.EIO)
    trial.faults.note("disk fails")
    until(lambda: trial.disk.affected > 0, "a write to fail", STEP)
    trial.faults.pause(5.0)
    trial.disk.heal()
    trial.faults.note("disk in order")
    trial.await_component(STORAGE)
    trial.await_rows(MORE_ROWS)


@row("one write fails (EIO)", "0 lost", disk=True)
def disk_error_once(trial: Trial) -> None:
    assert trial.disk is not None
    trial.begin_fault(STORAGE)
    trial.disk.fail(errno.EIO, times=1)
    until(lambda: trial.disk.affected > 0, "a write to fail", STEP)
    trial.await_rows(MORE_ROWS)


@row("disk full for 10 s, then space again", "pauses before the file is damaged, alarm, continues, 0 lost", disk=True)
def disk_full(trial: Trial) -> None:
    _full(trial)


@row(
    "the same, until ring and spool are full too",
    "exact count of the rows without room",
    conditions=("COMPLETE", "INCOMPLETE", "COMPLETE, suspect"),
    counted=True,
    disk=True,
    ring="16MiB",
    producer=("--spool-limit", "16MiB"),
    rate=500_000.0,
)
def disk_full_spool_too(trial: Trial) -> None:
    _full(trial, used_up=True)


def _full(trial: Trial, *, used_up: bool = False) -> None:
    assert trial.disk is not None
    trial.begin_fault(STORAGE)
    trial.disk.full(ROOM)
    trial.faults.note("disk about to be full")
    until(lambda: trial.status("storage").get("paused"), "storage to pause", STEP)
    trial.faults.note(f"storage has paused: {trial.status('storage')['paused']}")
    if used_up:
        until(lambda: trial.status("producer").get("dropped", 0) > 0, "ring and spool to be used up", STEP)
        trial.faults.note("rows find no room")
        trial.faults.pause(1.0)
    else:
        trial.faults.pause(10.0)
    trial.disk.heal()
    trial.faults.note("space again")
    until(lambda: not trial.status("storage").get("paused"), "storage to continue", STEP)
    trial.await_rows(MORE_ROWS)
    if used_up:
        until(lambda: trial.status("producer").get("spooled_blocks") == 0, "the spool to be empty", STEP)


def _network_fault(trial: Trial, host: str, seconds: float, **fault: float) -> None:
    """Cause a fault between a host and that of the storage, and repair it. `fault`: as in Network.fault()."""
    assert trial.net is not None
    trial.begin_fault()
    trial.net.fault(host, "core", **fault)
    trial.faults.note(f"network fault at host {host}: {fault}")
    trial.faults.pause(seconds)
    counts = trial.net.heal(host, "core")
    trial.faults.note(f"network in order, {counts['lost']} packets lost, {counts['passed']} passed")
    trial.await_rows(MORE_ROWS)


def _producer_network_fault(trial: Trial, seconds: float, **fault: float) -> None:
    _network_fault(trial, HOSTS["producer"], seconds, **fault)
    for name in (PRODUCER, STORAGE):
        trial.await_component(name)
    until(lambda: trial.status("producer").get("ring", 1.0) < 0.1, "the waiting blocks to be delivered", STEP)


@row("network between producer and storage cut for 5 s", "0 lost", hosts=HOSTS, noticed=True)
def network_cut(trial: Trial) -> None:
    _producer_network_fault(trial, 5.0, cut=True)


@row("5 % of the packets between producer and storage dropped for 10 s", "0 lost", hosts=HOSTS, noticed=True)
def network_lossy(trial: Trial) -> None:
    _producer_network_fault(trial, 10.0, drop=0.05)


@row("200 ms delay between producer and storage for 10 s", "0 lost", hosts=HOSTS, noticed=True)
def network_slow(trial: Trial) -> None:
    _producer_network_fault(trial, 10.0, delay=0.2)


@row(
    "5 % of the packets between board and host dropped for 10 s",
    "data that the boards drop are inside a marked gap",
    conditions=("COMPLETE", "COMPLETE, suspect"),
    gap=True,
    hosts=BOARD_APART,
    lossless=False,
)
def board_network_lossy(trial: Trial) -> None:
    _network_fault(trial, "board", 10.0, drop=0.05)


@row(
    "network between board and host cut for 5 s",
    "data that the boards drop are inside a marked gap",
    conditions=("COMPLETE", "COMPLETE, suspect"),
    gap=True,
    hosts=BOARD_APART,
    lossless=False,
)
def board_network_cut(trial: Trial) -> None:
    _network_fault(trial, "board", 5.0, cut=True)


@row(
    "boards ended, and started again some seconds later",
    "gap in the ledger with times, the run continues",
    conditions=("COMPLETE, suspect",),
    gap=True,
)
def board_gone(trial: Trial) -> None:
    trial.begin_fault()
    trial.end_boards()
    trial.faults.note("boards ended")
    trial.faults.pause(3.0)
    trial.board = trial.make_board(trial.faults.random.randrange(1000), ports=trial.board)
    trial.board.go()
    trial.faults.note("boards started again")
    trial.await_rows(MORE_ROWS)


@row(
    "a further board sends random bytes",
    "counted with the reason, the run continues, 0 lost of the other boards",
    conditions=("INCOMPLETE",),
    nonsense=True,
)
def board_nonsense(trial: Trial) -> None:
    trial.begin_fault()
    trial.faults.pause(5.0)
    until(lambda: trial.status("producer").get("unknown", 0) > 0, "unknown words to be counted", STEP)
    trial.await_rows(MORE_ROWS)


@row("wall clock set an hour ahead, then an hour behind, then right", "no timeouts, no wrong rates, 0 lost", clock=True)
def clock_stepped(trial: Trial) -> None:
    assert trial.clock is not None
    trial.begin_fault()
    for step in (3600, -3600, 0):
        trial.clock.step(step)
        trial.faults.note(f"wall clock {step:+d} s")
        trial.faults.pause(3.0)
        rate = trial.operator.packet_rate(channels=False).result(STEP)["rate"]
        trial.expect(0.2 < rate / trial.setup.rate < 3.0, f"a rate of {rate:.0f}/s after a step of {step} s")
    trial.await_rows(MORE_ROWS)
    trial.exact_monitor = True
