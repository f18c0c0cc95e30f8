"""The producer process: reads boards and sends blocks. `larpixdaq-producer --pacman pacman.local`."""

import sys

if __spec__ is None:  # run by its path: its folder would shadow the standard library's `operator`
    sys.path[0:1] = []

import argparse
import contextlib
import logging
import math
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq import config, constants
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.constants import HARDWARE_ACTIONS, Count, unusable
from larpixdaq.control.node import Call, Node
from larpixdaq.errors import ConfigError, RequestError, RingError, StateError
from larpixdaq.hardware.power_settings import located, read_settings
from larpixdaq.hardware.supervisor import Child
from larpixdaq.keys.curve import Admission, new_pair
from larpixdaq.protocol import hardware
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.reports import (
    BoardReport,
    ClockReport,
    IoGroupReport,
    ProducerEnd,
    ProducerReady,
    ProducerStatus,
)
from larpixdaq.protocol.stream import VERDICTS, Configurations, ConnectedBoard, LossVerdict, UnknownWord
from larpixdaq.readout.board_watch import INTERVAL, BoardWatch
from larpixdaq.readout.command_queue import CommandQueue
from larpixdaq.readout.configuration_tracker import ConfigurationTracker
from larpixdaq.readout.delivery import Delivery
from larpixdaq.readout.delivery import add_arguments as add_delivery_arguments
from larpixdaq.readout.readout import FULL_AGAIN, Readout
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.timing import CountRate
from larpixdaq.runtime.units import parse_positive
from larpixdaq.sources import options as source_options
from larpixdaq.sources.command_channel import Channel
from larpixdaq.sources.data_quality import Watch
from larpixdaq.sources.source import BoardStatus, Source
from larpixdaq.stream import jetstream
from larpixdaq.stream.publisher import bind_stream, stream_router
from larpixdaq.stream.uplink import Uplink, uplink_name
from larpixdaq.version import VERSION

log = logging.getLogger("larpixdaq.producer")  # __name__ is "__main__" in the process

DEFAULT_NAME = "LArPix board"
#: Seconds for which the boards are read after `end_run`: at least END_READ_ON, then until their sockets are empty, at
#: most END_LIMIT. A socket is empty when each read() of QUIET seconds took all messages: a single one may be faster
#: than the thread of libzmq that brings the next message from the kernel.
END_READ_ON = 0.2
QUIET = 0.05
END_LIMIT = 5.0
#: Milliseconds without reading after a turn that emptied all boards and made fewer than FEW_ROWS rows. Otherwise each
#: of 5,000 one-word messages a second would take a turn of the loop. The turn closes its block, so that a row is on its
#: way at most one rest after its arrival. At high rates the rest would delay acknowledgements and the storages.
REST, FEW_ROWS = 20, 16_000
#: The same, without closing the block, for sources with small buffers, and while a routine waits for answers of chips.
SHORT_REST = 4
#: The last milliseconds of a rest, in which the threads of libzmq fetch what boards have sent.
FETCH = 1
#: Attempts to ask a board that has connected again for its firmware, because its command server may start later.
FIRMWARE_TRIES = 5
#: Fraction of the ring in use above which a board that waits for room is not called silent.
_ROOM = 0.5
#: Seconds between two looks at the boards for losses, wrong options and clocks.
CHECK_INTERVAL = 1.0


class Producer:
    """Sources, recorder and stream of one producer process, and the actions by which the core drives them."""

    def __init__(
        self,
        options: argparse.Namespace,
        boards: list[Source],
        delivery: Delivery,
        stream: Endpoint,
        uplink: Uplink | None = None,
    ) -> None:
        """`boards` are open, and either all of them wait when the ring is full, or none. `stream`: where it listens.

        `uplink`: to the brokers, which must have each block, in place of the storages.
        """
        self.layout = boards[0].layout
        self.name: str = options.name
        self.epoch = delivery.epoch
        self.boards = boards
        self.delivery = delivery
        self.uplink = uplink
        self.publisher = delivery.publisher
        self._admitted = 0  # the node's changes of which the publisher knows
        self.replaced = False  # another producer has taken the name, and with it the ring
        self.state = "STOP"
        self.ending: tuple[Call, float] | None = None
        self._short_rest = any(source.small_buffer for source in boards)
        self._busy_at = 0.0  # last time at which a read() left data behind
        self._rested = False  # before the present turn
        self._holds = True  # the boards are held in rests, because few data come in one
        self._late = False
        self._watch = Watch()
        self._idle_watch = Watch(math.inf)  # between runs
        self._clock_limit: float = options.clock_limit
        self._clock_warnings: set[str] = set()  # boards with a warning about their clock
        self._check_at = self._watch_at = 0.0
        self._seen: set[int] = set()  # io_groups whose boards were connected
        self._end_requested_ns = 0  # unix ns
        self._counted: int | None = None  # the run whose counters the ring has, also after its end
        # Of the runs before that one, since the process started.
        self._earlier = np.zeros((constants.IO_GROUPS, len(Count)), np.uint64)
        self._earlier_outside = 0  # packets outside of runs that an end record has told
        self._packet_rate = CountRate()
        self._earlier_fifo_full: Counter[int] = Counter()  # by io_group
        io_groups = [group for source in boards for group in source.io_groups]
        self.recorder = BlockBuilder(delivery.ring, self.name, self.epoch, self.layout, io_groups)
        self._board_watch = BoardWatch(io_groups, self.recorder.info)
        asic = source_options.asic_of(options)
        channels = self._channels = [channel for source in boards for channel in source.channels]
        self.tracker = ConfigurationTracker(options.asic)
        self.commands = CommandQueue(channels, asic, self.layout, self._put)
        self._firmware_requested: set[int] = set()  # io_groups, before this run
        self._firmware_tries: dict[int, int] = {}  # by io_group that has connected again: attempts that are left
        self._firmware: dict[str, str] = {}  # by io_group, the last answers of the boards
        by_group = {channel.io_group: (channel.kind, channel.revision, channel.uarts) for channel in channels}
        infos = []
        for source in boards:
            for group in source.io_groups:
                kind, revision, uarts = by_group.get(group, ("", 0, 0))
                infos.append(hardware.BoardInfo(group, kind, source.name, revision, uarts))
        settings = located(options.power_settings or "")
        setup = hardware.Setup(infos, options.asic, int(asic), self.layout.code, power_settings=settings)
        self.child = Child(options.routines, self.commands, setup, self.tracker, self._record_changes)
        self.readout = Readout(
            boards,
            self.recorder,
            delivery.ring,
            wait=boards[0].waits,
            listener=self.child,
            record_sent=options.record_sent,
        )
        self.node = Node(
            self.name,
            "producer",
            options.core,
            {
                "prepare_run": self.prepare_run,
                "begin_run": self.begin_run,
                "end_run": self.end_run,
                "abort_run": self.abort_run,
                "cancel_run": self.cancel_run,
                "list_routines": self.child.list_routines,
                "load_routines": self.child.load_routines,
                "run_routine": self.child.run_routine,
                "abort_routine": self.child.abort_routine,
                **{action: self._action(action) for action in HARDWARE_ACTIONS},
            },
            info={
                "stream": [stream.address, stream.key],
                "brokers": "" if uplink is None else uplink.status().brokers,
                "epoch": self.epoch,
                "layout": self.layout.code,
                "asic": options.asic,
                "io_groups": sorted(set(io_groups)),
                "source": "; ".join(source.name for source in boards),
                "connected": self._connected(),
                "versions": {
                    "larpix-daq producer": VERSION,
                    "larpix-control": metadata.version("larpix-control"),
                    "numpy": metadata.version("numpy"),
                    "Python": platform.python_version(),
                },
            },
            status=self.status,
            on_name_taken=self.name_taken,
            module=options.module,
            insecure=options.insecure,
        )

    # the loop

    def run(self, signals: Signals) -> None:
        """Read, record and serve until a signal comes."""
        self.node.connect(signals=signals)
        self._warn_of_inherited()
        poller, resting = zmq.Poller(), zmq.Poller()
        requests, child, spool = self.node.fileno(), self.child.fileno(), self.delivery.fileno()
        for readable in (signals.fileno(), requests, child):
            poller.register(readable, zmq.POLLIN)
            resting.register(readable, zmq.POLLIN)
        for socket in self.publisher.sockets():  # these, and the spool's thread, can wait for the end of a rest
            poller.register(socket, zmq.POLLIN)
        poller.register(spool, zmq.POLLIN)
        uplink = self.uplink
        if uplink is not None:
            poller.register(uplink.fileno(), zmq.POLLIN)
        self.readout.watch(poller)
        while not signals.stop:
            ready = {found for found, _ in poller.poll(self.node.wait_ms(self._due()))}
            if requests in ready:
                self.node.dispatch()
            if self.node.changes != self._admitted:  # connect() has changed them, too
                self._admitted = self.node.changes
                self.publisher.admit(self.node.update)
            if child in ready:
                self.child.dispatch()
            if uplink is not None and (uplink.fileno() in ready or uplink.is_due()):
                uplink.work()
            if self.commands.busy:  # before the boards are read, so that a word precedes its answer
                self.commands.work()
                self.commands.watch(poller)
            busy = self.readout.turn(poller)
            if not self.readout.quiet:
                self._busy_at = time.monotonic()
            if self._rested:
                self._rested, self._holds = False, self.readout.rows < FEW_ROWS
            rest = self._rest() if busy else 0
            if rest == REST:
                self.recorder.close_block()
            self.recorder.work()
            if self.ending is not None:
                self._end_when_quiet()
            # After the end of a run, so that its end record does not wait for the next turn.
            self.delivery.work(spool_ready=spool in ready)
            now = time.monotonic()
            if now >= self._watch_at:
                self._watch_boards()
            if now >= self._check_at:
                self._check_boards()
            self.node.report(self.readout.batches + self.publisher.freed, 0)
            if rest:
                self._sleep(rest, resting)

    def _warn_of_inherited(self) -> None:
        """Log which consumers of a predecessor's blocks do not come to this producer, because only one of both has
        --stream."""
        own = uplink_name(self.name)
        waiting = {name for name in self.publisher.required() if (name == own) != (self.uplink is not None)}
        if waiting:
            log.warning(
                "%s: blocks of its predecessor wait for %s, who take them from a producer %s --stream only",
                self.name, ", ".join(sorted(waiting)), "with" if self.uplink is None else "without",
            )  # fmt: skip

    def _rest(self) -> int:
        """Milliseconds without reading after a turn in which there were data."""
        if not self.readout.quiet or self.readout.rows >= FEW_ROWS or self.commands.busy:
            return 0
        return SHORT_REST if self._short_rest or self.child.listening else REST

    def _sleep(self, rest: int, poller: zmq.Poller) -> None:
        """Wait for `rest` milliseconds, or a request.

        Nothing is held at the end of a run, when nothing may be late, nor at high rates, at which it saves nothing.
        """
        self._rested = True
        if self.ending is not None or not self._holds:
            poller.poll(rest)
            return
        self.readout.hold(True)
        requested = poller.poll(rest - FETCH)
        self.readout.hold(False)
        if not requested:
            poller.poll(FETCH)

    def _due(self) -> float | None:
        """Return the time of the next work without a readable descriptor (monotonic seconds)."""
        now = time.monotonic()
        limits = [now + seconds for seconds in self.readout.due()]
        limits += self.commands.due()
        if self.commands.blocked:
            limits.append(now + FULL_AGAIN)
        block = self.recorder.due()
        if block is not None:
            limits.append(block)
        if self.ending is not None:
            limits.append(now + 0.01)
        if self.publisher.unsent:
            limits.append(now)
        if self.uplink is not None:
            limits.append(self.uplink.due())
        return min(limits, default=None)

    def close(self) -> None:
        if self.recorder.run is not None and not self.replaced:
            self._finish("aborted")
        self.delivery.close(leave=self.replaced)
        if self.uplink is not None:
            self.uplink.close()
        self.child.close()
        self.node.close()

    def name_taken(self) -> None:
        """End this producer, because it stood still and another one took its name, which will deliver its blocks."""
        self.replaced = True
        raise RequestError(f"{self.name}: another component has taken this name and delivers the pending blocks")

    # actions

    def _action(self, action: str) -> Callable[..., None]:
        """Return the handler of an action on chips or boards, which the child process checks and executes."""

        def act(call: Call, /, **params: Any) -> None:
            self.child.act(call, action, params)

        return act

    def prepare_run(self, call: Call, run: int, kind: str, comment: str, operator: str, required: list[str]) -> Any:
        self._expect("STOP")
        boards = self._boards()
        self._late = self.node.state != "STOP"  # this producer joins a run that has begun
        refusals = [board.refusal for board in boards if board.refusal]
        if refusals and not self._late:  # in a run that has begun, data with half of their time are better than none
            raise StateError("; ".join(refusals))
        if self.uplink is not None:
            required = [self.uplink.name]
            if (problem := self.uplink.status().problem) and not self._late:
                raise StateError(f"{self.name}: {problem}")
        earlier = self._earlier + self.delivery.ring.counts
        self.recorder.begin(run, required)
        self._counted, self._earlier = run, earlier
        self.publisher.begin(run, self.layout.code, required)
        self.readout.record(True)
        self._watch.start()
        self._board_watch.start()
        self._firmware_requested.clear()
        self._idle_watch.start()
        self._end_requested_ns = 0
        known = self.tracker.configurations()
        self._put_configurations(known)
        self.child.new_power_reports()
        self._put_texts(list(self.child.power_reports.values()))
        self.state = "READY"
        warnings = [*_warnings(boards, self._clock_limit), known.differences()]
        warning = "; ".join(line for line in warnings if line)
        return ProducerReady(self.epoch, self.layout.code, f"{self.name}: {warning}" if warning else None)

    def begin_run(self, call: Call, run: int) -> Any:
        self._expect("READY", run)
        self.recorder.info("Resuming run" if self._late else "Beginning run")
        self.readout.play()
        self.state = "RUN"
        return {}

    def end_run(self, call: Call, run: int) -> Any:
        self._expect("READY RUN", run)
        if self.ending is not None:
            raise StateError(f"run {run} is being ended already")
        self.ending = (call, time.monotonic())
        self._end_requested_ns = time.time_ns()

    def abort_run(self, call: Call, run: int) -> Any:
        self._expect("READY RUN", run)
        if self.ending is not None:
            self.ending[0].fail(f"run {run} was aborted meanwhile", "state")
            self.ending = None
        return self._finish("aborted")

    def cancel_run(self, call: Call, run: int) -> Any:
        """Give up the run, because another component could not prepare or begin it. Its blocks are not stored."""
        if self.recorder.run != run:
            return {}
        self.delivery.own.release(run)
        return self._finish("aborted", delivered=False)

    def _connected(self) -> list[dict[str, Any]]:
        """Return the connected boards for the run's files. Their firmware is in the status, because it comes later."""
        host = platform.node()
        return [
            msgspec.to_builtins(ConnectedBoard(self.name, io_group, source.kind[:16], source.address[:256], host[:256]))
            for source in self.boards
            for io_group in source.io_groups
        ]

    def _identify(self) -> None:
        """Ask boards for their firmware once before each run, when they are known to understand the request."""
        for channel in self._channels:
            if channel.io_group not in self._firmware_requested and channel.identify:
                self._firmware_requested.add(channel.io_group)
                self.commands.send_order(channel.io_group, channel.identify, partial(self._take_firmware, channel))

    def _take_firmware(self, channel: Channel, answer: bytes, error: str) -> None:
        if error:
            if left := self._firmware_tries.get(channel.io_group, 0):
                self._firmware_tries[channel.io_group] = left - 1
                self._firmware_requested.discard(channel.io_group)
        else:
            self._firmware[str(channel.io_group)] = channel.firmware(answer)
            if self.recorder.run is not None:
                self._board_watch.take_identity(channel.io_group, channel.identity(answer), time.monotonic())

    def _put(self, rows: NDArray[Any], io_group: int) -> int:
        """Record rows of words about to be sent. Returns the number of rows that had room."""
        n = self.readout.put(rows, io_group)
        self.tracker.record_sent(rows[:n])
        return n

    def _record_changes(self) -> None:
        """Record the configurations of chips with new writes or answers, and new reports on supplies, in a run."""
        if self.recorder.run is not None:
            self._put_configurations(self.tracker.changes())
            self._put_texts(self.child.new_power_reports())

    def _put_texts(self, texts: list[str]) -> None:
        """Record INFO messages in the run."""
        for text in texts:
            if not self.recorder.info(text):
                log.warning("the ring is full: not in the file: %s", text)

    def _put_configurations(self, configurations: Configurations) -> None:
        """Record configurations in the run, and mark all changes as reported."""
        self.tracker.mark_reported()
        for piece in configurations.pieces():
            if not self.recorder.info(piece.text(), piece.pack()):
                log.warning("the ring is full: not in the file: %s", piece.text())

    def _expect(self, states: str, run: int | None = None) -> None:
        if self.state not in states.split():
            raise StateError(f"{self.name}: expected state {' or '.join(states.split())}, is in {self.state}")
        if run is not None and run != self.recorder.run:
            raise StateError(f"{self.name}: asked about run {run}, is in run {self.recorder.run}")

    def _end_when_quiet(self) -> None:
        assert self.ending is not None
        call, since = self.ending
        now = time.monotonic()
        age = now - since
        busy = now - self._busy_at < QUIET
        if age < END_READ_ON or (busy and age < END_LIMIT):
            return
        self.ending = None
        text = f"{self.name}: boards still sent {END_LIMIT:g} s after end_run; later data are not in this run"
        warnings = [*([text] if busy else []), *(f"{board.name}: {board.clock}" for board in self._off_clocks())]
        end = self._finish("closed")
        end.warning = "; ".join(warnings) or None
        call.result(end)

    def _finish(self, how: str, *, delivered: bool = True) -> ProducerEnd:
        """End the run. `delivered`: storages get the end record; otherwise the next end record also has the counts of
        data outside of runs."""
        if how == "closed":
            self.recorder.info("Ending run")
        unknown = [
            UnknownWord(int(w["io_group"]), int(w["seconds"]), int(w["reason"]), w["raw"][: w["size"]].tobytes())
            for w in self.readout.take_unknown()
        ]
        outside = self.delivery.ring.outside_counts
        verdicts = self._verdicts()
        now = self._end_requested_ns or time.time_ns()
        clocks = {
            board.io_group: LossVerdict(board.io_group, VERDICTS[0], str(board.clock), 0, self.recorder.began_ns, now)
            for board in self._boards()
            if board.clock is not None
        }
        verdicts = [line for line in verdicts if line.why or line.io_group not in clocks] + list(clocks.values())
        end = self.recorder.end(how, unknown, self.recorder.counts(outside), verdicts)
        if delivered:
            self._earlier_outside += int(outside[:, Count.PACKETS].sum())
            outside[:] = 0
        self._earlier_fifo_full.update({board.io_group: board.fifo_full for board in self._boards()})
        self.publisher.end()
        self.readout.record(False)
        self.state = "STOP"
        answer = ProducerEnd.of(end)
        answer.inherited = self.delivery.inherited(end.run)
        return answer

    def _verdicts(self) -> list[LossVerdict]:
        """Return the verdicts on the data of each io_group, and log new findings."""
        now = self._end_requested_ns or time.time_ns()
        own = self.delivery.own
        made, stored, wall = own.head, own.acknowledged(), time.time_ns()
        for source in self.boards:
            source.delivered(made, stored, wall)
        verdicts = [line for source in self.boards for line in source.evidence(now)]
        verdicts += self._unusable(now)
        self._warn(self._watch, verdicts)
        return verdicts

    def _unusable(self, now: int) -> list[LossVerdict]:
        """Return a line for each io_group with mostly unknown or rejected words in this run."""
        lines = []
        for io_group, *counts in self.recorder.counts():
            counters = dict(zip(constants.COUNTS, counts, strict=True))
            if why := unusable(counters):
                refused = counters["unknown_words"] + counters["rejected_words"]
                lines.append(LossVerdict(io_group, VERDICTS[-1], why, refused, self.recorder.began_ns, now))
        return lines

    def _watch_boards(self) -> None:
        """Record what changes at the boards in a run. A board that has connected again is asked for its firmware,
        because it may be another one."""
        now = time.monotonic()
        self._watch_at = now + INTERVAL
        if self.recorder.run is None or self.ending is not None or self.boards[0].recorded:
            return
        alone = self.child.running is None and not self.commands.busy and self.delivery.ring.fill < _ROOM
        packets = dict(enumerate(self.delivery.ring.counts[:, Count.PACKETS].tolist()))
        if back := self._board_watch.take(self._boards(), packets, now, alone=alone):
            self._firmware_requested.difference_update(back)
            self._firmware_tries.update(dict.fromkeys(back, FIRMWARE_TRIES))
            self._identify()

    def _check_boards(self) -> None:
        """Ask for firmware, and log new findings about the boards: in this run or, between runs, for the next one."""
        self._identify()
        for board in self._boards():
            if not board.away_ns and board.io_group not in self._seen:
                self._seen.add(board.io_group)
                log.info("%s: connected (io_group %d)", board.name, board.io_group)
        for board in self._off_clocks():
            if board.name not in self._clock_warnings:
                self._clock_warnings.add(board.name)
                log.warning("%s: %s", board.name, board.clock)
        if self.recorder.run is not None:
            self._verdicts()
        else:
            self._warn(self._idle_watch, [line for board in self._boards() for line in board.setup])
        self._check_at = time.monotonic() + CHECK_INTERVAL

    def _boards(self) -> list[BoardStatus]:
        return [board for source in self.boards for board in source.boards()]

    def _off_clocks(self) -> list[BoardStatus]:
        """Return the boards whose clocks differ from the host's by more than --clock-limit."""
        return [board for board in self._boards() if board.clock and board.clock.exceeds(self._clock_limit)]

    def _warn(self, watch: Watch, verdicts: list[LossVerdict]) -> None:
        for line in watch.update(verdicts, time.monotonic()):
            log.warning("%s", line)

    def status(self) -> ProducerStatus:
        total = self.delivery.ring.counts.sum(axis=0).tolist()
        outside = int(self.delivery.ring.outside_counts[:, Count.PACKETS].sum())
        packets = int(self._earlier[:, Count.PACKETS].sum()) + total[Count.PACKETS] + self._earlier_outside + outside
        boards = self._boards()
        return ProducerStatus(
            **msgspec.structs.asdict(self.delivery.status()),
            run=self.recorder.run,
            state=self.state,
            counted_run=self._counted,
            packets=total[Count.PACKETS],
            dropped=total[Count.DROPPED],
            unknown=total[Count.UNKNOWN_WORDS] + total[Count.REJECTED_WORDS],
            bad_parity=total[Count.BAD_PARITY],
            outside_run=outside,
            rate=self._packet_rate.per_second(packets),
            totals=self.recorder.counts(self._earlier + self.delivery.ring.counts),
            total_outside=self._earlier_outside + outside,
            boards=[_report(board, self._board_watch.changed(board.io_group)) for board in boards],
            groups=self._group_reports(boards),
            waits=self.boards[0].waits,
            verdicts={str(io_group): verdict for io_group, verdict in sorted(self._watch.worst.items())},
            finished=all(source.finished for source in self.boards),
            firmware=dict(self._firmware),
            pixel_layout=self.child.pixel_layout,
            uplink=None if self.uplink is None else self.uplink.status(),
        )

    def _group_reports(self, boards: list[BoardStatus]) -> list[IoGroupReport]:
        """Return the counts of each io_group in the counted run."""
        counts = self.delivery.ring.counts
        reports = []
        for board in boards:
            packets, bad_parity = counts[board.io_group, [Count.PACKETS, Count.BAD_PARITY]].tolist()
            silent = self._board_watch.silent(board.io_group)
            fifo_full = self._earlier_fifo_full[board.io_group]
            fifo_full += board.fifo_full if self.recorder.run is not None else 0
            reports.append(IoGroupReport(board.io_group, packets, bad_parity, board.fifo_full, silent, fifo_full))
        return reports


def _warnings(boards: list[BoardStatus], limit: float) -> list[str]:
    """Return the warnings about boards for prepare_run. `limit`: maximum offset of their clocks, in seconds."""
    warnings = []
    for board in boards:
        if board.away_ns:
            problem = f" ({board.problem})" if board.problem else ""
            warnings.append(f"{board.name} is not connected{problem}")
        if board.clock is not None and board.clock.exceeds(limit):
            warnings.append(f"{board.name}: {board.clock}")
        warnings += [f"io_group {board.io_group}: {line.why}" for line in board.setup]
    return warnings


def _report(board: BoardStatus, changed: str | None) -> BoardReport:
    return BoardReport(
        board.io_group,
        board.name,
        board.away_ns / 1e9 if board.away_ns else None,
        board.problem,
        None if board.clock is None else ClockReport(*board.clock, str(board.clock)),
        [*(line.why for line in board.setup), *([board.refusal] if board.refusal else [])],
        changed,
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-producer", description="Launch a producer: reads packets from boards and sends them on"
    )
    config.add_component_arguments(parser, DEFAULT_NAME)
    source_options.add_arguments(parser)
    config.add_state_dir_argument(parser)
    config.add_address_argument(parser, None, " (default: the interface that reaches the core, a free port)")
    add_own_arguments(parser)
    return parser


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a producer beside those of its sources."""
    add_delivery_arguments(parser)
    jetstream.add_arguments(parser, "on which blocks are kept for the storages, in place of ring and spool alone")
    jetstream.add_settings_arguments(parser)
    parser.add_argument(
        "--routines", action="append", default=[], type=Path, metavar="DIR",
        help="another directory of routine files, from which operators may also load routines; they are programs and "
        "run with your rights",
    )  # fmt: skip
    parser.add_argument(
        "--power-settings", metavar="FILE",
        help="DACs, limits and tiles of each PACMAN for power_up: a JSON file with the keys of a RUN_CONFIG.json, or "
        "its content, which begins with {",
    )  # fmt: skip
    parser.add_argument(
        "--clock-limit", type=parse_positive, default=1.0, metavar="SECONDS",
        help="warn when a board's clock differs from the host's by more than this (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--no-record-sent", action="store_false", dest="record_sent",
        help="do not record words that are sent to the chips (default: rows with direction 0)",
    )  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Raise LarpixDaqError for options that cannot work on this machine."""
    _check_power_settings(options)
    jetstream.brokers_of(options)
    source_options.create(options)


def _check_power_settings(options: argparse.Namespace) -> None:
    if options.power_settings:
        try:
            read_settings(options.power_settings)
        except RequestError as error:
            raise ConfigError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)

    def work() -> None:
        with contextlib.ExitStack() as stack:
            for folder in options.routines:
                if not folder.is_dir():
                    raise ConfigError(f"--routines {folder}: no such directory")
            _check_power_settings(options)
            brokers = jetstream.brokers_of(options)
            boards = source_options.create(options)
            waits = options.when_full == "wait" if options.when_full else all(source.waits for source in boards)
            for source in boards:
                source.waits = waits
            for source in boards:  # first, so that a wrong device or file is reported at once
                stack.callback(source.close)
                source.open()
            listening_ns = time.time_ns()
            state = state_dir(options.state_dir)
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=200)
            socket = stream_router(context)
            pair = None if options.insecure else new_pair()
            admission = Admission(context, pair, "stream")
            stack.callback(admission.door.close)
            admission.door.guard(socket)
            address = bind_stream(socket, options.address, options.core)
            epoch = secrets.randbits(64)
            delivery = Delivery(
                options, state, epoch, socket, spill=not waits, listening_ns=listening_ns, admission=admission
            )
            stack.callback(delivery.close)
            endpoint = Endpoint(address, pair.public if pair is not None else "")
            uplink: Uplink | None = None
            if brokers is not None:
                settings = jetstream.settings_of(options, brokers)
                uplink = Uplink(delivery.publisher, endpoint, options.name, brokers, settings)
            producer = Producer(options, boards, delivery, endpoint, uplink)
            stack.callback(producer.close)
            producer.run(stack.enter_context(Signals()))
        if delivery.failure:
            raise RingError(delivery.failure)

    return run_main(work, log_level=options.log_level)


if __name__ == "__main__":
    sys.exit(main())
