"""The fault table: each row has a function that causes a fault in a running Trial, and the promised result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trial import Outcome, Setup, Trial, judge, trial

#: Maximum seconds from a fault until its component is read as `lost` or `stuck`.
NOTICE_LIMIT = 1.25


@dataclass(frozen=True)
class Row:
    name: str
    fault: str
    must: str
    act: Callable[[Trial], None]
    conditions: tuple[str, ...]
    gap: bool  # words may be missing where a gap is marked in the file
    counted: bool  # words may be counted as lost
    becomes: str  # the component that the fault hits is read as: lost, stuck, or "" for either or neither
    noticed: bool  # other components may be read as lost or stuck, too
    once: bool  # the system is changed afterwards
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> bool:
        return "hosts" in self.setup

    @property
    def repeatable(self) -> bool:
        """Whether it can be repeated in one system, and loses nothing."""
        return not (self.gap or self.counted or self.once or self.setup.keys() - {"disk", "clock"})


ROWS: dict[str, Row] = {}


def row(
    fault: str,
    must: str,
    *,
    conditions: tuple[str, ...] = ("COMPLETE",),
    gap: bool = False,
    counted: bool = False,
    becomes: str = "",
    noticed: bool = False,
    once: bool = False,
    **setup: Any,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Put a function into the table, under its name. `setup`: fields of trial.Setup."""

    def add(act: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = act.__name__
        ROWS[name] = Row(name, fault, must, act, conditions, gap, counted, becomes, noticed, once, setup)
        return act

    return add


def run_trial(entry: Row, setup: Setup, seed: int, folder: Path) -> Outcome:
    """Run one trial of a row. Exceptions become failures of the Outcome; none is raised."""
    setup = replace(setup, **entry.setup)
    outcome = Outcome(entry.name, seed, setup.rate)
    began = time.monotonic()
    made: Trial | None = None
    try:
        with trial(setup, seed, folder) as made:
            made.begin()
            made.faults.random_pause(setup.before)
            entry.act(made)
            made.faults.pause(setup.after)
            ended = made.end()
        outcome.condition, outcome.reasons = ended["condition"], ended["reasons"]
        outcome.failures += made.failures
        if outcome.condition not in entry.conditions:
            outcome.failures.append(f"the run is {outcome.condition}, expected {' or '.join(entry.conditions)}")
        judge(outcome, made, ended["run"], gap=entry.gap, counted=entry.counted)
        _times(outcome, made, entry)
    except (Exception, KeyboardInterrupt) as error:
        outcome.failures.append("".join(traceback.format_exception(error, limit=-6)).strip())
        if made is not None:
            outcome.failures += made.failures
    if made is not None:
        outcome.events = _events(made)
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.ok = not outcome.failures
    return outcome


def _times(outcome: Outcome, made: Trial, entry: Row) -> None:
    if made.targets:
        outcome.lost_after = made.watch.first("lost", made.targets[0], made.fault_time)
        outcome.stuck_after = made.watch.first("stuck", made.targets[0], made.fault_time)
    read = {"lost": outcome.lost_after, "stuck": outcome.stuck_after}
    if entry.becomes and read[entry.becomes] is None:
        outcome.failures.append(f"{made.targets[0]} was never read as {entry.becomes}")
    seen = {name for when, name, what in made.watch.events if what != "fine" and when >= made.fault_time}
    outcome.noticed = sorted(seen - set(made.targets))


def timing_failures(outcome: Outcome) -> list[str]:
    """Return violated limits of time, and other components that were lost or stuck. Only valid on an idle machine."""
    entry = ROWS[outcome.row]
    read = {"lost": outcome.lost_after, "stuck": outcome.stuck_after}.get(entry.becomes)
    found = [f"read as {entry.becomes} after {read:.2f} s"] if read is not None and read > NOTICE_LIMIT else []
    if not entry.noticed:
        found += [f"{name} was read as lost or stuck too" for name in outcome.noticed]
    return found


def _events(made: Trial) -> list[str]:
    """Return the actions and the observed states, in order of time."""
    seen = [(when, f"{name} is {what}") for when, name, what in made.watch.events]
    lines = sorted(made.faults.notes + seen)
    since = made.fault_time or (lines[0][0] if lines else 0.0)
    return [f"{when - since:+.3f} s {text}" for when, text in lines]
