"""The table of faults: each row is a function that does something to a running Trial, and what must come of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trial import Outcome, Setup, Trial, judge, trial

#: `lost` and `stuck` are read at the latest so long after the fault (seconds).
IN_TIME = 1.25


@dataclass(frozen=True)
class Row:
    name: str
    fault: str
    must: str
    act: Callable[[Trial], None]
    conditions: tuple[str, ...]
    gap: bool  # words may be missing where a gap is marked in the file
    counted: bool  # words may be counted as lost
    becomes: str  # what the component that is hit is read as: lost, stuck, or nothing
    noticed: bool  # others than that component may be read as lost or stuck meanwhile
    once: bool  # it leaves the system another one
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> bool:
        return "hosts" in self.setup

    @property
    def repeatable(self) -> bool:
        """It can come again and again in one system, and loses nothing."""
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
    """Put a function into the table, under its own name; `setup` are fields of trial.Setup."""

    def add(act: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = act.__name__
        ROWS[name] = Row(name, fault, must, act, conditions, gap, counted, becomes, noticed, once, setup)
        return act

    return add


def run_trial(one: Row, setup: Setup, seed: int, folder: Path) -> Outcome:
    """One trial of this row; whatever goes wrong is a failure of the outcome, and nothing is raised."""
    setup = replace(setup, **one.setup)
    outcome = Outcome(one.name, seed, setup.rate)
    began = time.monotonic()
    made: Trial | None = None
    try:
        with trial(setup, seed, folder) as made:
            made.begin()
            made.faults.moment(setup.before)
            one.act(made)
            made.faults.pause(setup.after)
            ended = made.end()
        outcome.condition, outcome.reasons = ended["condition"], ended["reasons"]
        outcome.failures += made.failures
        if outcome.condition not in one.conditions:
            outcome.failures.append(f"the run is {outcome.condition}, expected {' or '.join(one.conditions)}")
        judge(outcome, made, ended["run"], gap=one.gap, counted=one.counted)
        _times(outcome, made, one)
    except (Exception, KeyboardInterrupt) as error:
        outcome.failures.append("".join(traceback.format_exception(error, limit=-6)).strip())
        if made is not None:
            outcome.failures += made.failures
    if made is not None:
        outcome.events = _story(made)
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.ok = not outcome.failures
    return outcome


def _times(outcome: Outcome, made: Trial, one: Row) -> None:
    if made.hit:
        outcome.lost_after = made.watch.first("lost", made.hit[0], made.hit_at)
        outcome.stuck_after = made.watch.first("stuck", made.hit[0], made.hit_at)
    read = {"lost": outcome.lost_after, "stuck": outcome.stuck_after}
    if one.becomes and read[one.becomes] is None:
        outcome.failures.append(f"{made.hit[0]} was never read as {one.becomes}")
    seen = {name for when, name, what in made.watch.events if what != "fine" and when >= made.hit_at}
    outcome.noticed = sorted(seen - set(made.hit))


def late(outcome: Outcome) -> list[str]:
    """What took longer than promised, and who else was held up; to be judged on a machine that does nothing else."""
    one = ROWS[outcome.row]
    read = {"lost": outcome.lost_after, "stuck": outcome.stuck_after}.get(one.becomes)
    found = [f"read as {one.becomes} after {read:.2f} s"] if read is not None and read > IN_TIME else []
    if not one.noticed:
        found += [f"{name} was read as lost or stuck too" for name in outcome.noticed]
    return found


def _story(made: Trial) -> list[str]:
    """What was done and what was seen, in order."""
    seen = [(when, f"{name} is {what}") for when, name, what in made.watch.events]
    lines = sorted(made.faults.notes + seen)
    since = made.hit_at or (lines[0][0] if lines else 0.0)
    return [f"{when - since:+.3f} s {text}" for when, text in lines]
