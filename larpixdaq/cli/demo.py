"""Command `larpixdaq demo`: a run of a complete system with emulated boards, and a check that no word was lost.

With --calibrate the run brings up, calibrates and reads an emulated tile of chips.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from larpixdaq import config, web
from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY, ring_files
from larpixdaq.cli.detector import UP_LIMIT, connect
from larpixdaq.cli.system import plain_console
from larpixdaq.emulators import pacman
from larpixdaq.errors import ComponentError, FileError, NoCore, UsageError
from larpixdaq.hdf5 import verify
from larpixdaq.hdf5.reader import count_words
from larpixdaq.operator import Operator
from larpixdaq.producer import DEFAULT_NAME as PRODUCER
from larpixdaq.runtime.launcher import Entry, Group, components, free_port
from larpixdaq.runtime.units import parse_positive, parse_whole
from larpixdaq.web.links import running_servers

#: Seconds of a run, without and with --web, where Ctrl-C ends it.
SECONDS = 10.0
WEB_SECONDS = 600.0
#: Maximum seconds until every process runs, and of every step of a run.
STEP_LIMIT = 30.0
#: Maximum seconds of the bring-up of a tile, and of its calibration.
CALIBRATION_LIMIT = 300.0
#: The tile of --calibrate: its chips, and the DAC counts of their supplies, 1.8 V and 1.2 V.
ASIC = "2b"
CHIPS = 100
VDDA_DAC, VDDD_DAC = 46_000, 31_000
#: Number of hot channels, and of dead channels.
PLANTED = 8
#: Rates to which each channel is calibrated (Hz): higher than a detector's, so that they can be counted in seconds, and
#: low enough for four io_channels.
LOW, HIGH = 2.0, 20.0


class TileDemo:
    """Emulated tile of chips: `start()` before the system, `take()` during its run."""

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
        self, operator: Operator, emulator: subprocess.Popen[bytes], console: Console, planted: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Bring up, calibrate and read the tile. Returns the emulator's counts and the facts about the calibration."""
        limit = CALIBRATION_LIMIT
        operator.power(True, tiles=0, vdda_dac=VDDA_DAC, vddd_dac=VDDD_DAC).result(limit)
        chips = operator.load_board(str(self._network)).result(limit)["chips"]
        network = operator.configure_network().result(limit)
        console.print(f"{chips} chips, {'all' if network['ok'] else 'NOT all'} of them in their networks")
        calibration = operator.run_routine("calibrate", LOW, HIGH, apply=True, directory=str(self._directory))
        step = ""
        for response in calibration:
            if response.kind == "progress" and response.text and response.text.split(":")[0] != step:
                step = response.text.split(":")[0]
                console.print(f"  calibrating: {step}")
        result = calibration.result(limit)
        validation = operator.validate_configuration().result(limit)
        time.sleep(self._seconds)
        with contextlib.suppress(ProcessLookupError):
            emulator.send_signal(signal.SIGTERM)
        sent = _read_line(emulator, limit, "the end of the emulated board")
        return sent["sent"], self._facts(result, validation, planted)

    def _facts(
        self, result: dict[str, Any], validation: dict[str, Any], planted: dict[str, list[str]]
    ) -> dict[str, Any]:
        def keys(by_chip: dict[str, list[int]]) -> set[str]:
            return {f"{chip}-{channel}" for chip, channels in by_chip.items() for channel in channels}

        hot, dead = keys(result["disable"]), keys(result["dead"])
        return {
            **{name: result[name] for name in ("low_hz", "high_hz", "live", "within", "seconds", "saturated_after")},
            "registers_ok": validation["ok"],
            "registers": validation["registers"],
            "disabled": len(hot),
            "hot_planted": len(planted["hot_channels"]),
            "hot_found": len(hot.intersection(planted["hot_channels"])),
            "dead_planted": len(planted["dead_channels"]),
            "dead_found": len(dead.intersection(planted["dead_channels"])),
            "report": result["files"],
            "no_picture": result.get("no_picture", ""),
            "truth": str(self._truth),
        }


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="take a run of emulated PACMANs on this machine and prove that nothing was lost",
        description="Starts every process on free ports with emulated PACMANs (real wire bytes over real sockets), "
        "takes a run with an Operator, stops everything, verifies the file and compares it with the emulator's own "
        "counts.",
    )
    parser.add_argument(
        "--seconds",
        type=parse_positive,
        metavar="S",
        help=f"length of the run (default {SECONDS:g}, with --web {WEB_SECONDS:g})",
    )
    parser.add_argument(
        "--rate",
        type=parse_positive,
        default=100_000.0,
        metavar="R",
        help="packets per second, all boards (default %(default)g)",
    )
    parser.add_argument(
        "--io-groups",
        type=partial(parse_whole, high=255),
        default=2,
        metavar="N",
        help="emulated boards, 1 to 255 (default %(default)d)",
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
        help=f"take a run of an emulated tile of {CHIPS} chips instead, which brings it up, calibrates it and reads it "
        "out; writes into DIR the calibration's report, with a picture if matplotlib is installed, and the true "
        "properties of the channels (no --rate, --io-groups, --words-per-message)",
    )
    parser.add_argument(
        "--web", action="store_true", help="also start the web page, and print the link to it; Ctrl-C ends the run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=run)


def _words_per_message(text: str) -> str:
    pacman.words_per_message(text)
    return text


def run(options: argparse.Namespace) -> int:
    if options.seconds is None:
        options.seconds = WEB_SECONDS if options.web else SECONDS
    if options.web:
        web.check(web.argument_parser().parse_args([]))
    board_rate = options.rate / options.io_groups
    if not pacman.LOWEST_RATE <= board_rate <= pacman.HIGHEST_RATE:
        raise UsageError(f"--rate: expected 10 to 1e9 packets/s for each board, found {board_rate:g}")
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    console = plain_console(quiet=options.json)
    with tempfile.TemporaryDirectory(prefix="larpixdaq-demo-") as folder:
        state = Path(folder)
        try:
            with contextlib.closing(Group(state / "out")) as group:
                outcome = _take_run(options, group, state, console)
        finally:  # a killed producer leaves its ring for a takeover, which never comes
            for ring in ring_files(DEFAULT_DIRECTORY, state, PRODUCER).values():
                ring.unlink(missing_ok=True)
    if options.json:
        print(json.dumps(outcome))
    else:
        _show(outcome, console)
    return 0 if outcome["ok"] else 1


def _take_run(options: argparse.Namespace, group: Group, state: Path, console: Console) -> dict[str, Any]:
    tile = TileDemo(options, state) if options.calibrate else None
    emulator = tile.start(group) if tile else _start_emulator(options, group)
    ready = _read_line(emulator, STEP_LIMIT, "the emulated board")
    boards = [f"{io_group}=127.0.0.1:{port['data']}:{port['command']}" for io_group, port in ready["ready"].items()]
    core, log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    source = ["--asic", ASIC] if tile else []
    for module, arguments in components(core, log, options.output_dir, state, [*source, "--pacman", *boards]):
        group.start(module, *arguments)
    processes = group.entries()
    if options.web:
        _start_web(core, group, console)
    own = next(entry.pid for entry in processes if entry.module == "core")
    with connect(core, group.check, lambda: own) as operator:
        _wait_for(operator, {"producer", "storage", "run_data"}, group, processes)
        if not tile:
            console.print(f"{len(boards)} emulated boards, {options.rate:g} packets/s for {options.seconds:g} s")
        operator.prepare_run(comment="larpixdaq demo", kind="demo").result(timeout=STEP_LIMIT)
        operator.begin_run().result(timeout=STEP_LIMIT)
        started = time.monotonic()
        assert emulator.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it is dead, _read_line() reports it
            emulator.stdin.write(b"go\n")
            emulator.stdin.flush()
        calibration = None
        if tile:
            sent, calibration = tile.take(operator, emulator, console, ready["planted"])
        else:
            limit = options.seconds * 3 + STEP_LIMIT
            sent = _read_line(emulator, limit, "the end of the emulated board", group)["sent"]
        emulator.wait(STEP_LIMIT)  # it ends when it has sent all words
        seconds = time.monotonic() - started
        ended = operator.end_run().result(timeout=2 * STEP_LIMIT)
    group.close()
    outcome = _judge(sent, ended, seconds)
    if calibration is not None:
        # Noisy chips report full FIFOs, so that the run may be suspect without a fault of the system.
        ok = ended["condition"].startswith("COMPLETE") and outcome["verified"] and calibration["registers_ok"]
        outcome |= {"ok": ok and not outcome["lost"], "calibration": calibration}
    return outcome


def _wait_for(operator: Operator, kinds: set[str], group: Group, processes: Sequence[Entry]) -> None:
    """Wait until each of these kinds has a living component in one of `processes`.

    Raises ComponentError after UP_LIMIT seconds, or if a process of the group has ended with an error.
    """
    deadline = time.monotonic() + UP_LIMIT
    host = config.process_identity()["host"]
    own = {(host, entry.pid) for entry in processes}
    while True:
        group.check()
        try:
            registered = operator.components().result(timeout=UP_LIMIT)
            own_alive = [c for c in registered if c["alive"] and (c["info"].get("host"), c["info"].get("pid")) in own]
            missing = kinds - {c["kind"] for c in own_alive}
        except NoCore:
            missing = {"core"}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {UP_LIMIT:g} s for {', '.join(sorted(missing))}")
        time.sleep(0.05)


def _start_emulator(options: argparse.Namespace, group: Group) -> subprocess.Popen[bytes]:
    words = max(1, round(options.rate * options.seconds / options.io_groups))
    return group.start(
        "emulators", "pacman", "--io-groups", str(options.io_groups), "--rate", str(options.rate / options.io_groups),
        "--count", str(words), "--words-per-message", options.words_per_message, "--lossless", "--wait-for-go",
        "--data-port", "0", "--command-port", "0", pipes=True,
    )  # fmt: skip


def _start_web(core: str, group: Group, console: Console) -> None:
    """Start the web server, and print its link."""
    pid = group.start("web", "--core", core, "--address", "127.0.0.1:0").pid
    deadline = time.monotonic() + UP_LIMIT
    while not (links := [server.link for server in running_servers() if server.pid == pid]):
        group.check()
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {UP_LIMIT:g} s for the web server")
        time.sleep(0.05)
    console.print(f"web page: {links[0]}")


def _judge(sent: dict[str, Any], ended: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Compare the emulator's own counts with the words in the files, per io_group, without counts of the producer."""
    stored: Counter[int] = Counter()
    reasons: list[str] = []
    for path in ended["files"]:
        reasons += verify.verify(Path(path)).findings
        stored.update(count_words(Path(path)))
    groups = {int(group): {"sent": counts["words"], "stored": stored[int(group)]} for group, counts in sent.items()}
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


def _show(outcome: dict[str, Any], console: Console) -> None:
    for group, count in sorted(outcome["io_groups"].items()):
        console.print(f"io_group {group}: {count['sent']} words sent by the board, {count['stored']} in the file")
    console.print(f"{outcome['packets_per_second']} packets/s over {outcome['seconds']:.1f} s, lost: {outcome['lost']}")
    console.print(
        f"run {outcome['run']} {outcome['condition']}, {'verified' if outcome['verified'] else 'NOT verified'}"
    )
    if "calibration" in outcome:
        _show_calibration(outcome["calibration"], console)
    for reason in outcome["reasons"]:
        console.print(f"  {reason}")
    for path in outcome["files"]:
        console.print(f"file: {path}")


def _show_calibration(facts: dict[str, Any], console: Console) -> None:
    console.print(
        f"calibrated in {facts['seconds']:.0f} s: {facts['within']} of {facts['live']} live channels between "
        f"{facts['low_hz']:g} and {facts['high_hz']:g} Hz; {facts['registers']} registers read back, "
        f"{'all as they were sent' if facts['registers_ok'] else 'NOT all as they were sent'}"
    )
    console.print(
        f"channels that were planted and found: {facts['hot_found']} of {facts['hot_planted']} hot, "
        f"{facts['dead_found']} of {facts['dead_planted']} dead; {facts['disabled']} are masked as too noisy"
    )
    if facts["saturated_after"]:
        console.print(f"io_channels that carry all they can: {', '.join(facts['saturated_after'])}")
    for path in facts["report"]:
        console.print(f"report: {path}")
    if facts["no_picture"]:
        console.print(facts["no_picture"])
    console.print(f"true properties of the emulated channels: {facts['truth']}")


def _read_line(child: subprocess.Popen[bytes], limit: float, event: str, group: Group | None = None) -> dict[str, Any]:
    """Read the child's next line, which is JSON. Raises ComponentError after `limit` seconds, with the awaited event.

    Also raises ComponentError when a process of the group has ended with an error.
    """
    assert child.stdout is not None
    deadline = time.monotonic() + limit
    while not select.select([child.stdout], [], [], 0.2)[0]:
        if group is not None:
            group.check()
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {limit:g} s for {event}")
    line = child.stdout.readline()
    if not line:
        raise ComponentError(f"{event}: it ended with status {child.wait(5)} and said nothing")
    answer: dict[str, Any] = json.loads(line)
    return answer
