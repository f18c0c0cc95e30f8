"""`larpixdaq demo`: the whole line on this machine, with an emulated board, and the proof that nothing was lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from larpixdaq.arena import DEFAULT_DIRECTORY, arenas
from larpixdaq.cli import rehearsal
from larpixdaq.cli.local import connect, wait_for
from larpixdaq.emulators import pacman
from larpixdaq.errors import ComponentError, FileError
from larpixdaq.files import verify
from larpixdaq.files.words import count_words
from larpixdaq.launch import Group, components, free_port
from larpixdaq.producer import DEFAULT_NAME as PRODUCER

#: Every process must be there, and every step done, within so long (seconds).
STEP_LIMIT = 30.0

Commands = Any  # argparse gives the object of add_subparsers() no public name


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
        help=f"with an emulated tile of {rehearsal.CHIPS} chips instead: bring it up, calibrate it, read it "
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
    pacman.per_message(text)
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
    tile = rehearsal.Rehearsal(options, state) if options.calibrate else None
    emulator = tile.start(group) if tile else _emulator(options, group)
    ready = _line(emulator, STEP_LIMIT, "the emulated board")
    boards = [f"{group_}=127.0.0.1:{port['data']}:{port['command']}" for group_, port in ready["ready"].items()]
    core, log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    source = ["--asic", rehearsal.ASIC] if tile else []
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
        rehearsal.show(outcome["calibration"], console)
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
