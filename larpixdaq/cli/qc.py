"""Command `larpixdaq qc`: a tile from power off to its quality report, through the running system."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.errors import FileError, LarpixDaqError, NoCore, UsageError, printable
from larpixdaq.operator import Operator, Request
from larpixdaq.runtime.units import parse_positive, parse_whole

#: Maximum seconds of a step before the routines, and of all routines.
_STEP_LIMIT: Final = 600.0
_LIMIT: Final = 4 * 3600.0
_ABORT_LIMIT: Final = 30.0
#: Maximum seconds without a sign of the core.
_NO_CORE_LIMIT: Final = 60.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "qc",
        help="bring up a tile and write its quality report",
        description="Powers a tile, brings its chips into their network, calibrates it, and runs the routines of a "
        "quality control, through the running system. Writes one report with pass or fail for each limit. Exits with 0 "
        "only if all was measured and every limit is passed. Ctrl-C ends the routine, and writes the registers of the "
        "chips as they were wanted before it.",
    )
    whole, dac = partial(parse_whole, low=0, high=9), partial(parse_whole, low=0, high=0xFFFF)
    parser.add_argument(
        "network",
        metavar="FILE",
        help="controller configuration of larpix-control with the chips and their network, on the producer's machine",
    )
    parser.add_argument(
        "--tile",
        type=whole,
        action="append",
        dest="tiles",
        metavar="N",
        help="tile to switch on, from 0; can be repeated (default: none, the power stays as it is)",
    )
    parser.add_argument(
        "--io-group", type=partial(parse_whole, high=255), metavar="N", help="their board (default: all)"
    )
    parser.add_argument("--vdda-dac", type=dac, metavar="N", help="DAC of the analog supply of the tiles")
    parser.add_argument("--vddd-dac", type=dac, metavar="N", help="DAC of the digital supply of the tiles")
    parser.add_argument("--ramp", action="store_true", help="raise the DACs slowly from 0, tile after tile")
    parser.add_argument(
        "--low", type=parse_positive, default=2.0, metavar="HZ", help="lowest rate of a channel (default %(default)g)"
    )
    parser.add_argument(
        "--high",
        type=parse_positive,
        default=20.0,
        metavar="HZ",
        help="highest rate of a channel (default %(default)g)",
    )
    parser.add_argument(
        "--leave-off", type=Path, metavar="FILE", help='channels to leave off, as JSON: {"1-1-21": [6, 7]}'
    )
    parser.add_argument(
        "--limits", type=Path, metavar="FILE", help='arguments of steps, as JSON: {"pedestal": {"most_std": 3}}'
    )
    parser.add_argument(
        "--restore", action="store_true", help="restore all registers at the end (default: keep the calibration)"
    )
    parser.add_argument("--title", default="", metavar="TEXT", help="name of the tile in the report")
    parser.add_argument(
        "-o", "--output-dir", default=".", metavar="DIR", help="for the report, on the producer's machine (default .)"
    )
    parser.add_argument("--component", metavar="NAME", help="the producer (default: the first)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    if options.low >= options.high:
        raise UsageError(f"--low {options.low:g} is not below --high {options.high:g}")
    if not options.tiles and (options.vdda_dac or options.vddd_dac or options.ramp):
        raise UsageError("--vdda-dac, --vddd-dac, --ramp go with --tile")
    arguments = {
        "low": options.low,
        "high": options.high,
        "apply": not options.restore,
        "leave_off": _read(options.leave_off, "--leave-off"),
        "options": _read(options.limits, "--limits"),
        "title": options.title,
        "directory": str(Path(options.output_dir).absolute()),
    }
    console = plain_console(quiet=options.json)
    begin = time.monotonic()
    with Operator(options.core, insecure=options.insecure) as operator:
        tile = _Tile(operator, console, options)
        result = tile.run(arguments)
    result["total_seconds"] = round(time.monotonic() - begin, 1)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result, console)
    return 0 if result["ok"] else 1


class _Tile:
    """Sends the steps to the producer, and shows their progress."""

    def __init__(self, operator: Operator, console: Console, options: argparse.Namespace) -> None:
        self._operator, self._console, self._options = operator, console, options
        self._begin = time.monotonic()

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        operator, options = self._operator, self._options
        where = {} if options.component is None else {"component": options.component}
        with self._ended(where):
            if options.tiles:
                dacs = {"vdda_dac": options.vdda_dac, "vddd_dac": options.vddd_dac}
                given = {name: value for name, value in dacs.items() if value is not None}
                power = operator.power(
                    True, tiles=options.tiles, io_group=options.io_group, ramp=options.ramp, **given, **where
                )
                self._wait("power", power)
            chips = self._wait("chips", operator.load_board(options.network, **where))["chips"]
            network = self._wait("network", operator.configure_network(**where))
            silent = f"; silent: {', '.join(network['silent'][:10])}" if network["silent"] else ""
            self._say(f"{chips} chips, {'all' if network['ok'] else 'NOT all'} in their network{silent}")
            quality = operator.run_routine("qc", time_limit=_LIMIT, **arguments, **where)
            result: dict[str, Any] = self._wait("qc", quality, _LIMIT)
        return result

    def _wait(self, name: str, request: Request, limit: float = _STEP_LIMIT) -> Any:
        """Show the progress of a request, and return its result. A core that is busy for a while is waited for."""
        step = ""
        heard = time.monotonic()
        while True:
            try:
                for response in request:
                    heard = time.monotonic()
                    new = (response.text or "").split(":")[0]
                    if name == "qc" and response.kind == "progress" and new and new != step:
                        step = new
                        self._say(step)
                return request.result(limit)
            except NoCore:  # the producer goes on meanwhile
                if time.monotonic() > heard + _NO_CORE_LIMIT:
                    raise

    def _say(self, text: str) -> None:
        self._console.print(printable(f"{time.monotonic() - self._begin:6.1f} s  {text}"))

    @contextlib.contextmanager
    def _ended(self, where: dict[str, Any]) -> Iterator[None]:
        """After an interruption, end the routine and write the wanted registers, so that the chips' state is known."""
        try:
            yield
        except KeyboardInterrupt:
            with contextlib.suppress(LarpixDaqError):  # none is running
                self._operator.abort_routine(**where).result(_ABORT_LIMIT)
            try:
                done = self._operator.enforce_configuration(**where).result(_STEP_LIMIT)
                state = "written as before the routine" if done["ok"] else "NOT all as before the routine"
            except LarpixDaqError as error:
                state = f"NOT KNOWN: {error}"
            self._say(f"interrupted; registers of the chips: {state}")
            raise


def _read(path: Path | None, option: str) -> Any:
    """Return the JSON object in a file, None without a file. Raises FileError."""
    if path is None:
        return None
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise FileError(f"{option} {path}: {error.strerror}") from None
    except ValueError as error:
        raise FileError(f"{option} {path}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"{option} {path}: expected an object, found {type(value).__name__}")
    return value


def _show(result: dict[str, Any], console: Console) -> None:
    for limit in result["limits"]:
        if limit["verdict"] != "pass":
            console.print(
                printable(
                    f"{limit['verdict']}: {limit['step']}: {limit['name']}: {limit['outside']} of {limit['channels']} "
                    f"outside, {limit['unknown']} not known"
                )
            )
    for line in result["not_measured"]:
        console.print(printable(f"not measured: {line}"))
    disabled = sum(map(len, result["disable"].values()))
    passed = sum(limit["verdict"] == "pass" for limit in result["limits"])
    console.print(
        f"{'PASSED' if result['ok'] else 'NOT PASSED'}: {passed} of {len(result['limits'])} limits; "
        f"{disabled} channels to disable; {result['total_seconds']:.0f} s"
    )
    console.print(printable(f"registers: {result['state']}"))
    for path in result["files"]:
        console.print(printable(f"report: {path}"))
