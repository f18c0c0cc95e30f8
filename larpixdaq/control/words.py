"""What the core's `status` says, in words: for `larpixdaq status`, and for Operators who look at theirs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any, Final

from larpixdaq.control.space import SOON, size, time_to_full
from larpixdaq.load import words as load_words

Facts = dict[str, Any]


def lines(found: Facts) -> list[str]:
    """The core's status in words, a line each."""
    run = found.get("run")
    busy = f" ({found['busy']} in progress)" if found.get("busy") else ""
    shown = [f"state {found['state']}{f', run {_run(run)}' if run else ''}{busy}"]
    if run and run["missing"]:
        shown.append(f"MISSING in this run: {', '.join(run['missing'])}")
    shown += [line for component in found["components"] if component["alive"] for line in _alarms(component)]
    if control := found.get("control"):
        shown.append(f"control: {control['by']}, since {utc(control['since'])}")
    if last := found.get("last_run"):
        shown.append(_last_run(last))
    if found.get("insecure"):
        shown.append("INSECURE: no keys are in use: anybody who can connect to the core can control the detector")
    width = max((len(component["name"]) for component in found["components"]), default=0)
    if "load" in found:
        shown.append(f"{'core':<{width}}  alive  {load_words(found['load'])}")
    for component in found["components"]:
        shown.append(f"{component['name']:<{width}}  {_liveness(component):<5}  {_words(component)}".rstrip())
    return shown


def needs_attention(found: Facts) -> bool:
    """Whether a component is LOST or PAUSED, or MISSING in the run."""
    parts = found["components"]
    return bool((found.get("run") or {}).get("missing")) or any(
        not component["alive"] or component["status"].get("paused") for component in parts
    )


def _words(component: Facts) -> str:
    facts = component["status"]
    try:
        said = _WORDS[component["kind"]](component["info"], facts)
        return f"{said}; {load_words(facts['load'])}" if "load" in facts else said
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):  # of another version than we are
        return ", ".join(f"{name} {value}" for name, value in facts.items())


def _liveness(component: Facts) -> str:
    return "stuck" if component["stuck"] else "alive" if component["alive"] else "LOST"


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _run(run: Facts) -> str:
    comment = f": {run['comment']}" if run["comment"] else ""
    begun = f", since {utc(run['begun'])}" if run["begun"] else ""
    return f"{run['run']} ({run['kind']}){begun}{comment}"


def _last_run(last: Facts) -> str:
    reasons = "".join(f"; {reason}" for reason in last.get("reasons", []))
    files = "".join(f", {file}" for file in last.get("files", []))
    stored = "number of rows stored unknown" if last.get("stored") is None else f"{last['stored']} rows stored"
    return f"last run: {last['run']} {last['condition']}, {stored}{files}{reasons}"


def _alarms(component: Facts) -> list[str]:
    """What nobody may overlook."""
    facts, found = component["status"], []
    if facts.get("paused"):
        found.append(f"PAUSED: {component['name']} is not writing: {facts['paused']}")
    for text in _list(facts, "nameless"):
        found.append(f"FILE REMOVED: {component['name']}: {text}; lost if the process is killed")
    for path in _list(facts, "kept_aside"):
        found.append(f"DAMAGED FILE KEPT: {component['name']}: {path} could not be read whole; move it away")
    for text in _list(facts, "not_recovered"):
        found.append(f"NOT RECOVERED: {component['name']}: {text}")
    for board in _list(facts, "boards"):
        since = board.get("away_since") if isinstance(board, dict) else None
        if isinstance(since, int | float) and 0 < since < 1e11:
            found.append(f"{board.get('name')}: {_away(board)}")
    left = facts.get("seconds_left")
    if isinstance(left, int | float) and left < SOON[0]:
        found.append(f"DISK NEARLY FULL: {component['name']}: {time_to_full(facts)}")
    if facts.get("on_close"):
        found.append(f"COMMAND FAILED: {component['name']}: {facts['on_close']}")
    return found


def _list(facts: Facts, name: str) -> list[Any]:
    found = facts.get(name)
    return found if isinstance(found, list) else []


def _away(board: Facts) -> str:
    problem = f" ({board['problem']})" if board.get("problem") else ""
    return f"NOT CONNECTED since {utc(board['away_since'])}{problem}"


# A component that has just registered has said nothing yet: its facts are empty.


def _producer(info: Facts, facts: Facts) -> str:
    parts = [str(info.get("source", ""))]
    if facts:
        if facts["run"] is not None:
            parts.append(f"{facts['packets']} packets of the run")
        elif facts["counted_run"] is not None:
            parts.append(f"{facts['packets']} packets of run {facts['counted_run']}")
        losses = (("dropped", "rows dropped"), ("unknown", "unknown words"), ("bad_parity", "with bad parity"))
        parts += [f"{facts[name]} {words}" for name, words in losses if facts[name]]
        if facts["run"] is None:
            parts.append(f"{facts['outside_run']} packets outside of runs")
        doubts = facts.get("verdicts", {}).items()
        parts += [f"io_group {io_group} is {verdict}" for io_group, verdict in doubts if verdict != "complete"]
        for board in facts.get("boards", []):
            if board["away_since"] is not None:
                parts.append(f"io_group {board['io_group']}: {_away(board)}")
            parts += [f"io_group {board['io_group']}: {line}" for line in board["setup"]]
            if board["clock"] is not None:
                parts.append(f"io_group {board['io_group']}: {board['clock']['text']}")
        if facts["owed_blocks"]:
            parts.append(f"{facts['owed_blocks']} blocks pending (ring {facts['ring']:.0%} full)")
        if facts.get("spooled_blocks"):
            parts.append(f"{facts['spooled_blocks']} of them in the spool ({size(facts['spooled_bytes'])})")
        if facts.get("inherited"):
            parts.append(f"{facts['inherited']} blocks of its predecessor pending")
        if made_anew := facts.get("made_anew"):
            parts.append(f"the ring's file was removed and made anew, {made_anew} times")
        if facts["finished"]:
            parts.append("source finished")
    return "; ".join(parts)


def _storage(info: Facts, facts: Facts) -> str:
    parts = [f"{info.get('directory', '')}"]
    if facts:
        parts.append(f"{size(facts['free_bytes'])} free")
        if facts.get("paused"):
            parts.append("PAUSED")
        if left := time_to_full(facts):
            parts.append(left)
        if facts["files"]:
            parts.append(f"writing {', '.join(facts['files'])}: {facts['rows']} rows, {size(facts['bytes'])}")
        if recovering := facts.get("recovering"):
            parts.append(f"recovering {', '.join(recovering)}")
        if finished := facts.get("finished"):
            last = finished[-1]
            parts.append(f"last closed: {PurePath(last['file']).name}, {size(last['bytes'])}, {last['condition']}")
        if facts["duplicates"]:
            parts.append(f"{facts['duplicates']} duplicate blocks removed")
        if facts.get("on_close_failed"):
            parts.append(f"--on-close failed for {facts['on_close_failed']} files")
    return "; ".join(parts)


def _monitor(info: Facts, facts: Facts) -> str:
    if not facts or facts["run"] is None:
        return "no run yet"
    parts = [f"run {facts['run']}: {facts['rate']:.5g} packets/s, {facts['packets']} packets"]
    if facts["bad_parity"]:
        parts.append(f"{facts['bad_parity']} with bad parity")
    if facts["seen"] < 1:
        parts.append(f"{facts['seen']:.1%} of the rows sampled")
    return "; ".join(parts)


def _records(info: Facts, facts: Facts) -> str:
    lost = f"; {facts['lost']} records lost" if facts.get("lost") else ""
    return f"{info.get('file', '')}{lost}"


_WORDS: Final[dict[str, Callable[[Facts, Facts], str]]] = {
    "producer": _producer,
    "storage": _storage,
    "run_data": _monitor,
    "log": _records,
}
