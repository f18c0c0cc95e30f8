"""Command `larpixdaq-emulator pacman`: its options, and the loop that drives the emulated boards."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq._native import board_emulator
from larpixdaq.emulators import detector, revisions
from larpixdaq.emulators.board import BATCH, QUEUE, EmulatedBoard, FaultPlan, Faults, MessageSource
from larpixdaq.emulators.board_registers import BoardRegisters
from larpixdaq.emulators.chips import SUPPLIES, TICKS_PER_BIT
from larpixdaq.emulators.recording import Recording
from larpixdaq.emulators.tile import EmulatedTile, TileBoard
from larpixdaq.errors import ConfigError, UsageError
from larpixdaq.runtime.event_loop import Signals
from larpixdaq.runtime.units import parse_whole
from larpixdaq.schema import ASICS
from larpixdaq.sources.command_channel import COMMAND_PORT, DATA_PORT

DESCRIPTION = """\
Sends what PACMAN boards send (legacy format: 8-byte headers, 16-byte words), one board per io_group. At the start it
prints one JSON line with the ports, {"ready": {"1": {"data": 5556, "command": 5555}}}; at the end one with the words
that were sent, {"sent": {"1": {"words": 10, "D": 9, "S": 0, "T": 1, "messages": 10}}, "seconds": 0.1}. SIGINT and
SIGTERM end it cleanly. Faults on request, from --fifo-full to --restart, are counted exactly in that line, too."""

#: Difference between the ports of consecutive io_groups if only one port is given.
PORT_STEP = 10
#: Seconds for which unsent messages are kept at the end.
LINGER = 10
#: Seconds before the end in which libzmq's thread notices subscribers that have just gone. If it notices them only
#: after the closing of their socket, it keeps their messages for LINGER: `larpixdaq down` ends a producer, and then its
#: board.
NOTICE = 0.1
#: Start of the board's clock in ticks: 2 s before the chips' 31-bit timestamps roll over, so that each run has this.
CLOCK_START = 2**31 - 20_000_000
#: Words/s on the board's clock with --rate max: a PACMAN with 32 busy io_channels.
SATURATED_RATE = 2_420_000.0
#: Maximum seconds of --slow-read.
MAX_SLOW_READ: Final = 60.0
#: Maximum mA of --overload.
MAX_OVERLOAD: Final = 20_000.0
#: Range of the words/s of a board.
LOWEST_RATE: Final = 10.0
HIGHEST_RATE: Final = 1e9


class Emulator:
    """Runs all boards in one thread. `seconds`: time of the last sent word."""

    def __init__(self, boards: list[EmulatedBoard], signals: Signals, args: argparse.Namespace) -> None:
        self.seconds = 0.0
        self._boards = boards
        self._signals = signals
        self._args = args
        self._wait_for_go: bool = args.wait_for_go
        self._input = b""
        self._poller = zmq.Poller()
        self._poller.register(signals.fileno(), zmq.POLLIN)
        self._handlers: dict[Any, Callable[[], None]] = {}

    def _update_sockets(self) -> None:
        """Poll the open sockets: a data port may be closed and opened again, and a command server may crash."""
        handlers: dict[Any, Callable[[], None]] = {0: self._read_go} if self._wait_for_go else {}
        for board in self._boards:
            if not board.command.closed:
                handlers[board.command] = board.serve_request
            if not board.data.closed:
                handlers[board.data] = board.read_subscriptions
        for socket in self._handlers.keys() - handlers.keys():
            self._poller.unregister(socket)
        for socket in handlers.keys() - self._handlers.keys():
            self._poller.register(socket, zmq.POLLIN)
        self._handlers = handlers

    def _read_go(self) -> None:
        data = os.read(0, 4096)
        self._input += data
        if not data:
            self._signals.stop = True
        elif b"go" in self._input.split(b"\n")[:-1]:
            self._wait_for_go = False
        else:
            self._input = self._input.rpartition(b"\n")[2][-4096:]

    def _subscribed(self) -> bool:
        return not self._args.wait_for_subscriber or all(board.subscribed for board in self._boards)

    def run(self, report: Callable[[], None]) -> None:
        """Run until the last word or a signal. `report()` is called once, when ZeroMQ has taken the last word."""
        started: float | None = None
        reported = False
        while not self._signals.stop:
            now = time.monotonic()
            wait = float("inf")
            if started is None and not self._wait_for_go and self._subscribed():
                started = now
            if started is not None:
                wait = min(board.turn(now) for board in self._boards)
                if not reported:
                    self.seconds = time.monotonic() - started
                    if all(board.finished for board in self._boards):
                        reported = True
                        report()
                        if not self._args.stay:
                            return
            wait = min(wait, *(board.reply() for board in self._boards))
            self._update_sockets()
            for socket, _ in self._poller.poll(0 if wait <= 0 else max(1, int(min(wait, 1.0) * 1000))):
                if socket in self._handlers:  # else a signal has come
                    self._handlers[socket]()
        if not reported:
            report()


def _rate(text: str) -> float | None:
    if text == "max":
        return None
    rate = float(text)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise argparse.ArgumentTypeError(f"expected 10 to 1e9 words/s or max, found {text}")
    return rate


def words_per_message(text: str) -> int:
    """Parse --words-per-message; 0 for auto."""
    words = 0 if text == "auto" else int(text)
    if not 0 <= words <= 65_535 or text == "0":
        raise argparse.ArgumentTypeError(f"expected 1 to 65535 words or auto, found {text}")
    return words


def _time_and_seconds(text: str) -> tuple[float, float]:
    at, colon, seconds = text.partition(":")
    if not colon or float(at) < 0:
        raise argparse.ArgumentTypeError(f"expected AT:SECONDS, found {text}")
    return float(at), float(seconds)


def _tiles_and_ma(text: str) -> dict[int, float]:
    overload = {}
    for part in text.split(","):
        tile, colon, ma = part.partition(":")
        if not colon or not tile.isdecimal() or not 0 <= float(ma) <= MAX_OVERLOAD:
            raise argparse.ArgumentTypeError(f"expected TILE:MA,... with up to {MAX_OVERLOAD:g} mA, found {text}")
        overload[int(tile)] = float(ma)
    return overload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--io-groups", type=parse_whole, default=1, metavar="N", help="boards, io_groups 1 to N (default 1)")
    add(
        "--revision",
        choices=sorted(revisions.REVISIONS),
        default=revisions.DEFAULT,
        help="hardware revision of the boards, with its registers; 3b is 3 with UARTs of 50 MHz, 4m2 is 4 with the "
        "firmware of Module 2, 5u32 is 5 with the firmware of 32 UARTs (default %(default)s)",
    )
    add(
        "--inverted",
        action="store_true",
        help="tiles with inverted lines, for which registers 0x1C of the UARTs have to be 3 (with --chips)",
    )
    add(
        "--slow-read",
        type=float,
        metavar="SECONDS",
        help="time that a board sleeps before it answers a read of VDDD or its current (default 1 of revision 4, "
        "0.01 of 5, 0 of others)",
    )
    add(
        "--rate",
        type=_rate,
        default=5000.0,
        metavar="R",
        help="words/s of each board, or max (default 5000); with --chips their registers decide",
    )
    add(
        "--words-per-message",
        type=words_per_message,
        default="auto",
        metavar="W",
        help="words in a message, or auto: all that are complete when the board sends, as real ones do (default auto)",
    )
    add(
        "--replay",
        type=Path,
        metavar="FILE",
        help="send the messages of this file, byte for byte: raw HDF5 or a log (u32 length + message); or of a packet "
        "file, whose rows become messages again. Each board sends those of its io_group; a log has none, and each "
        "board sends all of it",
    )
    fraction: dict[str, Any] = {"type": detector.fraction, "default": 0.0, "metavar": "F"}
    add("--seed", type=int, default=0, metavar="S", help="seed of the random numbers (default 0)")
    add("--io-channels", type=parse_whole, default=8, metavar="N", help="without --chips, at most 255 (default 8)")
    add("--chips-per-io-channel", type=parse_whole, default=16, metavar="N", help="the same, at most 240 (default 16)")
    add("--odd", **fraction, help="fraction of odd packets, such as bad parity (default 0)")
    add("--fifo-full", **fraction, help="fraction of packets with the flag of a full FIFO (default 0)")
    add("--skip", **fraction, help="fraction of messages that are not sent (default 0)")
    add("--double", **fraction, help="fraction of messages that are sent twice (default 0)")
    add("--lie", **fraction, help="fraction of messages that count more words than they hold (default 0)")
    event: dict[str, Any] = {"type": _time_and_seconds, "metavar": "AT:SECONDS"}
    add("--away", **event, help="after AT seconds close the data port for SECONDS")
    add("--jump", **event, help="after AT seconds move the clock for the headers by SECONDS")
    add("--restart", type=float, metavar="AT", help="after AT seconds restart both clocks, as after a reset")
    add(
        "--reboot",
        **event,
        help="after AT seconds restart the board, whose ports are closed for SECONDS: its tiles have no power then, "
        "and all registers their values at power-up (with --chips)",
    )
    add(
        "--overload",
        type=_tiles_and_ma,
        default={},
        metavar="TILE:MA,...",
        help="tiles (from 0) of each board that draw so many mA too much of both supplies, at 1.8 V (with --chips)",
    )
    add("--pps", action="store_true", help="reset the board's clock each second, as with an external sync")
    add(
        "--lossless",
        action="store_true",
        help="wait for subscribers and for room in their queues, instead of dropping messages as a board does",
    )
    add(
        "--queue",
        type=parse_whole,
        default=QUEUE,
        metavar="N",
        help="without --lossless: messages that may wait for a subscriber (default %(default)d, as on a board)",
    )
    add("--count", type=parse_whole, metavar="N", help="end after N words of each board")
    add("--wait-for-subscriber", action="store_true", help="begin when each board has a subscriber")
    add("--wait-for-go", action="store_true", help="begin at a line 'go' on standard input, end at its end")
    add("--stay", action="store_true", help="after the last word stay connected until SIGINT or SIGTERM")
    add("--address", default="127.0.0.1", metavar="IP", help="address to bind (default 127.0.0.1)")
    for name, default in (("data", DATA_PORT), ("command", COMMAND_PORT)):
        add(
            f"--{name}-port",
            type=partial(parse_whole, low=0, high=65_535),
            nargs="+",
            default=[default],
            metavar="P",
            help=f"{name} ports, one per io_group, or that of the first io_group, with the others {PORT_STEP} apart; "
            f"0: any free port (default {default})",
        )
    add(
        "--echo-port",
        type=partial(parse_whole, low=0, high=65_535),
        nargs="+",
        metavar="P",
        help="ports on which the command servers repeat their replies, as --command-port; a PACMAN uses 5554 (default: "
        "none)",
    )
    detector.add_arguments(parser)


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(prog="larpixdaq-emulator pacman", description=DESCRIPTION)
    add_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check the options, and set `args.detector` (the chips) and `args.groups` (the io_groups).

    Raises UsageError if options exclude each other, ConfigError and FileError for the file of --chips.
    """
    if args.io_groups > 255:
        raise UsageError(f"--io-groups: at most 255, found {args.io_groups}")
    if args.io_channels > 255 or args.chips_per_io_channel > 240:
        found = f"{args.io_channels} and {args.chips_per_io_channel}"
        raise UsageError(f"--io-channels, --chips-per-io-channel: at most 255 and 240, found {found}")
    if args.chips is not None and (args.replay or args.odd or args.fifo_full):
        raise UsageError("--chips determines the packets: no --replay, no --odd, no --fifo-full")
    if args.slow_read is not None and not 0 <= args.slow_read <= MAX_SLOW_READ:
        raise UsageError(f"--slow-read: expected 0 to {MAX_SLOW_READ:g} seconds, found {args.slow_read}")
    for name in ("reboot", "overload"):
        if getattr(args, name) and args.chips is None:
            raise UsageError(f"--{name} goes with --chips")
    revision = revisions.REVISIONS[args.revision]
    args.detector = detector.check_arguments(args, revision.io_channels)
    if args.inverted and not (args.chips and revision.inversion):
        raise UsageError(
            "--inverted goes with --chips, and with boards that can invert, which those of revision 2 cannot"
        )
    for io_group, board in args.detector.boards.items():
        unknown = {io_channel for io_channel, _ in board.keys if io_channel not in revision.io_channels}
        if unknown:
            known = revision.io_channels
            without = "" if len(known) == known[-1] else ", without 12, 16, 20 and so on"
            raise ConfigError(
                f"{args.chips}: io_group {io_group} has chips on io_channel {min(unknown)}, a board of revision "
                f"{args.revision} has io_channels 1 to {known[-1]}{without}"
            )
    args.groups = list(args.detector.boards) or list(range(1, args.io_groups + 1))
    n = len(args.groups)
    if args.replay and (args.count or args.words_per_message):
        raise UsageError("--replay sends the recorded messages as they are: no --count, no --words-per-message")
    if args.skip + args.double + args.lie > 1:
        raise UsageError(
            "--skip, --double, --lie: a message has at most one of these faults, so they add up to at most 1"
        )
    if args.replay and (args.jump or args.restart is not None):
        raise UsageError("--replay sends the recorded messages with their times: no --jump, no --restart")
    named = ("--data-port", args.data_port), ("--command-port", args.command_port), ("--echo-port", args.echo_port)
    for name, ports in named:
        if ports is None:
            continue
        if len(ports) not in (1, n):
            raise UsageError(f"{name}: expected 1 port or {n}, one per io_group, found {len(ports)}")
        if len(ports) == 1 and ports[0] + PORT_STEP * (n - 1) > 65_535:
            raise UsageError(f"{name}: {ports[0]} leaves no room for {n} io_groups {PORT_STEP} ports apart")


def listening_ports(args: argparse.Namespace) -> list[int]:
    """Return the ports that the options name. Those of further boards are known only if --chips is no file."""
    is_file = args.chips is not None and not args.chips.isdigit()
    every = args.data_port, args.command_port, args.echo_port or []
    return [
        port for ports in every if ports for port in _ports(ports, len(ports) if is_file else args.io_groups) if port
    ]


def _ports(ports: list[int], n: int) -> list[int]:
    if len(ports) == n:
        return ports
    return [ports[0] + PORT_STEP * k if ports[0] else 0 for k in range(n)]


def _message_source(args: argparse.Namespace, io_group: int) -> MessageSource:
    if args.replay:
        return Recording(args.replay, io_group, tuple(args.groups))
    return board_emulator.PacmanBoard(
        ASICS[args.asic],
        rate=args.rate or SATURATED_RATE,
        seed=args.seed * 256 + io_group,
        seconds=int(time.time() - CLOCK_START / 1e7),
        tick=CLOCK_START,
        io_channels=args.io_channels,
        chips=args.chips_per_io_channel,
        pps=args.pps,
        odd=args.odd,
        fifo_full=args.fifo_full,
        words=max(BATCH, args.words_per_message),
    )


def _board(args: argparse.Namespace, io_group: int) -> EmulatedBoard:
    plan = FaultPlan(args.skip, args.double, args.lie, args.away, args.jump, args.restart, args.reboot)
    options: dict[str, Any] = {
        "per_message": args.words_per_message,
        "lossless": args.lossless,
        "queue": args.queue,
        "limit": args.count,
        "faults": Faults(plan, args.seed * 256 + io_group) if plan != FaultPlan() else None,
    }
    revision = revisions.REVISIONS[args.revision]
    if not args.detector.boards:
        # boards that send have power
        chips = [4 * args.chips_per_io_channel] * -(-args.io_channels // 4)
        registers = BoardRegisters(revision, chips=chips, slow_read=args.slow_read)
        registers.switch_on((1 << revision.tiles) - 1, SUPPLIES[args.asic].usual, TICKS_PER_BIT[args.asic])
        return EmulatedBoard(io_group, _message_source(args, io_group), registers, rate=args.rate, **options)
    noise = detector.make_noise(args, io_group)
    registers = detector.make_registers(args, revision, noise.chips)
    tile = EmulatedTile(
        noise,
        seconds=int(time.time() - CLOCK_START / 1e7),
        tick=CLOCK_START,
        pps=args.pps,
        losses=detector.make_losses(args, io_group),
        registers=registers,
    )
    return TileBoard(io_group, tile, registers, **options)


def run(args: argparse.Namespace) -> None:
    """Emulate the boards of the command line until the last word, SIGINT or SIGTERM. Raises ConfigError, FileError."""
    with Signals() as signals, contextlib.ExitStack() as stack:
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.term)
        boards: list[EmulatedBoard] = []
        data = _ports(args.data_port, len(args.groups))
        command = _ports(args.command_port, len(args.groups))
        no_echo: list[int | None] = [None] * len(args.groups)
        echo = no_echo if args.echo_port is None else _ports(args.echo_port, len(args.groups))
        ready = {}
        for io_group, data_port, command_port, echo_port in zip(args.groups, data, command, echo, strict=True):
            board = _board(args, io_group)
            boards.append(board)
            stack.callback(board.close, linger=LINGER * 1000)
            ready[str(io_group)] = board.open(context, args.address, data_port, command_port, echo_port)
        if args.truth:
            noises = {board.io_group: board.tile.noise for board in boards if isinstance(board, TileBoard)}
            args.detector.write_truth(args.truth, noises)
        emulator = Emulator(boards, signals, args)

        def report() -> None:
            sent = {str(board.io_group): board.counts() for board in boards}
            print(json.dumps({"sent": sent, "seconds": round(emulator.seconds, 6)}), flush=True)

        print(args.detector.ready_line(ready), flush=True)
        emulator.run(report)
        time.sleep(NOTICE)
