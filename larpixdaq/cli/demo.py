"""`larpixdaq demo`: the whole line on this machine, with an emulated board, and the proof that nothing was lost.

`larpixdaq demo --calibrate`: an emulated tile of chips brought up, calibrated and read out, all in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY, arenas
from larpixdaq.cli.system import connect, wait_for
from larpixdaq.emulators import pacman
from larpixdaq.errors import ComponentError, FileError
from larpixdaq.hdf5 import verify
from larpixdaq.hdf5.reader import count_words
from larpixdaq.operator import Operator
from larpixdaq.producer import DEFAULT_NAME as PRODUCER
from larpixdaq.runtime.launcher import Group, components, free_port

#: Every process must be there, and every step done, within so long (seconds).
STEP_LIMIT = 30.0
Commands = Any  # argparse gives the object of add_subparsers() no public name
ASIC = "2b"
CHIPS = 100
#: What v2b chips need: 1.8 V and 1.2 V.
VDDA_DAC, VDDD_DAC = 46_000, 31_000
#: Channels that are planted: so many with ten times the noise of others, and so many that see nothing.
PLANTED = 8
#: Rates that are wanted of each channel (Hz): higher than a detector's, so that seconds are enough to count them, and
#: low enough for what four io_channels carry.
LOW, HIGH = 2.0, 20.0
#: Bring-up of a tile, and its calibration, are done within so long (seconds).
LIMIT = 300.0
#: The emulator's next line of JSON within a time limit (seconds); what is awaited is said in an error.
Line = Callable[[subprocess.Popen[bytes], float, str], dict[str, Any]]


def add_commands(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="take a run of an emulated PACMAN on this machine and prove that nothing was lost",
        description="Starts every process on free ports with an emulated PACMAN (real wire bytes over a real socket), "
        "takes a run through the Operator, stops everything, verifies the file and compares it with the emulator's own "
        "count.",
    )
    parser.add_argument(
        "--seconds", type=_positive, default=10.0, metavar="S", help="length of the run (default %(default)g)"
    )
    parser.add_argument(
        "--rate",
        type=_positive,
        default=100_000.0,
        metavar="R",
        help="packets per second, all boards (default %(default)g)",
    )
    parser.add_argument(
        "--io-groups", type=_boards, default=2, metavar="N", help="emulated boards, 1 to 255 (default %(default)d)"
    )
    parser.add_argument(
        "--words-per-message",
        type=_words_per_message,
        default="auto",
        metavar="W",
        help="as the emulator's option (default %(default)s)",
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR", help="for the file (default .)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help=f"with an emulated tile of {CHIPS} chips instead: bring it up, calibrate it, read it "
        "out, in one run, and leave in DIR the calibration's report, a picture with it if matplotlib is installed, "
        "and what the channels really are (no --rate, --io-groups, --words-per-message)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=run, wrong_usage=parser.error)


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _boards(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 255:
        raise argparse.ArgumentTypeError(f"expected 1 to 255, found {text!r}")
    return value


def _words_per_message(text: str) -> str:
    pacman.words_per_message(text)
    return text


def run(options: argparse.Namespace) -> int:
    each = options.rate / options.io_groups
    if not pacman.LOWEST_RATE <= each <= pacman.HIGHEST_RATE:
        options.wrong_usage(f"--rate: expected 10 to 1e9 packets/s for each board, found {each:g}")
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    console = _console(quiet=options.json)
    with tempfile.TemporaryDirectory(prefix="larpixdaq-demo-") as folder:
        state = Path(folder)
        try:
            with contextlib.closing(Group(state / "out")) as group:
                outcome = _take_run(options, group, state, console)
        finally:  # a producer that had to be killed leaves its ring to a successor, which will never come
            for ring in arenas(DEFAULT_DIRECTORY, state, PRODUCER).values():
                ring.unlink(missing_ok=True)
    if options.json:
        print(json.dumps(outcome))
    else:
        _show(outcome, console)
    return 0 if outcome["ok"] else 1


def _take_run(options: argparse.Namespace, group: Group, state: Path, console: Console) -> dict[str, Any]:
    tile = Rehearsal(options, state) if options.calibrate else None
    emulator = tile.start(group) if tile else _emulator(options, group)
    ready = _line(emulator, STEP_LIMIT, "the emulated board")
    boards = [f"{group_}=127.0.0.1:{port['data']}:{port['command']}" for group_, port in ready["ready"].items()]
    core, log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    source = ["--asic", ASIC] if tile else []
    for module, arguments in components(core, log, options.output_dir, state, [*source, "--pacman", *boards]):
        group.start(module, *arguments)
    processes = group.entries()
    with connect(core, group, processes) as operator:
        wait_for(operator, {"producer", "storage", "run_data"}, group, processes)
        if not tile:
            console.print(f"{len(boards)} emulated boards, {options.rate:g} packets/s for {options.seconds:g} s")
        operator.prepare_run(comment="larpixdaq demo", kind="demo").result(timeout=STEP_LIMIT)
        operator.begin_run().result(timeout=STEP_LIMIT)
        started = time.monotonic()
        assert emulator.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: that is said where its line is awaited
            emulator.stdin.write(b"go\n")
            emulator.stdin.flush()
        told = None
        if tile:
            sent, told = tile.take(operator, emulator, _line, console, ready["planted"])
        else:
            limit = options.seconds * 3 + STEP_LIMIT
            sent = _line(emulator, limit, "the end of the emulated board", group)["sent"]
        emulator.wait(STEP_LIMIT)  # all of it has left the board
        seconds = time.monotonic() - started
        ended = operator.end_run().result(timeout=2 * STEP_LIMIT)
    group.close()
    outcome = _judge(sent, ended, seconds)
    if told is not None:
        # Chips that were told to be noisy say that their FIFOs were full: suspect, and no fault of ours.
        well = ended["condition"].startswith("COMPLETE") and outcome["verified"] and told["registers_ok"]
        outcome |= {"ok": well and not outcome["lost"], "calibration": told}
    return outcome


def _emulator(options: argparse.Namespace, group: Group) -> subprocess.Popen[bytes]:
    words = max(1, round(options.rate * options.seconds / options.io_groups))
    return group.start(
        "emulators", "pacman", "--io-groups", str(options.io_groups), "--rate", str(options.rate / options.io_groups),
        "--count", str(words), "--words-per-message", options.words_per_message, "--lossless", "--wait-for-go",
        "--data-port", "0", "--command-port", "0", pipes=True,
    )  # fmt: skip


def _judge(sent: dict[str, Any], ended: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Equality of the emulator's own count with the file's rows, per io_group; the producer has no say in it."""
    stored: dict[int, int] = {}
    reasons: list[str] = []
    for path in ended["files"]:
        report = verify.verify(Path(path))
        reasons += report.findings
        for group, count in count_words(Path(path)).items():
            stored[group] = stored.get(group, 0) + count
    groups = {
        int(group): {"sent": counts["words"], "stored": stored.get(int(group), 0)} for group, counts in sent.items()
    }
    lost = sum(abs(count["sent"] - count["stored"]) for count in groups.values())
    total = sum(count["stored"] for count in groups.values())
    return {
        "ok": lost == 0 and not reasons and ended["condition"] == "COMPLETE",
        "run": ended["run"],
        "condition": ended["condition"],
        "files": ended["files"],
        "io_groups": groups,
        "sent": sum(count["sent"] for count in groups.values()),
        "stored": total,
        "lost": lost,
        "seconds": round(seconds, 3),
        "packets_per_second": round(total / seconds),
        "verified": not reasons,
        "reasons": reasons + ended["reasons"],
    }


def _console(*, quiet: bool) -> Console:
    """For texts as they are: paths may hold brackets."""
    return Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False)


def _show(outcome: dict[str, Any], console: Console) -> None:
    for group, count in sorted(outcome["io_groups"].items()):
        console.print(f"io_group {group}: {count['sent']} words sent by the board, {count['stored']} in the file")
    console.print(f"{outcome['packets_per_second']} packets/s over {outcome['seconds']:.1f} s, lost: {outcome['lost']}")
    console.print(
        f"run {outcome['run']} {outcome['condition']}, {'verified' if outcome['verified'] else 'NOT verified'}"
    )
    if "calibration" in outcome:
        show(outcome["calibration"], console)
    for reason in outcome["reasons"]:
        console.print(f"  {reason}")
    for path in outcome["files"]:
        console.print(f"file: {path}")


def _line(child: subprocess.Popen[bytes], limit: float, what: str, group: Group | None = None) -> dict[str, Any]:
    """The next line of JSON that the child prints."""
    assert child.stdout is not None
    deadline = time.monotonic() + limit
    while not select.select([child.stdout], [], [], 0.2)[0]:
        if group is not None:
            group.check()
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {limit:g} s for {what}")
    line = child.stdout.readline()
    if not line:
        raise ComponentError(f"{what}: it ended with status {child.wait(5)} and said nothing")
    answer: dict[str, Any] = json.loads(line)
    return answer


class Rehearsal:
    """`start()` before the system, `take()` in its run."""

    def __init__(self, options: argparse.Namespace, state: Path) -> None:
        self._seconds: float = options.seconds
        self._directory = options.output_dir.absolute()
        self._network = state / "tile.json"
        self._truth = self._directory / "tile_truth.json"

    def start(self, group: Group) -> subprocess.Popen[bytes]:
        return group.start(
            "emulators", "pacman", "--chips", str(CHIPS), "--asic", ASIC,
            "--write-network", str(self._network), "--hot-channels", str(PLANTED), "--dead-channels", str(PLANTED),
            "--truth", str(self._truth), "--lossless", "--wait-for-go", "--data-port", "0", "--command-port", "0",
            pipes=True,
        )  # fmt: skip

    def take(
        self, operator: Operator, emulator: subprocess.Popen[bytes], line: Line, console: Console, planted: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """In a run, with the boards told to go: what the emulator sent, and what there is to tell of the chips."""
        operator.power(True, tiles=0, vdda_dac=VDDA_DAC, vddd_dac=VDDD_DAC).result(LIMIT)
        chips = operator.load_board(str(self._network)).result(LIMIT)["chips"]
        network = operator.configure_network().result(LIMIT)
        console.print(f"{chips} chips, {'all' if network['ok'] else 'NOT all'} of them in their networks")
        calibration = operator.run_routine("calibrate", LOW, HIGH, apply=True, directory=str(self._directory))
        last = ""
        for response in calibration:
            if response.kind == "progress" and response.text and response.text.split(":")[0] != last:
                last = response.text.split(":")[0]
                console.print(f"  calibrating: {last}")
        found = calibration.result(LIMIT)
        checked = operator.validate_configuration().result(LIMIT)
        time.sleep(self._seconds)
        with contextlib.suppress(ProcessLookupError):
            emulator.send_signal(signal.SIGTERM)
        sent = line(emulator, LIMIT, "the end of the emulated board")
        return sent["sent"], self._told(found, checked, planted)

    def _told(self, found: dict[str, Any], checked: dict[str, Any], planted: dict[str, list[str]]) -> dict[str, Any]:
        def listed(by_chip: dict[str, list[int]]) -> set[str]:
            return {f"{chip}-{channel}" for chip, channels in by_chip.items() for channel in channels}

        hot, dead = listed(found["disable"]), listed(found["dead"])
        return {
            **{name: found[name] for name in ("low_hz", "high_hz", "live", "within", "seconds", "saturated_after")},
            "registers_ok": checked["ok"],
            "registers": checked["registers"],
            "disabled": len(hot),
            "hot_planted": len(planted["hot_channels"]),
            "hot_found": len(hot.intersection(planted["hot_channels"])),
            "dead_planted": len(planted["dead_channels"]),
            "dead_found": len(dead.intersection(planted["dead_channels"])),
            "report": found["files"],
            "no_picture": found.get("no_picture", ""),
            "truth": str(self._truth),
        }


def show(told: dict[str, Any], console: Console) -> None:
    console.print(
        f"calibrated in {told['seconds']:.0f} s: {told['within']} of {told['live']} live channels between "
        f"{told['low_hz']:g} and {told['high_hz']:g} Hz; {told['registers']} registers read back, "
        f"{'all as they were sent' if told['registers_ok'] else 'NOT all as they were sent'}"
    )
    console.print(
        f"channels that were planted and found: {told['hot_found']} of {told['hot_planted']} hot, "
        f"{told['dead_found']} of {told['dead_planted']} dead; {told['disabled']} are masked as too noisy"
    )
    if told["saturated_after"]:
        console.print(f"io_channels that carry all they can: {', '.join(told['saturated_after'])}")
    for path in told["report"]:
        console.print(f"report: {path}")
    if told["no_picture"]:
        console.print(told["no_picture"])
    console.print(f"what the emulated channels are: {told['truth']}")
