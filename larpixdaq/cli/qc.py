"""Command `larpixdaq qc`: a tile from power off to its quality report, through the running system."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.constants import RUN
from larpixdaq.control.snapshots import read_disabled, read_object
from larpixdaq.errors import LarpixDaqError, NoCore, UsageError, printable
from larpixdaq.operator import Operator, Request
from larpixdaq.runtime.units import parse_positive, parse_whole, utc_name

#: Maximum seconds of a step before the routines, and of all routines.
_STEP_LIMIT: Final = 600.0
_LIMIT: Final = 4 * 3600.0
_ABORT_LIMIT: Final = 30.0
#: Maximum seconds without a sign of the core.
_NO_CORE_LIMIT: Final = 60.0
#: Minimum seconds between two lines of progress of a step before the routines.
_PROGRESS: Final = 5.0
#: Maximum number of faults of a network that are shown.
_FAULTS: Final = 20


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "qc",
        help="bring up a tile and write its quality report",
        description="Powers a tile, brings its chips into their network, or discovers this network, calibrates it, and "
        "runs the routines of a quality control, through the running system. Writes one report with pass or fail for "
        "each limit. Exits with 0 only if all was measured and every limit is passed. Ctrl-C ends the routine, and "
        "writes the registers of the chips as they were wanted before it.",
    )
    whole, dac = partial(parse_whole, low=0, high=9), partial(parse_whole, low=0, high=0xFFFF)
    parser.add_argument(
        "network",
        nargs="?",
        metavar="FILE",
        help="controller configuration of larpix-control with the chips and their network, on the producer's machine "
        "(default: the network is discovered and written beside the report; this resets all chips of the boards)",
    )
    parser.add_argument(
        "--shape",
        metavar="SHAPE",
        help="of the tiles to discover: 10x10, 10x16, 5x5, or a .json file with rows, columns, roots (default 10x10)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="CHIP",
        help="chip that the discovery must not use, such as 1-1-33; can be repeated",
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
    if options.network and (options.shape or options.exclude):
        raise UsageError("--shape, --exclude are for a discovery, without FILE")
    arguments = {
        "low": options.low,
        "high": options.high,
        "apply": not options.restore,
        "leave_off": options.leave_off and read_disabled(options.leave_off),
        "options": options.limits and read_object(options.limits),
        "title": options.title,
        "directory": str(Path(options.output_dir).absolute()),
    }
    if options.shape and options.shape.endswith(".json"):
        options.shape = read_object(Path(options.shape))
    begin = time.monotonic()
    with Operator(options.core, insecure=options.insecure) as operator:
        result = _Tile(operator, options).run(arguments)
    result["total_seconds"] = round(time.monotonic() - begin, 1)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result, plain_console())
    return 0 if result["ok"] else 1


class _Tile:
    """Sends the steps to the producer, and shows their progress."""

    def __init__(self, operator: Operator, options: argparse.Namespace) -> None:
        self._operator, self._options = operator, options
        self._console, self._errors = plain_console(quiet=options.json), plain_console(stderr=True)
        self._where = {} if options.component is None else {"component": options.component}
        self._begin = time.monotonic()
        self._request: Request | None = None  # the last one

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        operator, options, where = self._operator, self._options, self._where
        if options.tiles:
            dacs = {"vdda_dac": options.vdda_dac, "vddd_dac": options.vddd_dac}
            given = {name: value for name, value in dacs.items() if value is not None}
            with self._interruptible(self._switch_off):
                power = operator.power(
                    True, tiles=options.tiles, io_group=options.io_group, ramp=options.ramp, **given, **where
                )
                self._wait("power", power)
        if options.network:
            with self._interruptible(lambda: "NOT KNOWN: reset() gives all chips their power-up configuration"):
                chips = self._wait("chips", operator.load_board(options.network, **where))["chips"]
                self._configure(chips)
        else:
            with self._interruptible(self._reset):
                arguments["network"] = found = self._discover(arguments["directory"])
                self._configure(found["chips"])
        with self._interruptible(self._enforce):
            quality = operator.run_routine("qc", time_limit=_LIMIT, **arguments, **where)
            result: dict[str, Any] = self._wait("qc", quality, _LIMIT)
        return result

    def _discover(self, directory: str) -> dict[str, Any]:
        """Discover the network, and say what was found."""
        options = self._options
        path = Path(directory) / f"network_{utc_name(time.time())}.json"
        request = self._operator.discover_network(
            str(path), options.tiles, options.io_group, options.shape, options.exclude, **self._where
        )
        found: dict[str, Any] = self._wait("discovery", request)
        faults = found["faults"]
        self._say(
            f"{found['chips']} of {found['chips'] + found['missing']} chips found on {len(found['tiles'])} tiles, "
            f"{len(faults)} faults: {found['file']}"
        )
        for fault in faults[:_FAULTS]:
            self._say(fault)
        if len(faults) > _FAULTS:
            self._say(f"and {len(faults) - _FAULTS} more faults")
        return found

    def _configure(self, chips: int) -> None:
        network = self._wait("network", self._operator.configure_network(**self._where))
        silent = f"; silent: {', '.join(network['silent'][:10])}" if network["silent"] else ""
        self._say(f"{chips} chips, {'all' if network['ok'] else 'NOT all'} in their network{silent}")

    def _wait(self, name: str, request: Request, limit: float = _STEP_LIMIT) -> Any:
        """Show the progress of a request, and return its result. A core that is busy for a while is waited for."""
        self._request = request
        step, due = "", 0.0
        heard = time.monotonic()
        while True:
            try:
                for response in request:
                    heard = time.monotonic()
                    new = (response.text or "").split(":")[0]
                    if response.kind == "progress" and new not in ("", step) and (name == "qc" or heard >= due):
                        step, due = new, heard + _PROGRESS
                        self._say(step)
                return request.result(limit)
            except NoCore:  # the producer goes on meanwhile
                if time.monotonic() > heard + _NO_CORE_LIMIT:
                    raise

    def _say(self, text: str) -> None:
        self._console.print(printable(f"{time.monotonic() - self._begin:6.1f} s  {text}"))

    @contextlib.contextmanager
    def _interruptible(self, recover: Callable[[], str]) -> Iterator[None]:
        """After an interruption, end the request, let `recover` give the chips a known state, and say which."""
        try:
            yield
        except KeyboardInterrupt:
            with contextlib.suppress(LarpixDaqError):  # none is running
                self._operator.abort_routine(**self._where).result(_ABORT_LIMIT)
            if self._request is not None:
                with contextlib.suppress(LarpixDaqError):  # because it was ended
                    self._request.result(_ABORT_LIMIT)
            try:
                state = recover()
                run = self._operator.state().result(_ABORT_LIMIT) == RUN
            except LarpixDaqError as error:
                state, run = f"NOT KNOWN: {error}", False
            self._errors.print(printable(f"interrupted; chips: {state}{'; the run goes on' if run else ''}"))
            raise

    def _switch_off(self) -> str:
        options = self._options
        self._operator.power(False, tiles=options.tiles, io_group=options.io_group, **self._where).result(_STEP_LIMIT)
        return "without power: their tiles were switched off"

    def _reset(self) -> str:
        self._operator.reset(io_group=self._options.io_group, **self._where).result(_STEP_LIMIT)
        return "power-up configuration, by a reset"

    def _enforce(self) -> str:
        done = self._operator.enforce_configuration(**self._where).result(_STEP_LIMIT)
        if done["ok"]:
            return "all registers as before the quality control, by reading them back"
        return f"NOT all registers as before the quality control: {done['different']} differ; " + (
            f"silent: {', '.join(done['silent'][:10])}" if done["silent"] else "none is silent"
        )


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
