"""What is wrong with each component, and the components in groups by module, the worst group first.

`larpixdaq status`, Operator.status() and the page show many components in these groups. A group in which nothing is
wrong is one line with counts and sums. No rule here leaves a component out: each one is in exactly one group.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from larpixdaq.alarm_config import AlarmConfig
from larpixdaq.constants import LOG, PRODUCER, RUN_DATA, STORAGE, SUPERVISOR
from larpixdaq.control.alarm_conditions import ALARM, WARNING, present_readings
from larpixdaq.control.alarms import Alarm, open_line
from larpixdaq.protocol.reports import (
    STATUS,
    LogStatus,
    ProducerStatus,
    Status,
    StorageStatus,
    SupervisedProcess,
    SupervisorStatus,
)
from larpixdaq.runtime.units import duration, natural, size, utc

Facts = dict[str, Any]
_T = TypeVar("_T")
#: Components are shown in groups when there are more of them, or when one of them has a module.
MANY: Final = 12
#: More lost components of a group are named in one line.
_MANY_LOST: Final = 4
#: Levels, from "" (nothing is wrong) to the worst.
LEVELS: Final = ("", WARNING, ALARM)
#: States of a process under supervision in which it does not do its work.
_NOT_RUNNING: Final = ("waiting", "given up")
#: Seconds for which the text of `status` shows a limit that a peer has reached.
_LIMITS_SHOWN: Final = 3600.0
#: Conditions of alarms that the text of `status` shows also when the core has no alarm for them yet, or knows none.
_SHOWN: Final = frozenset(
    {"storage-paused", "not-recovered", "disk-left", "on-close", "producer-files", "board-disconnected", "given-up"}
)
#: Kinds of components in the order in which people read them.
_KINDS: Final = (PRODUCER, STORAGE, RUN_DATA, LOG, SUPERVISOR)


class Problem(NamedTuple):
    """Something wrong with a component. `level`: "warning" or "alarm"."""

    level: str
    text: str


class Member(NamedTuple):
    """A component of a group. `facts`: as in Operator.components(); `problems`: the worst first, of a lost component
    its loss.

    `status`: as component_status() returns it. `missing`: the present run misses it. `loss_alarms`: numbers of the open
    alarms about its loss.
    """

    facts: Facts
    status: Status | None
    problems: list[Problem]
    missing: bool
    loss_alarms: list[int]

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def level(self) -> str:
        """The level of its worst problem, "" without any."""
        return self.problems[0].level if self.problems else ""


class Group(NamedTuple):
    """The components of a module or of a host, the worst first. `run`: number of the present run."""

    name: str
    members: list[Member]
    run: int | None

    @property
    def level(self) -> str:
        return self.members[0].level if self.members else ""

    @property
    def bad(self) -> list[Member]:
        """The members with a problem."""
        return [member for member in self.members if member.problems]

    def state(self) -> str:
        """Return how many members live: `12 components alive`, `12 components: 9 LOST, 1 stuck, 2 alive`."""
        return liveness(self._facts())

    def _facts(self) -> Iterator[Facts]:
        return (member.facts for member in self.members)

    def figures(self) -> str:
        """Return numbers of the members by kind, and sums over those that live and whose status is understood."""
        kinds = Counter(str(facts["kind"]) for facts in self._facts())
        sums = self.sums()
        about: dict[str, list[str]] = {kind: [] for kind in kinds}
        for label, value in sums.items():
            count = _COUNTS[label]
            if count.kind in about and (value or count.always):
                about[count.kind].append(count.show(value))
        free = [
            member.status.free_bytes
            for member in self.members
            if member.facts["alive"]
            and isinstance(member.status, StorageStatus)
            and member.status.free_bytes is not None
        ]
        if free:
            about[STORAGE].append(f"at least {size(min(free))} free each" if len(free) > 1 else f"{size(free[0])} free")
        parts = []
        for kind in sorted(kinds, key=lambda kind: (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)):
            noun = "monitor" if kind == RUN_DATA else kind
            words = f"{kinds[kind]} {noun}{'' if kinds[kind] == 1 else 's'}"
            parts.append(words + (f": {', '.join(about[kind])}" if about[kind] else ""))
        levels = Counter(
            facts["log_level"] for facts in self._facts() if facts.get("log_level", "") not in ("", "INFO")
        )
        parts += [f"log level {level}: {number}" for level, number in sorted(levels.items())]
        if cores := sums.get("cores"):
            parts.append(_COUNTS["cores"].show(cores))
        return "; ".join(parts)

    def sums(self) -> dict[str, float]:
        """Return the sums of the counts of all living members, by label."""
        sums: dict[str, float] = {}
        for member in self.members:
            for label, value in counts(member, self.run).items():
                sums[label] = sums.get(label, 0) + value
        return sums


def component_groups(status: Facts) -> list[Group]:
    """Return all components of the core's status in groups, the worst group first, then by name."""
    run = status.get("run") or {}
    missing = frozenset(run.get("missing") or ())
    by_component: dict[str, list[Alarm]] = {}
    for alarm in converted(status.get("alarms") or [], Alarm):
        by_component.setdefault(alarm.component, []).append(alarm)
    members: dict[str, list[Member]] = {}
    for facts in status["components"]:
        member = _member(facts, by_component.get(facts["name"], []), missing=facts["name"] in missing)
        members.setdefault(group_name(facts), []).append(member)
    groups = [
        Group(
            name, sorted(found, key=lambda member: (-LEVELS.index(member.level), natural(member.name))), run.get("run")
        )
        for name, found in members.items()
    ]
    return sorted(groups, key=lambda group: (-LEVELS.index(group.level), -len(group.bad), natural(group.name)))


def is_grouped(components: Sequence[Facts]) -> bool:
    """Whether people see these components in groups."""
    return len(components) > MANY or any(facts.get("module") for facts in components)


def joined(groups: Iterable[Group]) -> Group:
    """Return the members of several groups as one group without a name."""
    groups = list(groups)
    return Group("", [member for group in groups for member in group.members], groups[0].run if groups else None)


def described(status: Facts) -> list[Facts]:
    """Return the groups of the core's status as plain values, for programs and the page.

    Each has `name`, `level`, `state` and `figures` (texts), `sums`, and `members`: `name`, `level` and `problems` of
    each.
    """
    return [
        {
            "name": group.name,
            "level": group.level,
            "state": group.state(),
            "figures": group.figures(),
            "sums": group.sums(),
            "members": [
                {"name": member.name, "level": member.level, "problems": [problem.text for problem in member.problems]}
                for member in group.members
            ],
        }
        for group in component_groups(status)
    ]


def group_name(facts: Facts) -> str:
    """Return the name of a component's group: its module, else its host."""
    if module := facts.get("module"):
        return str(module)
    host = facts["info"].get("host")
    return f"host {host}" if host else "no module"


def liveness(components: Iterable[Facts]) -> str:
    """Return how many components live: `12 components alive`, `12 components: 9 LOST, 1 stuck, 2 alive`."""
    states = Counter(component_state(facts) for facts in components)
    total = states.total()
    what = f"{total} component{'' if total == 1 else 's'}"
    if set(states) <= {"alive"}:
        return f"{what} alive" if total else "no components"
    return f"{what}: {', '.join(f'{states[word]} {word}' for word in ('LOST', 'stuck', 'alive') if states[word])}"


def component_state(facts: Facts) -> str:
    """Return "alive", "stuck" or "LOST"."""
    return "LOST" if not facts["alive"] else "stuck" if facts["stuck"] else "alive"


def lost_line(members: Sequence[Member]) -> str:
    """Return one line that names many lost members: how many they are, what they have in common, and their names."""
    heard = [member.facts["heard_s"] for member in members if "heard_s" in member.facts]
    parts = [f"{len(members)} LOST"]
    if heard:
        first, last = duration(min(heard)), duration(max(heard))
        parts.append(f"last heard {first if first == last else f'{first} to {last}'} ago")
    if missing := sum(member.missing for member in members):
        parts.append(f"{missing} MISSING in this run")
    if numbers := sorted(number for member in members for number in member.loss_alarms):
        parts.append(f"alarm{'' if len(numbers) == 1 else 's'} {_ranges(numbers)}")
    more = [problem.text for member in members for problem in member.problems[1:]]
    text = f"{', '.join(parts)}: {', '.join(member.name for member in members)}"
    return "; ".join([text, *dict.fromkeys(more)])


def split_lost(members: Sequence[Member]) -> tuple[list[Member], list[Member]]:
    """Return the lost members that lost_line() names together, and the others. Few lost ones are among the others."""
    lost = [member for member in members if not member.facts["alive"]]
    if len(lost) <= _MANY_LOST:
        return [], list(members)
    return lost, [member for member in members if member.facts["alive"]]


def _ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as text: `3, 7-12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


# What is wrong with one component.


def _member(facts: Facts, alarms: Sequence[Alarm], *, missing: bool) -> Member:
    """Return a component with what is wrong with it. `alarms`: those that are open for it."""
    status = component_status(facts)
    found: list[Problem] = []
    lost = [alarm for alarm in alarms if alarm.condition == "component-lost"] if not facts["alive"] else []
    if not facts["alive"] or missing:
        words = []
        if not facts["alive"]:
            words.append(f"LOST, last heard {duration(facts['heard_s'])} ago" if "heard_s" in facts else "LOST")
        words += ["MISSING in this run"] if missing else []
        words += [f"{alarm.level} {alarm.id}{_seen(alarm)}" for alarm in lost]
        # Without an alarm the core may know of none yet, or be of another version.
        found.append(Problem(max((_level(alarm) for alarm in lost), key=LEVELS.index, default=ALARM), ", ".join(words)))
    stuck = [alarm for alarm in alarms if alarm.condition == "component-stuck"]
    if facts["alive"] and facts["stuck"] and not stuck:
        found.append(Problem(WARNING, "stuck: its waiting work does not move"))
    found += [Problem(_level(alarm), open_line(alarm)) for alarm in alarms if alarm not in lost]
    if facts["alive"]:
        told = {(alarm.condition, alarm.component, alarm.subject) for alarm in alarms}
        found += own_problems(facts["name"], status, told)
        found += _doubts(facts, status)
    loss, others = (found[:1], found[1:]) if not facts["alive"] else ([], found)
    found = loss + sorted(others, key=lambda problem: -LEVELS.index(problem.level))
    if found:
        found[0] = Problem(max((problem.level for problem in found), key=LEVELS.index), found[0].text)
    return Member(facts, status, found, missing, [alarm.id for alarm in lost])


def _level(alarm: Alarm) -> str:
    """Return the level of an alarm for the order of groups. Those come later that somebody takes care of, or that are
    in order again."""
    return ALARM if alarm.level == ALARM and alarm.acknowledged is None and alarm.in_order is None else WARNING


def _seen(alarm: Alarm) -> str:
    return f" (acknowledged by {alarm.by})" if alarm.acknowledged is not None else ""


def own_problems(name: str, status: Status | None, told: set[tuple[str, str, str]]) -> list[Problem]:
    """Return each problem in the status of a component of this name that is not among the alarms in `told`, as
    (condition, component, subject)."""
    found: list[Problem] = []
    if isinstance(status, ProducerStatus | LogStatus):
        limits = limit_lines(name, [msgspec.to_builtins(limit) for limit in status.limits])
        found += [Problem(WARNING, line) for line in limits]
    for reading in present_readings(name, status, AlarmConfig(), in_order=False):
        if reading.level and reading.condition in _SHOWN and (reading.condition, name, reading.subject) not in told:
            found.append(Problem(reading.level, reading.text))
    if isinstance(status, SupervisorStatus):
        waiting = [process for process in status.processes if process.state == "waiting"]
        found += [Problem(WARNING, _not_running(process)) for process in waiting]
    return found


def _doubts(facts: Facts, status: Status | None) -> Iterator[Problem]:
    """Yield what a line without problems must not hide, though no alarm is raised for it."""
    if status is None and is_alarming(facts):
        yield Problem(WARNING, "its status is not understood: it is of another version")
    if isinstance(status, ProducerStatus):
        for io_group, verdict in status.verdicts.items():
            if verdict != "complete" and status.run is None:
                yield Problem(WARNING, f"io_group {io_group} was {verdict} in run {status.counted_run}")
        for board in status.boards:
            yield from (Problem(WARNING, f"io_group {board.io_group}: {line}") for line in board.setup)
        if status.uplink is not None and status.uplink.problem:
            yield Problem(ALARM, f"NOT PUBLISHING: {status.uplink.problem}")


def is_alarming(facts: Facts) -> bool:
    """Whether a living component does not do its work, or nobody can tell."""
    status = component_status(facts)
    if status is None:  # of another version; it may say that the storage is paused
        return facts["kind"] in STATUS and bool(facts["status"])
    if isinstance(status, SupervisorStatus):
        return any(process.state in _NOT_RUNNING for process in status.processes)
    if isinstance(status, ProducerStatus):
        return status.uplink is not None and bool(status.uplink.problem)
    return isinstance(status, StorageStatus) and bool(status.paused)


def component_status(facts: Facts) -> Status | None:
    """Return the status of a component; None before the first one, and when it is of another version."""
    try:
        return msgspec.convert(facts["status"], STATUS[facts["kind"]])
    except (KeyError, msgspec.ValidationError, TypeError, ValueError):
        return None


def limit_lines(where: str, limits: list[Facts]) -> list[str]:
    """Return a line for each limit that a peer has reached within _LIMITS_SHOWN."""
    return [
        f"LIMIT at {where}: {limit['peer']}: {limit['limit']}, {limit['count']} times, last {utc(limit['last'])}"
        for limit in limits
        if time.time() - limit["last"] < _LIMITS_SHOWN
    ]


def converted(values: list[Facts], kind: type[_T]) -> list[_T]:
    """Convert the values that fit: a core of another version may send others."""
    found = []
    for value in values:
        with contextlib.suppress(msgspec.ValidationError):
            found.append(msgspec.convert(value, kind))
    return found


def _not_running(process: SupervisedProcess) -> str:
    why = ": ".join(part for part in (process.last_exit, process.last_line) if part)
    return f"WAITING: {process.name}: {why}; it is started again soon"


# Counts that are added up.


class _Count(NamedTuple):
    """A count of components of a kind, as people read it. `always`: a sum of 0 is shown, too."""

    kind: str
    words: str
    one: str = ""  # in place of the words after 1
    always: bool = False

    def show(self, value: float) -> str:
        if self.words == "written":
            return f"{size(value)}/s written"
        number = f"{value:.3g}" if self.words in ("packets/s", "cores") and value < 1000 else f"{value:,.0f}"
        return f"{number} {self.one if value == 1 and self.one else self.words}"


_COUNTS: Final = {
    "rate": _Count(PRODUCER, "packets/s", always=True),
    "rate_unknown": _Count(PRODUCER, "with unknown rate"),
    "packets": _Count(PRODUCER, "packets of the run", "packet of the run", always=True),
    "dropped": _Count(PRODUCER, "rows dropped", "row dropped"),
    "unknown": _Count(PRODUCER, "unknown words", "unknown word"),
    "bad_parity": _Count(PRODUCER, "with bad parity"),
    "owed_blocks": _Count(PRODUCER, "blocks pending", "block pending"),
    "spooled_blocks": _Count(PRODUCER, "blocks in the spool", "block in the spool"),
    "inherited": _Count(PRODUCER, "blocks of predecessors pending", "block of a predecessor pending"),
    "made_anew": _Count(PRODUCER, "ring files replaced", "ring file replaced"),
    "finished": _Count(PRODUCER, "finished"),
    "writing": _Count(STORAGE, "files open", "file open"),
    "bytes_per_second": _Count(STORAGE, "written"),
    "recovering": _Count(STORAGE, "files being recovered", "file being recovered"),
    "duplicates": _Count(STORAGE, "duplicate blocks removed", "duplicate block removed"),
    "lost_records": _Count(LOG, "records lost", "record lost"),
    "held_back": _Count(LOG, "lines held back", "line held back"),
    "processes": _Count(SUPERVISOR, "processes running", "process running"),
    "restarts": _Count(SUPERVISOR, "restarts", "restart"),
    "cores": _Count("", "cores"),
}


def counts(member: Member, run: int | None) -> dict[str, float]:
    """Return the counts of a component that are added up, by label; none of one that is lost. `run`: the present
    run."""
    status = member.status if member.facts["alive"] else None
    found: dict[str, float] = {}
    if isinstance(status, ProducerStatus):
        names = (
            "dropped",
            "unknown",
            "bad_parity",
            "owed_blocks",
            "spooled_blocks",
            "inherited",
            "made_anew",
            "finished",
        )
        if status.rate is None:
            found["rate_unknown"] = 1
        else:
            found["rate"] = status.rate
        if run is not None and status.run == run:
            found["packets"] = status.packets
        found |= {name: int(getattr(status, name)) for name in names}
    elif isinstance(status, StorageStatus):
        found = {
            "writing": len(status.files),
            "bytes_per_second": status.bytes_per_second,
            "recovering": len(status.recovering),
            "duplicates": status.duplicates,
        }
    elif isinstance(status, LogStatus):
        found = {"lost_records": status.lost, "held_back": status.held_back}
    elif isinstance(status, SupervisorStatus):
        found["processes"] = sum(process.state == "running" for process in status.processes)
        found["restarts"] = sum(process.restarts for process in status.processes)
    if status is not None and status.load is not None:
        found["cores"] = status.load.process
    return found
