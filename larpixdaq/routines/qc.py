"""Quality control of a tile: the routines in their order, and one report with pass or fail for each limit."""

from __future__ import annotations

import base64
import html
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from larpixdaq.errors import LarpixDaqError, RequestError
from larpixdaq.routines import Routine, load
from larpixdaq.routines.kit import Chips, network_picture
from larpixdaq.routines.kit.report import by_chip
from larpixdaq.runtime.units import utc, utc_name
from larpixdaq.version import VERSION

#: The steps, in their order.
STEPS: Final = (
    "registers", "link_quality", "pedestal", "calibrate", "trigger_rate", "test_pulse", "gain", "s_curve", "leakage",
)  # fmt: skip
#: Registers that a calibration sets.
_CALIBRATED: Final = ("threshold", "trim", "mask", "periodic_reset")
#: Steps that need thresholds near the noise: at others all channels would seem dead.
_NEED_THRESHOLDS: Final = ("test_pulse", "gain", "leakage")
#: Steps of the global threshold above the calibrated ones for steps in which hits of noise would be in the way.
_RAISE: Final = 3
#: Maximum times that the registers are written and read at the end, because a board may be busy.
_TRIES: Final = 3
#: Maximum entries of a list in the report; the numbers have all.
_LISTED: Final = 200


def _qc(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    leave_off: dict[str, list[int]] | None = None,
    low: float = 2.0,
    high: float = 20.0,
    apply: bool = False,
    steps: list[str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    most_bad: float = 0.02,
    most_disabled: float = 0.05,
    least_within: float = 0.9,
    title: str = "",
    directory: str = ".",
    network: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs the routines of a quality control one after the other, and writes one report for the tile.

    The steps: "registers" (all are written and read back), "link_quality", "pedestal", "calibrate" (to a rate of each
    channel between LOW and HIGH, in Hz), "trigger_rate", "test_pulse", "gain", "s_curve", "leakage"; STEPS selects some
    of them. Each step leaves off the channels that the steps before want to disable, and LEAVE_OFF {chip: [channel,
    ...]}. Chips that do not answer are left out and named. CHIPS: a chip key, a list of chip keys, or None for all
    chips. OPTIONS {step: {parameter: value}}: arguments of single steps, such as {"pedestal": {"most_std": 3}}. With
    APPLY the chips keep the calibration, with the channels to disable masked; without it all registers are restored.

    A limit is passed if at most the fraction MOST_BAD of the channels is outside it or has no value, if at most
    MOST_DISABLED of all are to disable, and if of the calibrated ones at least LEAST_WITHIN are between LOW and HIGH. A
    step that fails does not end the others. At the end all registers are read back. NETWORK: the result of
    discover_network, for the report; chips that it has not found are outside a limit of 0.

    Result: "ok", whether all limits are passed and all was measured; "limits": [{"step", "name", "unit", "low", "high",
    "median", "channels", "outside", "unknown", "verdict": "pass", "FAIL" or "not measured"}]; "not_measured": [text];
    "silent": chips without an answer; "network" {"file", "chips", "missing", "faults"} or None; "disable" {chip:
    [channel, ...]}; "state": what the chips' registers are now; "steps" {step: seconds}; "seconds"; "files": the report
    as HTML, in DIRECTORY of the producer's machine, with the pictures in it, and the numbers of all steps as JSON.
    """
    chosen = list(STEPS) if steps is None else steps
    unknown = sorted({*chosen, *(options or {})} - set(STEPS))
    if unknown:
        raise ValueError(f"steps, options: expected some of {', '.join(STEPS)}, found {', '.join(unknown)}")
    fractions = most_bad, most_disabled, least_within
    if not 0 < low < high or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(
            f"low, high, most_bad, most_disabled, least_within: expected 0 < low < high and fractions from 0 to 1, "
            f"found {low:g}, {high:g}, {most_bad:g}, {most_disabled:g} and {least_within:g}"
        )
    folder = Path(directory).absolute()
    if not folder.is_dir():
        raise RequestError(f"directory: {folder}: no such directory")
    try:
        picture = "" if network is None else network_picture.html(network)
        found = network and {
            "file": str(network["file"]),
            "chips": int(network["chips"]),
            "missing": int(network["missing"]),
            "faults": list(map(str, network["faults"])),
        }
    except network_picture.WRONG_FORM:
        raise ValueError("network: expected the result of discover_network") from None
    control = _QualityControl(controller, send_info, chips, leave_off, chosen, options or {})
    result = control.run(low, high, apply, fractions, found)
    path = folder / f"qc_{utc_name(time.time())}.html"
    result["title"] = title or f"{result['chips']} chips of io_channels {', '.join(result['io_channels'])}"
    result["files"] = [str(path), str(path.with_suffix(".json"))]
    path.with_suffix(".json").write_text(json.dumps(result | {"results": control.results}) + "\n")
    path.write_text(_page(result, control.pictures, picture))
    return controller, result


class _QualityControl:
    """Runs the steps. `results`: of each step, by name. `pictures`: PNGs, by name."""

    def __init__(
        self,
        controller: Any,
        info: Callable[..., None],
        chips: Any,
        leave_off: dict[str, list[int]] | None,
        steps: list[str],
        options: dict[str, dict[str, Any]],
    ) -> None:
        self._controller, self._info, self._steps, self._options = controller, info, steps, options
        self._all = Chips(controller, chips)
        self._keys = list(self._all.keys)
        self._off = self._all.off(leave_off)
        self._routines = load()[0]
        for step, given in options.items():
            known = [] if step == "registers" else list(self._routines[step].params or ())
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"options: {step} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
        self._not_measured: list[str] = []
        self._silent: list[str] = []
        self._seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.pictures: dict[str, bytes] = {}

    def run(
        self,
        low: float,
        high: float,
        apply: bool,
        fractions: tuple[float, float, float],
        network: dict[str, Any] | None,
    ) -> dict[str, Any]:
        begin = time.time()
        before = {what: self._all.get(what) for what in _CALIBRATED if self._all.has(what)}
        self._registers()
        applied = False
        try:
            arguments: dict[str, dict[str, Any]] = {
                "calibrate": {"low": low, "high": high, "apply": True},
                "trigger_rate": {"most_hz": 2 * high},
                "test_pulse": {"raise_by": _RAISE},
                "gain": {"raise_by": _RAISE},
                "s_curve": {"step": 2},
                "leakage": {"raise_by": _RAISE},
            }
            for step in self._steps:
                if step == "registers":
                    continue
                if step in _NEED_THRESHOLDS and "calibrate" in self._steps and "calibrate" not in self.results:
                    self._not_measured.append(f"{step}: needs the thresholds of a calibration")
                    continue
                if step == "s_curve" and "gain" in self.results:
                    arguments[step]["pulse_mv"] = self._column("gain", "pulse_mv")
                if step == "leakage" and "s_curve" in self.results:
                    arguments[step]["baseline"] = self._column("s_curve", "baseline")
                self._step(step, arguments.get(step, {}))
            applied = apply and "calibrate" in self.results
        finally:
            state = self._leave(before, applied)
        limits = self._limits(*fractions)
        if network:
            missing, positions = network["missing"], network["chips"] + network["missing"]
            limits.insert(0, _limit("network", "chips that were not found", 0, missing, 0, positions))
        return {
            "ok": bool(limits) and not self._not_measured and all(limit["verdict"] == "pass" for limit in limits),
            "chips": len(self._all),
            "io_channels": sorted(set(self._all.lines())),
            "begin": utc(begin),
            "seconds": round(time.time() - begin, 1),
            "version": VERSION,
            "steps": self._seconds,
            "limits": limits,
            "not_measured": self._not_measured,
            "silent": self._silent,
            "network": network,
            "disable": by_chip(self._all.keys, self._off),
            "applied": applied,
            "state": state,
            "rate_hz": [low, high],
            "most_bad": fractions[0],
        }

    def _registers(self) -> None:
        """Write and read back all registers. Only chips that answer take part in the other steps."""
        begin = time.monotonic()
        self._info("registers", 0, len(self._steps))
        self._all.write()
        different = self._all.different()
        self._silent = [
            key
            for key, found in different.items()
            if len(found) == self._all.registers and all(pair[1] is None for pair in found.values())
        ]
        self._keys = [key for key in self._all.keys if key not in self._silent]
        self._seconds["registers"] = round(time.monotonic() - begin, 1)
        if not self._keys:
            raise RequestError(
                f"qc: none of the {len(self._all)} chips answers: power() and configure_network() come first"
            )
        if self._silent:
            self._not_measured.append(f"chips without an answer: {_some(self._silent)}")
        wrong = {key: found for key, found in different.items() if key not in self._silent}
        self.results["registers"] = {"different": wrong, "silent": self._silent}

    def _step(self, step: str, arguments: dict[str, Any]) -> None:
        begin = time.monotonic()
        self._info(step, self._steps.index(step), len(self._steps))
        routine = self._routines[step]
        off = by_chip(self._all.keys, self._off)
        arguments = {"chips": self._keys, **arguments}
        if step != "link_quality":
            arguments["leave_off"] = {key: channels for key, channels in off.items() if key in self._keys}
        with tempfile.TemporaryDirectory(prefix="larpixdaq-qc-") as folder:
            arguments |= {**self._options.get(step, {}), "directory": folder}
            try:
                _, result = routine.func(self._controller, _ignore, self._report(step), **arguments)
            except (LarpixDaqError, ValueError, TypeError) as error:
                self._not_measured.append(f"{step}: {error}")
                return
            finally:
                self._seconds[step] = round(time.monotonic() - begin, 1)
            for path in map(Path, result.pop("files", [])):
                if path.suffix == ".png":
                    self.pictures[step] = path.read_bytes()
        self.results[step] = result
        self._off |= self._all.off(result.get("disable"))
        if step == "calibrate":
            self._off |= self._all.off(result["dead"])
        for line in result.get("saturated_after", []) if step == "calibrate" else _lines(result):
            self._not_measured.append(f"{step}: io_channel {line} sent as much as its line carries: hits are missing")
        if step == "link_quality":
            lost = [key for key in result["silent"] if key in self._keys]
            self._keys = [key for key in self._keys if key not in lost]
            if lost:
                self._silent += lost
                self._not_measured.append(f"chips without an answer in {step}: {_some(lost)}")
            if result["twice"]:
                self._not_measured.append(f"chips that answer twice, perhaps with one id: {_some(result['twice'])}")

    def _report(self, step: str) -> Callable[..., None]:
        def info(text: Any = "", done: int = 0, total: int = 0) -> None:
            self._info(f"{step}: {text}", self._steps.index(step), len(self._steps))

        return info

    def _column(self, step: str, name: str) -> dict[str, Any]:
        return {key: values[name] for key, values in self.results[step]["chips"].items()}

    def _leave(self, before: dict[str, Any], applied: bool) -> str:
        """Restore the registers, or mask the channels to disable, and read everything back. Returns the state.

        A step that failed because a board was busy may have left other registers: they are written anew.
        """
        known = self.results["registers"]["different"] if "registers" in self.results else {}
        error: LarpixDaqError | None = None
        different: dict[str, Any] | None = None
        for attempt in range(_TRIES):
            try:
                chips = Chips(self._controller, self._all.keys)
                if applied:
                    chips.set(mask=chips.get("mask").astype(np.bool_) | self._off)
                else:
                    chips.set(**before)
                if attempt:
                    chips.write()
                different = {key: found for key, found in chips.different().items() if key not in self._silent}
            except LarpixDaqError as failure:
                error = failure
                continue
            if set(different) <= set(known):
                break
        if different is None:
            text = f"NOT KNOWN, because the chips could not be written and read: {error}"
            self._not_measured.append(f"registers at the end: {text}")
            return text
        state = "calibrated" if applied else "as before"
        answering = len(self._all) - len(self._silent)
        if not different:
            return f"{state}: all registers of {answering} chips were read back as they were sent"
        new = [key for key in different if key not in known]
        if new:
            self._not_measured.append(f"registers that differ at the end and not at the begin: {_some(new)}")
        return f"{state}, but {len(different)} of {answering} chips have other registers: {_some(list(different))}"

    def _limits(self, most_bad: float, most_disabled: float, least_within: float) -> list[dict[str, Any]]:
        """Return the limits of all steps with their verdicts."""
        limits = []
        registers = self.results["registers"]
        wrong, silent = len(registers["different"]), len(self._silent)
        limits.append(_limit("registers", "chips with wrong registers", 0, wrong, silent, len(self._all)))
        for step in self._steps:
            result = self.results.get(step)
            if step == "registers":
                continue
            if result is None:
                limits.append(_limit(step, "all", None, 0, 0, 0) | {"verdict": "not measured"})
                continue
            if step == "link_quality":
                bad, n = len(result["bad_links"]), len(result["links"])
                dark = sum(link["errors"] is None for link in result["links"].values())
                limits.append(_limit(step, "wrong words of a link", result["most_errors"], bad, dark, n))
            elif step == "calibrate":
                within = result["within"] / result["live"] if result["live"] else 0.0
                verdict = "pass" if within >= least_within else "FAIL"
                limits.append(
                    _limit(
                        step, "channels within the rates", None, result["live"] - result["within"], 0, result["live"]
                    )
                    | {"low": least_within, "median": round(within, 4), "unit": "of the live ones", "verdict": verdict}
                )
            else:
                for limit in result["limits"]:
                    allowed = most_bad * limit["channels"]
                    if limit["outside"] > allowed:
                        verdict = "FAIL"
                    elif limit["outside"] + limit["unknown"] > allowed or not limit["channels"]:
                        verdict = "not measured"
                    else:
                        verdict = "pass"
                    limits.append({"step": step, **limit, "verdict": verdict})
        answering = [at for at, key in enumerate(self._all.keys) if key in self._keys]
        n, size = int(self._off[answering].sum()), int(self._off[answering].size)
        verdict = "pass" if n <= most_disabled * size else "FAIL"
        limit = _limit("all", "channels to disable", most_disabled * size, n, 0, size)
        return [*limits, limit | {"verdict": verdict}]


def _limit(step: str, name: str, high: float | None, outside: int, unknown: int, n: int) -> dict[str, Any]:
    """Return a limit that nothing may exceed."""
    return {
        "step": step,
        "name": name,
        "unit": "",
        "low": None,
        "high": high,
        "median": None,
        "channels": n,
        "outside": outside,
        "unknown": unknown,
        "verdict": "FAIL" if outside else "not measured" if unknown else "pass",
    }


def _lines(result: dict[str, Any]) -> list[str]:
    """Return the io_channels that were saturated; those of an s-curve are lost levels, not lost channels."""
    saturated = result.get("saturated", [])
    return saturated if isinstance(saturated, list) else []


def _some(keys: list[str]) -> str:
    """Return the first keys as text, and the number of the others."""
    shown = ", ".join(keys[:10])
    return f"{shown} and {len(keys) - 10} more" if len(keys) > 10 else shown


def _ignore(*report: Any) -> None:
    """Stands in for `send_data`."""


_STYLE: Final = """body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}
.pass{background:#cfc}.FAIL{background:#fbb;font-weight:bold}.not{background:#fe9}img{max-width:100%}
pre{white-space:pre-wrap;background:#f4f4f4;padding:.5em}"""


def _page(result: dict[str, Any], pictures: dict[str, bytes], network: str) -> str:
    """Return the report as an HTML page that needs no other file, and has no script.

    `pictures`: PNGs, by step. `network`: HTML with the picture of the network, "" without one.
    """
    text = html.escape
    rows = []
    for limit in result["limits"]:
        verdict = limit["verdict"]
        unit = f" [{limit['unit']}]" if limit["unit"] else ""
        cells = [limit["step"], limit["name"] + unit]
        cells += [_number(limit[name]) for name in ("low", "high", "median", "channels", "outside", "unknown")]
        row = "".join(f"<td>{text(str(cell))}</td>" for cell in cells)
        rows.append(f'<tr>{row}<td class="{text(verdict.split()[0])}">{text(verdict)}</td></tr>')
    heads = ("step", "quantity", "low", "high", "median", "number", "outside", "not known", "verdict")
    verdict = "PASSED" if result["ok"] else "NOT PASSED"
    missing = "".join(f"<li>{text(line)}</li>" for line in result["not_measured"][:_LISTED])
    disable = json.dumps(result["disable"])
    steps = ", ".join(f"{step} {seconds:g} s" for step, seconds in result["steps"].items())
    images = "".join(
        f'<h2>{text(step)}</h2><img alt="{text(step)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for step, data in pictures.items()
    )
    n = sum(map(len, result["disable"].values()))
    numbers = Path(result["files"][1]).name
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{text(result["title"])}: {verdict}</title>
<style>{_STYLE}</style></head><body>
<h1>{text(result["title"])}: {verdict}</h1>
<p>{text(result["begin"])}, {result["seconds"]:g} s, larpix-daq {text(result["version"])}. {result["chips"]} chips.
Registers now: {text(result["state"])}.</p>
<p>{text(steps)}. All numbers: {text(numbers)}, beside this file.</p>
<h2>Limits</h2>
<table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{"".join(rows)}</table>
<p>A limit is passed if at most {result["most_bad"]:.1%} of the channels are outside it or have no value.</p>
<h2>What could not be measured</h2>
{f"<ul>{missing}</ul>" if missing else "<p>Nothing is missing.</p>"}
<h2>Channels to disable: {n}</h2>
<pre>{text(disable)}</pre>
{f"<h2>network, as it was discovered</h2>{network}" if network else ""}
{images or "<p>No pictures: they need matplotlib on the producer's machine.</p>"}
</body></html>
"""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.5g}" if isinstance(value, float) else str(value)


registration = {"qc": Routine("qc", _qc)}
