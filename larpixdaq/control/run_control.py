"""The run states: STOP, READY, RUN, what leads from one to the next, and who has to take part in it.

Knows no sockets: core.py tells it what happens and carries what it asks for.

What storages say of the files that they have closed: it goes into the catalogue, and may say more about old runs.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from larpixdaq.constants import (
    BEGINNING,
    CANCELLED,
    ENDED,
    ENDING,
    PREPARING,
    PRODUCER,
    READY,
    RUN,
    RUN_DATA,
    STOP,
    STORAGE,
    RunCondition,
)
from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.control.disk_watch import SpaceWatch
from larpixdaq.control.registry import MOST_COMPONENTS, Component, Registry
from larpixdaq.control.run_transitions import (
    RunProcedures,
    check_team,
    connected,
    highest_run,
    kind_of_run,
    team_layout,
    team_versions,
)
from larpixdaq.control.scatter_gather import ComponentAnswer, Late, LogReply, Procedure, ReplyRoute, Steps, Team
from larpixdaq.errors import FileError, StateError
from larpixdaq.protocol.control import Answer, Heartbeat, content
from larpixdaq.protocol.reports import FinishedFile

_log = logging.getLogger("larpixdaq.core")
_LATE_KEPT: Final = 1000
#: Seconds that components have to come back before an interrupted end_run goes on.
_RETURN: Final = 2.0


class RunControl(RunProcedures):
    """What Operators ask for and what happens to components, and the procedures that follow from it."""

    def __init__(self, peers: Registry, catalogue: Catalogue, team: Team) -> None:
        super().__init__(peers, catalogue)
        self.main: Procedure | None = None
        self._team = team
        self._side: list[Procedure] = []
        self._late: dict[str, Late] = {}
        #: A run that the catalogue says was going on when the core ended; a component that is in it brings it back.
        last = catalogue.find()
        self._candidate = last if last is not None and not last.over else None
        if last is not None and last.phase == PREPARING:  # nobody has data of it, and whoever asked for it is gone
            self._give_up_candidate()
        self._end_at: float | None = None
        self._deliveries = Deliveries(catalogue)
        self._space = SpaceWatch()

    @property
    def number(self) -> int | None:
        """The run's number as others are told: None in STOP."""
        return self.run.run if self.run is not None and self.state != STOP else None

    # What Operators ask for. These raise what is not allowed; `reply` gets the rest.

    def prepare(self, comment: str, kind: str, operator: str, reply: ReplyRoute, now: float) -> None:
        """STOP -> READY. `kind`: empty for what follows from the producers' sources."""
        self._idle("prepare_run")
        if self.state != STOP:
            raise StateError(
                f"prepare_run is not allowed in {self.state} (run {self.number}): it leads from STOP to READY"
            )
        producers, storages = self._peers.of_kind(PRODUCER), self._peers.of_kind(STORAGE)
        check_team(producers, storages)
        layout = team_layout(producers)
        self._give_up_candidate()
        highest, warnings = highest_run(self._catalogue.highest(), storages)
        boards = connected(producers)
        run = Run(highest + 1, kind or kind_of_run(boards), comment, operator, time.time_ns())
        run.connected = [msgspec.to_builtins(one) for one in boards]
        run.storages = [one.name for one in storages]
        run.asic = ", ".join(dict.fromkeys(str(one.info.get("asic", "")) for one in producers))
        run.layout, run.versions = layout, team_versions(producers)
        self._catalogue.save(run, new=True)
        self.run = run
        self._start("prepare_run", self._prepare(run, [one.name for one in producers], warnings), reply, now)

    def begin(self, reply: ReplyRoute, now: float) -> None:
        """READY -> RUN."""
        self._idle("begin_run")
        if self.state != READY or self.run is None:
            raise StateError(
                f"begin_run is not allowed in {self.state}: it leads from READY to RUN (prepare_run first)"
            )
        self.run.phase, self.run.begun_ns = BEGINNING, time.time_ns()
        try:
            self._catalogue.save(self.run)
        except FileError:
            self.run.phase, self.run.begun_ns = READY, None
            raise
        self._start("begin_run", self._begin(self.run), reply, now)

    def end(self, reply: ReplyRoute, now: float) -> None:
        """READY or RUN -> STOP."""
        self._idle("end_run")
        if self.state == STOP or self.run is None:
            raise StateError("end_run is not allowed in STOP: no run is prepared or going on")
        self._start("end_run", self._end(self.run), reply, now)

    def abort(self, by: str, reply: ReplyRoute, now: float) -> None:
        """From any state to STOP."""
        if self.main is not None:
            self._keep_late(self.main)
            self.main.cancel(StateError(f"{self.main.what} was aborted by {by}"))
            self.main = None
        if self.run is None:
            self._start("abort_run", self._abort_strays(), reply, now)
        elif self.run.phase == PREPARING:
            names = [*self.run.producers, *(one.name for one in self._peers.of_kind(PRODUCER))]
            self._start("abort_run", self._cancel(self.run, names, f"aborted by {by}"), reply, now)
        else:
            self.run.condition = RunCondition.ABORTED
            self._start("abort_run", self._end(self.run), reply, now)

    def comment(self, operator: str, text: str) -> int:
        """Write a comment on the run that is going on; its number."""
        if self.run is None or self.state == STOP:
            raise StateError("comment is not allowed in STOP: no run is prepared or going on")
        self._catalogue.add_comment(self.run.run, operator, text)
        return self.run.run

    # What happens.

    def registered(self, component: Component, now: float) -> None:
        """A component has come, come back, or found the core back."""
        for procedure in self._procedures():
            procedure.back(component)
        self._place(component, now)
        self._end_abandoned(now)
        last = self._catalogue.find() if self.run is None and component.run is None else None
        if last is not None and may_say_more(last, component.name):
            self._look_again(last, component, now)

    def _place(self, component: Component, now: float) -> None:
        """Bring a component's run and the core's together, where they differ."""
        if self._candidate is not None and component.run == self._candidate.run:
            self._adopt(self._candidate, now)
        run = self.run
        if component.run is not None and (run is None or component.run != run.run):
            self._finish_stray(component, component.run, now)
        elif run is not None and self.state != STOP and run.phase != ENDING and not self._asked(component.name):
            required = component.name in run.storages or component.name in run.producers
            behind = component.run is None or (self.state == RUN and not component.begun)
            if behind and (component.kind == RUN_DATA or required):
                self._aside(f"{component.name} joins run {run.run}", self._join(run, component), now)

    def heard(self, component: Component, beat: Heartbeat, now: float) -> None:
        """A heartbeat. A storage's disk may run out, and what it has finished may complete a run that is over."""
        if (beat.run, beat.begun) != (component.run, component.begun) and not self._asked(component.name):
            # It has answered a core that was not there any more.
            component.run, component.begun = beat.run, beat.begun
            self._place(component, now)
        if component.kind != STORAGE:
            return
        self._space.take(component)
        for run in self._deliveries.take(component):
            self._look_again(run, component, now)

    def _look_again(self, run: Run, component: Component, now: float) -> None:
        if "report_run" in component.actions:
            self._aside(f"{component.name} is asked anew about run {run.run}", self._review(run, component), now)

    def reconnected(self, component: Component) -> None:
        """Same session, new connection."""
        for procedure in self._procedures():
            procedure.back(component)

    def lost(self, name: str, now: float) -> None:
        for procedure in self._procedures():
            procedure.lost(name, now)
        if self.run is not None and (name in self.run.producers or name in self.run.storages):
            _log.error("run %d continues without %s, which is lost", self.run.run, name)

    def answered(self, component: Component, answer: Answer, now: float) -> bool:
        """Take a component's answer in; False when it is about none of our questions."""
        for procedure in self._procedures():
            if procedure.awaits(answer.request):
                done = procedure.answered(component, answer)
                if done is not None:
                    self._mark(component, *done)
                self.tick(now)
                return True
        late = self._late.get(answer.request)
        if late is None or late.name != component.name:
            return False
        if answer.kind in ("result", "error"):
            del self._late[answer.request]
        if answer.kind == "result":
            self._mark(component, late.action, late.params)
            self._take_late(component, late.action, late.params["run"], answer)
        return True

    def tick(self, now: float) -> None:
        """To be called often: time limits, and the next steps."""
        self._now = now
        if self._end_at is not None and now >= self._end_at and self.main is None and self.run is not None:
            self._end_at = None
            what = f"end_run of run {self.run.run}, which the core had begun before it was restarted"
            self._start("end_run", self._end(self.run), LogReply(what), now)
        for procedure in self._procedures():
            procedure.tick(self._instances(), now)
            if procedure.done:
                self._keep_late(procedure)
        self._side = [one for one in self._side if not one.done]
        if self.main is not None and self.main.done:
            self.main = None

    @property
    def waits(self) -> bool:
        """Something goes on that has time limits."""
        return self.main is not None or bool(self._side) or self._end_at is not None

    def excuse(self, seconds: float) -> None:
        """The core itself stood still for so long."""
        for procedure in self._procedures():
            procedure.excuse(seconds)

    # What they need.

    def _idle(self, what: str) -> None:
        if self.main is not None:
            raise StateError(f"{what} is not allowed now: {self.main.what} is still going on")

    def _procedures(self) -> list[Procedure]:
        return [*self._side, *([self.main] if self.main is not None else [])]

    def _instances(self) -> dict[str, str]:
        return {one.name: one.instance for one in self._peers.components.values()}

    def _start(self, what: str, steps: Steps, reply: ReplyRoute, now: float) -> None:
        self._now = now
        self.main = Procedure(what, steps, self._team, reply)
        self.main.start(self._instances(), now)
        self.tick(now)

    def _aside(self, what: str, steps: Steps, now: float) -> None:
        """Start what nobody has asked for; several may go on at once."""
        _log.warning("%s", what)
        self._now = now
        procedure = Procedure(what, steps, self._team, LogReply(what))
        self._side.append(procedure)
        procedure.start(self._instances(), now)

    def _asked(self, name: str) -> bool:
        """Whether a question to this component is open: then its answer decides, not what it says at registration."""
        return any(procedure.asks(name) for procedure in self._procedures())

    def _keep_late(self, procedure: Procedure) -> None:
        self._late.update(procedure.late)
        while len(self._late) > _LATE_KEPT:
            del self._late[next(iter(self._late))]

    def _mark(self, component: Component, action: str, params: dict[str, Any]) -> None:
        """What a component has done says which run it is in."""
        if action == "prepare_run":
            component.run, component.begun = params["run"], False
        elif action == "begin_run":
            component.begun = True
        elif action != "report_run" and component.run == params["run"]:
            component.run, component.begun = None, False

    def _take_late(self, component: Component, action: str, number: int, answer: Answer) -> None:
        if action in ("end_run", "abort_run", "report_run"):
            self._amend(number, component, ComponentAnswer(True, content(answer)))
        elif action in ("prepare_run", "begin_run") and (self.run is None or self.run.run != number):
            self._finish_stray(component, number, self._now)

    def _finish_stray(self, component: Component, number: int, now: float) -> None:
        run = self._catalogue.find(number)
        if run is None:
            _log.error(
                "%s is in run %d, of which the catalogue knows nothing (abort_run ends it)", component.name, number
            )
            return
        if not run.over:  # it was the run before the last restart, and nobody was in it
            self._abandon(run)
        self._aside(f"{component.name} ends run {number}, which is over", self._finish(run, component), now)

    def _adopt(self, run: Run, now: float) -> None:
        """Go on with the run that was going on when the core ended. What it was about to do then, it does now."""
        self._candidate = None
        _log.warning("run %d is picked up again, it was in %s", run.run, run.phase)
        self.run = run
        if run.phase == ENDING:
            # Those that take part have a moment to come back.
            self._end_at = now + _RETURN
        elif run.phase == BEGINNING:
            run.phase = RUN
            self._save(run)
        self._go(READY if run.phase == READY else RUN)

    def _give_up_candidate(self) -> None:
        if self._candidate is not None:
            self._abandon(self._candidate)
            self._candidate = None

    def _end_abandoned(self, now: float) -> None:
        """Give up the run that was going on when the core ended as soon as all who took part are here and none is in it
        any more: they were restarted too. Its storages say what they have of it."""
        run = self._candidate
        if run is None or not {*run.producers, *run.storages} <= self._peers.components.keys():
            return
        self._give_up_candidate()
        for name in run.storages:
            if may_say_more(run, name):
                self._look_again(run, self._peers.components[name], now)

    def _abandon(self, run: Run) -> None:
        prepared = run.phase != PREPARING
        over = (ENDED, RunCondition.INTERRUPTED) if prepared else (CANCELLED, RunCondition.CANCELLED)
        run.phase, run.condition = over
        run.reasons = [
            "the core was restarted and no component was in this run any more"
            if prepared
            else "the core was restarted while the run was being prepared"
        ]
        run.ended_ns = time.time_ns()
        if prepared:
            run.rows = run.stored = None  # until producers and a storage say it
        self._save(run)


class Deliveries:
    """`take()` is for every heartbeat: it looks only at what is new in it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._seen: dict[str, Any] = {}  # by storage, as it came

    def take(self, component: Component) -> list[Run]:
        """The runs that are over, and of which this storage now has more than it reported."""
        told = component.status.get("finished")
        before = self._seen.get(component.name)
        if not told or told == before:
            return []
        while len(self._seen) > MOST_COMPONENTS:
            del self._seen[next(iter(self._seen))]
        self._seen[component.name] = told
        try:
            files = msgspec.convert(told, list[FinishedFile])
            known = msgspec.convert(before or [], list[FinishedFile])
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            _log.error("%s: what it says of finished files is not understood: %s", component.name, error)
            return []
        runs: dict[int, Run] = {}
        for one in files:
            if one not in known and (run := self._new(component, one)) is not None:
                runs[run.run] = run
        return list(runs.values())

    def _new(self, component: Component, file: FinishedFile) -> Run | None:
        path = str(Path(str(component.info.get("directory", ""))) / file.file)
        try:
            new = self._catalogue.add_file(component.name, path, file.run, file.bytes, file.sha256, file.condition)
            run = self._catalogue.find(file.run) if new else None
        except FileError as error:
            _log.error("run %d: %s", file.run, error)
            return None
        if run is None or run.phase != ENDED or component.name not in run.storages:
            return None
        reported = {Path(one).name for one in run.reports.get(component.name, {}).get("files", [])}
        return run if may_say_more(run, component.name) or Path(path).name not in reported else None


def may_say_more(run: Run, storage: str) -> bool:
    """Whether a run that is over may turn out better once this storage is asked, or it never had its say."""
    open_question = run.condition in (RunCondition.INTERRUPTED, RunCondition.INCOMPLETE) or storage not in run.reports
    return run.phase == ENDED and storage in run.storages and open_question
