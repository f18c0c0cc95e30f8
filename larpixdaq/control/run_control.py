"""The run states STOP, READY and RUN, and the transitions between them.

RunControl has no sockets: core.py reports events to it, and sends its requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeVar

from larpixdaq.constants import (
    BEGINNING,
    CANCELLED,
    ENDED,
    ENDING,
    LOST,
    PREPARING,
    PRODUCER,
    READY,
    RUN,
    RUN_DATA,
    STOP,
    STORAGE,
    RunCondition,
)
from larpixdaq.control import disk_watch
from larpixdaq.control.catalogue import Author, Catalogue, Run
from larpixdaq.control.registry import MAX_COMPONENTS, Component, Registry
from larpixdaq.control.run_instructions import (
    begin_params,
    check_team,
    connected,
    end_params,
    highest_run,
    kind_of_run,
    mixed_ways,
    monitor_params,
    note_connected,
    producer_params,
    shared_io_groups,
    storage_params,
    take_file,
    take_ready,
    team_layout,
    team_versions,
)
from larpixdaq.control.run_verdict import RunVerdict, judge, take_end, take_report
from larpixdaq.control.scatter_gather import (
    ComponentAnswer,
    ComponentRequest,
    Item,
    LogReply,
    Procedures,
    ReplyRoute,
    Steps,
    Team,
    fold_reasons,
)
from larpixdaq.errors import ComponentError, FileError, LarpixDaqError, RequestError, StateError
from larpixdaq.protocol.control import Answer, Heartbeat, content
from larpixdaq.protocol.reports import FinishedFile, StorageStatus

_log = logging.getLogger("larpixdaq.core")
_T = TypeVar("_T")
# Time limits of components for the steps of a run, seconds.
PREPARE_LIMIT: Final = 10.0
BEGIN_LIMIT: Final = 10.0
PRODUCER_END_LIMIT: Final = 10.0
END_LIMIT: Final = 30.0
#: The same for online monitors: the run continues without their answers.
MONITOR_LIMIT: Final = 1.0
#: Seconds that end_run waits for a required component that is lost.
LOST_PATIENCE: Final = 5.0
#: Maximum number of comments in one request to a storage: 400 kB.
_COMMENTS_AT_ONCE: Final = 10
#: Maximum number of components that the line of a transition names.
_MANY_LISTED: Final = 12
#: Seconds for components to come back before the core continues an interrupted end_run.
_RETURN: Final = 2.0


class RunControl:
    """Starts the procedures that follow from requests of Operators and from events of components.

    `state` is STOP, READY or RUN; `run` is the present run, from the drawing of its number to its end.
    """

    def __init__(self, peers: Registry, catalogue: Catalogue, team: Team) -> None:
        self.state = STOP
        self.run: Run | None = None
        self._by = ""  # the Operator whose request was the last one, for the log
        self._peers, self._catalogue = peers, catalogue
        self._procedures = Procedures(peers, team)
        #: The unfinished run of the catalogue after a restart of the core. It continues if a component is still in it.
        last = catalogue.find()
        self._candidate = last if last is not None and not last.is_over else None
        #: The last run that is over, as it is in the catalogue now.
        self.last_over = last if last is None or last.is_over else catalogue.find(last.run - 1)
        if last is not None and last.phase == PREPARING:  # it has no data, and its Operator is gone
            self._give_up_candidate()
        #: When the core continues an end_run that its own end has interrupted.
        self._end_at: float | None = None
        self._comments_owed: set[str] = set()  # storages for which the catalogue may have comments
        self._comments_sent: set[str] = set()  # storages that are being given comments
        self._deliveries = Deliveries(catalogue)

    @property
    def number(self) -> int | None:
        """The run's number for others: None in STOP."""
        return self.run.run if self.run is not None and self.state != STOP else None

    @property
    def busy(self) -> str | None:
        """The running action; None if the next action may begin."""
        return self._procedures.main.what if self._procedures.main is not None else None

    # Requests of Operators. They raise StateError and ComponentError at once; `reply` gets the result and later errors.

    def prepare(self, comment: str, kind: str, operator: str, reply: ReplyRoute, now: float, shifter: str = "") -> None:
        """STOP -> READY. `kind`: "" for the default, which depends on the producers' sources."""
        self._check_idle("prepare_run")
        if self.state != STOP:
            raise StateError(
                f"prepare_run is not allowed in {self.state} (run {self.number}): it leads from STOP to READY"
            )
        producers, storages = self._peers.of_kind(PRODUCER), self._peers.of_kind(STORAGE)
        check_team(producers, storages)
        layout = team_layout(producers)
        self._give_up_candidate()
        highest, warnings = highest_run(self._catalogue.highest, storages)
        boards = connected(producers)
        run = Run(self._catalogue.draw(highest), kind or kind_of_run(boards), comment, operator, time.time_ns())
        run.connected, run.layout, run.versions = boards, layout, team_versions(producers)
        run.shifter = shifter
        run.storages = [storage.name for storage in storages]
        run.asic = ", ".join(dict.fromkeys(str(producer.info.get("asic", "")) for producer in producers))
        self._catalogue.save(run, new=True)
        self.run, self._by = run, operator
        self._start("prepare_run", self._prepare(run, [producer.name for producer in producers], warnings), reply, now)

    def begin(self, reply: ReplyRoute, now: float, by: str = "") -> None:
        """READY -> RUN. `by`: the Operator, for the log."""
        self._check_idle("begin_run")
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
        self._by = by
        self._start("begin_run", self._begin(self.run), reply, now)

    def end(self, reply: ReplyRoute, now: float, by: str = "") -> None:
        """READY or RUN -> STOP. `by`: the Operator, for the log."""
        self._check_idle("end_run")
        if self.state == STOP or self.run is None:
            raise StateError("end_run is not allowed in STOP: no run is prepared or going on")
        self._by = by
        self._start("end_run", self._end(self.run), reply, now)

    def abort(self, by: str, reply: ReplyRoute, now: float) -> None:
        """From any state to STOP."""
        self._procedures.cancel(StateError(f"{self.busy} was aborted by {by}"))
        self._by = by
        if self.run is None:
            self._start("abort_run", self._abort_strays(), reply, now)
        elif self.run.phase == PREPARING:
            names = [*self.run.producers, *(component.name for component in self._peers.of_kind(PRODUCER))]
            self._start("abort_run", self._cancel(self.run, names, f"aborted by {by}"), reply, now)
        else:
            self.run.condition = RunCondition.ABORTED
            self._start("abort_run", self._end(self.run), reply, now)

    def find(self, number: int | None, action: str) -> Run:
        """Return the run of this number, by default the present run, or else the last one. RequestError, whose text
        begins with `action`, if there is none."""
        run = self.run if number is None or (self.run is not None and self.run.run == number) else None
        run = run or self._catalogue.find(number)
        if run is None:
            which = "no run yet" if number is None else f"no run {number}"
            raise RequestError(f"{action}: there is {which} in the catalogue")
        return run

    def comment(self, number: int | None, text: str, author: Author) -> int:
        """Add a comment on a run, by default as in find(), to the catalogue. Returns the number of the run.

        The storages get it with their next heartbeats.
        """
        run = self.find(number, "comment").run
        self._catalogue.add_comment(run, text, author)
        self._comments_owed |= {storage.name for storage in self._peers.of_kind(STORAGE)}
        return run

    # Events.

    def registered(self, component: Component, now: float) -> None:
        """A component has registered, for the first time, after a loss, or after a restart of the core."""
        self._procedures.send_again(component)
        self._place(component, now)
        self._check_way(component)
        self._end_abandoned(now)
        if component.kind == STORAGE:
            self._owe_comments(component.name)
        last = self._catalogue.find() if self.run is None and component.run is None else None
        if last is not None and may_improve(last, component.name):
            self._request_report(last, component, now)

    def _check_way(self, component: Component) -> None:
        """Log it if a component of the run has come back with --stream, or without, unlike the others."""
        required = () if self.run is None else (*self.run.producers, *self.run.storages)
        if self.run is not None and component.name in required:
            team = [self._peers.components[name] for name in required if name in self._peers.components]
            if mixed := mixed_ways(team, []):
                _log.error("run %d: %s: no rows go from the ones to the others", self.run.run, mixed)

    def _place(self, component: Component, now: float) -> None:
        """Bring a component into the present run, or out of another run, unless its answer to a request is awaited."""
        if self._candidate is not None and component.run == self._candidate.run:
            self._adopt(self._candidate, now)
        run = self.run
        if component.run is not None and (run is None or component.run != run.run):
            self._finish_stray(component, component.run, now)
        elif run is not None and self.state != STOP and run.phase != ENDING and not self._procedures.awaits(component):
            required = component.name in run.storages or component.name in run.producers
            late = component.run is None or (self.state == RUN and not component.begun)
            if late and (component.kind == RUN_DATA or required):
                self._procedures.start_aside(f"{component.name} joins run {run.run}", self._join(run, component), now)

    def heard(self, component: Component, beat: Heartbeat, now: float) -> None:
        """A heartbeat has come: with the component's run, a nearly full disk, or files that complete an earlier run."""
        if (beat.run, beat.begun) != (component.run, component.begun) and not self._procedures.awaits(component):
            # The component has answered to a core that has died since.
            component.run, component.begun = beat.run, beat.begun
            self._place(component, now)
        if component.kind != STORAGE:
            return
        self._pass_comments(component, now)
        status = component.read_status(StorageStatus)
        if status is None:
            return
        for run in self._deliveries.take(component, status.finished):
            self._request_report(run, component, now)

    def _owe_comments(self, storage: str) -> None:
        self._comments_owed.add(storage)
        try:
            self._catalogue.add_storage(storage)
        except FileError as error:
            _log.error("comments for %s: %s", storage, error)

    def _pass_comments(self, storage: Component, now: float) -> None:
        """Give a storage the comments that it has not got yet, when it works on no step of a run."""
        name = storage.name
        if name not in self._comments_owed or name in self._comments_sent or self._procedures.awaits(storage):
            return
        self._comments_owed.discard(name)
        try:
            if self._catalogue.undelivered(name):
                self._procedures.start_aside(f"comments for {name}", self._deliver(storage), now, logging.DEBUG)
        except FileError as error:
            _log.error("comments for %s: %s", name, error)

    def _request_report(self, run: Run, component: Component, now: float) -> None:
        what = f"{component.name} is asked again about run {run.run}"
        self._procedures.start_aside(what, self._review(run, component), now)

    def reconnected(self, component: Component) -> None:
        """A component has a new connection with the same session."""
        self._procedures.send_again(component)

    def lost(self, name: str, now: float) -> None:
        self._procedures.lost(name, now)
        if self.run is not None and (name in self.run.producers or name in self.run.storages):
            _log.error("run %d continues without %s, which is lost", self.run.run, name)

    def answered(self, component: Component, answer: Answer, now: float) -> bool:
        """Handle a component's answer. Returns False if run control has not requested it."""
        instruction = self._procedures.answered(component, answer)
        if instruction is None:
            return False
        if instruction.done:
            self._note_step(component, instruction.action, instruction.item.params)
            if instruction.late:
                self._take_late(component, instruction.action, instruction.item.params["run"], answer, now)
        self.tick(now)
        return True

    def tick(self, now: float) -> None:
        """Check the time limits, and continue the procedures. Must be called at least every 50 ms while `waits`."""
        if self._end_at is not None and now >= self._end_at and self.busy is None and self.run is not None:
            self._end_at = None
            what = f"end_run of run {self.run.run}, which the core had begun before it was restarted"
            self._start("end_run", self._end(self.run), LogReply(what), now)
        self._procedures.tick(now)

    @property
    def waits(self) -> bool:
        """Whether a procedure with time limits is running."""
        return self._procedures.busy or self._end_at is not None

    def extend_limits(self, seconds: float) -> None:
        """Extend all time limits by a pause of the core."""
        self._procedures.extend_limits(seconds)

    # Consequences of events.

    def _check_idle(self, what: str) -> None:
        if self.busy is not None:
            raise StateError(f"{what} is not allowed now: {self.busy} is still going on")

    def _start(self, what: str, steps: Steps, reply: ReplyRoute, now: float) -> None:
        self._procedures.start(what, steps, reply, now)
        self.tick(now)

    def _note_step(self, component: Component, action: str, params: dict[str, Any]) -> None:
        """Note which run a component is in after it has done `action`."""
        if action == "prepare_run":
            component.run, component.begun = params["run"], False
        elif action == "begin_run":
            component.begun = True
        elif action not in ("report_run", "add_comments") and component.run == params["run"]:
            component.run, component.begun = None, False

    def _take_late(self, component: Component, action: str, number: int, answer: Answer, now: float) -> None:
        if action in ("end_run", "abort_run", "report_run"):
            self._amend(number, component, content(answer))
        elif action in ("prepare_run", "begin_run") and (self.run is None or self.run.run != number):
            self._finish_stray(component, number, now)

    def _finish_stray(self, component: Component, number: int, now: float) -> None:
        run = self._catalogue.find(number)
        if run is None:
            _log.error(
                "%s is in run %d, of which the catalogue knows nothing (abort_run ends it)", component.name, number
            )
            return
        if not run.is_over:  # the run before the last restart, which no component was in
            self._abandon(run)
        self._procedures.start_aside(
            f"{component.name} ends run {number}, which is over", self._finish(run, component), now
        )

    def _adopt(self, run: Run, now: float) -> None:
        """Continue the unfinished run of the catalogue, with the step that the core had begun before its end."""
        self._candidate = None
        _log.warning("run %d continues after a restart of the core, it was in %s", run.run, run.phase)
        self.run = run
        if run.phase == ENDING:
            # The other components of the run have this time to come back.
            self._end_at = now + _RETURN
        elif run.phase == BEGINNING:
            run.phase = RUN
            self._save(run)
        self.state = READY if run.phase == READY else RUN

    def _give_up_candidate(self) -> None:
        if self._candidate is not None:
            self._abandon(self._candidate)
            self._candidate = None

    def _end_abandoned(self, now: float) -> None:
        """Give up the unfinished run of the catalogue when all its components have registered outside of it.

        They were restarted too. The storages are asked for reports on the run.
        """
        run = self._candidate
        if run is None or not {*run.producers, *run.storages} <= self._peers.components.keys():
            return
        self._give_up_candidate()
        for name in run.storages:
            if may_improve(run, name):
                self._request_report(run, self._peers.components[name], now)

    def _abandon(self, run: Run) -> None:
        if run.phase == PREPARING:
            run.phase, run.condition, run.rows, run.stored = CANCELLED, RunCondition.CANCELLED, 0, 0
            run.reasons = ["the core was restarted while the run was being prepared"]
        else:
            run.phase, run.condition = ENDED, RunCondition.INTERRUPTED
            run.reasons = ["the core was restarted and no component was in this run any more"]
            run.rows = run.stored = None  # until producers and a storage report them
        run.ended_ns = time.time_ns()
        self._save(run)

    # Procedures.

    def _prepare(self, run: Run, producers: list[str], warnings: list[str]) -> Steps:
        warnings += shared_io_groups([self._peers.components[name] for name in producers])
        warnings += disk_watch.warnings([self._peers.components[name] for name in run.storages])
        outcomes: Mapping[str, ComponentAnswer] = {}
        try:
            # Storages first, so that the file is open before producers send the configurations of chips.
            monitors = self._monitor_items(monitor_params(run))
            stores = {name: Item(storage_params(run, producers), PREPARE_LIMIT) for name in run.storages}
            outcomes = yield ComponentRequest("prepare_run", {**stores, **monitors})
            warnings += [outcomes[name].text for name in monitors if not outcomes[name].ok]
            files = self._take_all(run, "storages", outcomes, run.storages, take_file)
            items = {name: Item(producer_params(run), PREPARE_LIMIT) for name in producers}
            outcomes = yield ComponentRequest("prepare_run", items)
            ready = self._take_all(run, "producers", outcomes, producers, partial(take_ready, run))
            warnings += [text for text in ready if text]
            run.phase = READY
            self._catalogue.save(run)
        except LarpixDaqError as error:
            advice = _advice(answer for name, answer in outcomes.items() if name in (*producers, *run.storages))
            yield from self._cancel(run, producers, str(error))
            if advice:
                raise ComponentError(f"{error}{advice}") from None
            raise
        where = f"{_listed('producers', producers)}, {_listed('storages', run.storages)}"
        self._change_state(READY, run, f"{run.kind}, {where}{f': {run.comment}' if run.comment else ''}")
        warnings = self._fold(run, warnings)
        self._warn("prepare_run", warnings)
        return {"run": run.run, "files": files, "warnings": warnings}

    def _begin(self, run: Run) -> Steps:
        params = {"run": run.run}
        monitors = self._monitor_items(params)
        begin = begin_params(run)
        stores = {name: Item(begin, BEGIN_LIMIT) for name in run.storages if not self._has_begun(name)}
        outcomes = yield ComponentRequest("begin_run", {**stores, **monitors})
        warnings = [outcomes[name].text for name in monitors if not outcomes[name].ok]
        failed = [outcomes[name] for name in stores if not outcomes[name].ok]
        if not failed:
            items = {name: Item(params, BEGIN_LIMIT) for name in run.producers if not self._has_begun(name)}
            outcomes = yield ComponentRequest("begin_run", items)
            failed = [outcome for outcome in outcomes.values() if not outcome.ok]
        if failed:
            # Data that have come since READY are the run's: it is aborted and kept.
            run.condition = RunCondition.ABORTED
            run.reasons = [outcome.text for outcome in failed]
            text = "; ".join(self._fold(run, run.reasons)) + _advice(failed)
            yield from self._end(run)
            raise ComponentError(f"run {run.run} was aborted, since it could not begin: {text}")
        run.phase = RUN
        self._save(run)
        self._change_state(RUN, run)
        warnings = self._fold(run, warnings)
        self._warn("begin_run", warnings)
        return {"run": run.run, "warnings": warnings}

    def _end(self, run: Run) -> Steps:
        started = self._procedures.now
        run.phase = ENDING
        run.stopped_ns = run.stopped_ns or time.time_ns()
        note_connected(run, self._peers.components)
        failures = list(run.reasons)
        self._save(run, failures)
        aborted = run.condition == RunCondition.ABORTED
        patience = 0.0 if aborted else LOST_PATIENCE
        known = {(end.name, end.epoch) for end in run.ends}
        items = {
            name: Item({"run": run.run}, PRODUCER_END_LIMIT, min(patience, self._patience(name)))
            for name, epochs in run.producers.items()
            if (name, epochs[-1]) not in known
        }
        outcomes = yield ComponentRequest("abort_run" if aborted else "end_run", items)
        silent = {name: why for name in items if (why := take_end(run, name, outcomes[name]))}
        self._save(run, failures)
        left = max(MONITOR_LIMIT, END_LIMIT - (self._procedures.now - started))
        waiting = [name for name in run.storages if name not in run.reports]
        stores = {name: Item(end_params(run), left, min(patience, self._patience(name))) for name in waiting}
        monitors = self._monitor_items({"run": run.run})
        outcomes = yield ComponentRequest("end_run", {**stores, **monitors})
        self._warn("end_run", self._fold(run, (outcomes[name].text for name in monitors if not outcomes[name].ok)))
        failed = {name: why for name in stores if (why := take_report(run, name, outcomes[name]))}
        # A storage that was restarted, or whose answer went to an earlier core, has no open file, but can report.
        left = END_LIMIT - (self._procedures.now - started)
        able = [name for name in failed if left > 0 and name in self._peers.components]
        outcomes = yield ComponentRequest("report_run", {name: Item({"run": run.run}, left) for name in able})
        for name in able:
            if not take_report(run, name, outcomes[name]):
                del failed[name]
        # A standby that has taken over in another directory has no files, but the brokers have the whole run.
        there = [self._peers.components[name] for name in able if name in failed and name in self._peers.components]
        prepare = Item(storage_params(run, run.producers), PREPARE_LIMIT)
        anew = {storage.name: prepare for storage in there if storage.info.get("brokers") and storage.run is None}
        outcomes = yield ComponentRequest("prepare_run", anew)
        left = END_LIMIT - (self._procedures.now - started)
        items = {name: Item(end_params(run), left) for name in anew if outcomes[name].ok}
        outcomes = yield ComponentRequest("end_run", items)
        for name in items:
            if not take_report(run, name, outcomes[name]):
                del failed[name]
        failures += failed.values()
        run.ended_ns = time.time_ns()
        return self._close(run, failures, silent)

    def _close(self, run: Run, failures: list[str], silent: dict[str, str]) -> dict[str, Any]:
        verdict = self._judge(run, failures, silent)
        run.phase = ENDED
        run.condition, run.rows, run.stored, run.files, run.reasons = verdict
        self._save(run, run.reasons)
        self.run = None
        counts = f"{verdict.rows if verdict.rows is not None else 'unknown'} rows made, "
        counts += f"{verdict.stored if verdict.stored is not None else 'unknown'} stored in "
        counts += "1 file" if len(verdict.files) == 1 else f"{len(verdict.files)} files"
        detail = "; ".join([f"{verdict.condition}, {counts}", *verdict.reasons])
        self._change_state(STOP, run, detail, worth=verdict.condition)
        return {"run": run.run, **verdict._asdict()}

    def _cancel(self, run: Run, producers: list[str], reason: str) -> Steps:
        """Go back to STOP from a run that was never READY."""
        params = {"run": run.run}
        names = dict.fromkeys([*producers, *run.storages])
        yield ComponentRequest(
            "cancel_run", {name: Item(params, MONITOR_LIMIT) for name in names if name in self._peers.components}
        )
        yield ComponentRequest("end_run", self._monitor_items(params))
        run.phase, run.condition, run.rows, run.stored = CANCELLED, RunCondition.CANCELLED, 0, 0
        run.ended_ns, run.reasons = time.time_ns(), [reason]
        self._save(run)
        self.run = None
        self._change_state(STOP, run, run.condition, worth=run.condition)
        return {"run": run.run, "condition": run.condition, "rows": 0, "stored": 0, "files": [], "reasons": [reason]}

    def _join(self, run: Run, component: Component) -> Steps:
        """Bring a component that has registered during the run into the run."""
        name = component.name
        if component.run is None:
            params = {PRODUCER: producer_params(run), STORAGE: storage_params(run, run.producers)}
            item = Item(params.get(component.kind, monitor_params(run)), PREPARE_LIMIT)
            outcomes = yield ComponentRequest("prepare_run", {name: item})
            if component.kind == PRODUCER and (warning := take_ready(run, name, outcomes[name])):
                self._warn("prepare_run", [warning])
            elif component.kind == STORAGE:
                take_file(name, outcomes[name])
            self._save(run)
        if self.state == RUN and self.run is run and run.phase != ENDING:
            begin = begin_params(run) if component.kind == STORAGE else {"run": run.run}
            outcomes = yield ComponentRequest("begin_run", {name: Item(begin, BEGIN_LIMIT)})
            outcomes[name].result()

    def _review(self, run: Run, component: Component) -> Steps:
        """Ask a storage for a report on a run that is over, and judge the run again."""
        outcomes = yield ComponentRequest("report_run", {component.name: Item({"run": run.run}, END_LIMIT)})
        self._amend(run.run, component, outcomes[component.name].result())

    def _finish(self, run: Run, component: Component) -> Steps:
        """End a run for a component that was away when the run ended."""
        action = "end_run"
        params: dict[str, Any] = {"run": run.run}
        if run.phase == CANCELLED and component.kind != RUN_DATA:
            action = "cancel_run"
        elif component.kind == STORAGE:
            params = end_params(run)
        elif run.condition == RunCondition.ABORTED and component.kind == PRODUCER:
            action = "abort_run"
        outcomes = yield ComponentRequest(action, {component.name: Item(params, END_LIMIT)})
        value = outcomes[component.name].result()
        if action != "cancel_run":
            self._amend(run.run, component, value)

    def _deliver(self, storage: Component) -> Steps:
        """Give a storage its comments, for the open part or the sidecars. Those on a run that it has not opened yet
        wait. Those that it refuses twice are in the catalogue alone."""
        name = storage.name
        self._comments_sent.add(name)
        try:
            while undelivered := self._catalogue.undelivered(name):
                number, same = next(groupby(undelivered, itemgetter(0)))
                comments = [comment for _, comment in same][:_COMMENTS_AT_ONCE]
                run = self._catalogue.find(number)
                if run is not None and name in run.storages:
                    refusals = 0
                    while refusals < 2:  # again, because the storage may have been restarted meanwhile
                        present = self._peers.components.get(name)
                        if present is None or not (run.is_over or present.run == number):
                            self._comments_owed.add(name)
                            return
                        item = Item({"run": number, "comments": comments}, END_LIMIT)
                        outcome = (yield ComponentRequest("add_comments", {name: item}))[name]
                        if outcome.ok:
                            break
                        refusals += 1
                        if refusals == 2:
                            _log.error("run %d: only the catalogue has a comment on it: %s", number, outcome.text)
                self._catalogue.note_delivered(name, comments[-1].id)
        finally:
            self._comments_sent.discard(name)

    def _abort_strays(self) -> Steps:
        """In STOP, end the runs that components are still in."""
        strays = [(stray, stray.run) for stray in self._peers.components.values() if stray.run is not None]
        cancelled = {
            stray.name: Item({"run": number}, MONITOR_LIMIT)
            for stray, number in strays
            if stray.kind != RUN_DATA and (run := self._catalogue.find(number)) is not None and run.phase == CANCELLED
        }

        def left(kind: str) -> list[Component]:
            """Return the components that are still in their run: others may have left it since."""
            return [
                stray
                for stray, run in strays
                if stray.kind == kind and stray.run == run and stray.name not in cancelled
            ]

        yield ComponentRequest("cancel_run", cancelled)
        producers = {stray.name: Item({"run": stray.run}, PRODUCER_END_LIMIT) for stray in left(PRODUCER)}
        yield ComponentRequest("abort_run", producers)
        aborted = {"how": "aborted", "producers": []}
        others = {stray.name: Item({"run": stray.run} | aborted, END_LIMIT) for stray in left(STORAGE)}
        others |= {stray.name: Item({"run": stray.run}, MONITOR_LIMIT) for stray in left(RUN_DATA)}
        yield ComponentRequest("end_run", others)
        return {"run": None, "condition": "", "rows": 0, "stored": 0, "files": [], "reasons": []}

    # Steps of procedures.

    def _change_state(self, state: str, run: Run, detail: str = "", worth: str = RunCondition.COMPLETE) -> None:
        """Go to another state, and log who has asked for it. `worth`: the condition of a run that is over."""
        previous, self.state = self.state, state
        level = logging.INFO if worth == RunCondition.COMPLETE else logging.WARNING
        change = f"{previous} to {state}" if previous != state else state
        text = f"run {run.run}: {change}{f' by {self._by}' if self._by else ''}"
        _log.log(level, "%s", f"{text}, {detail}" if detail else text)

    def _monitor_items(self, params: dict[str, Any]) -> dict[str, Item]:
        return {component.name: Item(params, MONITOR_LIMIT) for component in self._peers.of_kind(RUN_DATA)}

    def _amend(self, number: int, component: Component, value: Any) -> None:
        """Judge a run again, with what a producer or storage answers after the run was closed without its answer."""
        outcome = ComponentAnswer(True, value)
        # Read again, because other answers may have changed the run since the request.
        run = self.run if self.run is not None and self.run.run == number else self._catalogue.find(number)
        if run is None or component.kind == RUN_DATA:
            return
        silent: dict[str, str] = {}
        failures: list[str] = []
        if component.kind == PRODUCER:
            silent[component.name] = take_end(run, component.name, outcome)
        elif why := take_report(run, component.name, outcome):
            failures.append(why)
        if run.phase != ENDED:
            return
        previous, verdict = run.condition, self._judge(run, failures, silent)
        level = logging.INFO if verdict.condition == previous else logging.WARNING
        _log.log(level, "run %d: %s after the report of %s", number, verdict.condition, component.name)
        run.condition, run.rows, run.stored, run.files, run.reasons = verdict
        self._save(run)

    def _patience(self, name: str) -> float:
        """Seconds end_run still waits for a component if it is lost, counted from the loss."""
        lost = self._peers.lost.get(name)
        return LOST_PATIENCE if lost is None else max(0.0, LOST_PATIENCE + LOST - (self._procedures.now - lost.heard))

    def _has_begun(self, name: str) -> bool:
        component = self._peers.components.get(name)
        return component is not None and component.begun

    def _save(self, run: Run, failures: list[str] | None = None) -> None:
        """Write a run to the catalogue. An error does not stop the run: it is logged, and noted in `failures`."""
        if run.is_over and (self.last_over is None or run.run >= self.last_over.run):
            self.last_over = run
        try:
            self._catalogue.save(run)
        except FileError as error:
            _log.error("run %d: %s", run.run, error)
            if failures is not None and str(error) not in failures:
                failures.append(str(error))

    def _take_all(
        self,
        run: Run,
        kind: str,
        outcomes: Mapping[str, ComponentAnswer],
        names: Sequence[str],
        take: Callable[[str, ComponentAnswer], _T],
    ) -> list[_T]:
        """Return what `take` makes of the answers of these components. ComponentError that names all whose answers
        are errors; `kind`: what they are."""
        values, failures = [], []
        for name in names:
            try:
                values.append(take(name, outcomes[name]))
            except ComponentError as error:
                failures.append(str(error))
        if failures:
            many = f"{len(failures)} of {len(names)} {kind} have failed: " if len(failures) > 1 else ""
            text = "; ".join(self._fold(run, failures))
            raise ComponentError(many + text)
        return values

    def _fold(self, run: Run, texts: Iterable[str]) -> list[str]:
        """Return texts about components of a run, where many that say the same become one."""
        known = [*self._peers.lost.values(), *self._peers.components.values()]
        required = [*run.producers, *run.storages]
        return fold_reasons(texts, dict.fromkeys(required, "") | {one.name: one.module for one in known})

    def _judge(self, run: Run, failures: list[str], silent: dict[str, str]) -> RunVerdict:
        verdict = judge(run, failures, silent)
        return verdict._replace(reasons=self._fold(run, verdict.reasons))

    def _warn(self, what: str, warnings: list[str]) -> None:
        for warning in warnings:
            _log.warning("%s: %s", what, warning)


def _listed(kind: str, names: Sequence[str]) -> str:
    """Return the names of components of a kind for the log, or how many they are."""
    return f"{len(names)} {kind}" if len(names) > _MANY_LISTED else f"{kind} {', '.join(names)}"


def _advice(failed: Iterable[ComponentAnswer]) -> str:
    """Return what an Operator can do about components that have failed; "" if all of them have answered."""
    if not any(outcome.silent for outcome in failed):
        return ""
    return "; restart what does not answer, or end it, and prepare_run again: a run goes without what is not there"


class Deliveries:
    """Files that storages have closed, by their heartbeats. The catalogue gets them all."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._seen: dict[str, list[FinishedFile]] = {}  # by storage

    def take(self, component: Component, files: list[FinishedFile]) -> list[Run]:
        """Return the runs that are over, and of which this storage has closed more files than it reported."""
        known = self._seen.get(component.name, [])
        if not files or files == known:
            return []
        while len(self._seen) > MAX_COMPONENTS:
            del self._seen[next(iter(self._seen))]
        self._seen[component.name] = files
        runs: dict[int, Run] = {}
        for file in files:
            if file not in known and (run := self._record(component, file)) is not None:
                runs[run.run] = run
        return list(runs.values())

    def _record(self, component: Component, file: FinishedFile) -> Run | None:
        path = str(Path(str(component.info.get("directory", ""))) / file.file)
        try:
            new = self._catalogue.add_file(component.name, path, file.run, file.bytes, file.sha256, file.condition)
            run = self._catalogue.find(file.run) if new else None
        except FileError as error:
            _log.error("run %d: %s", file.run, error)
            return None
        if run is None or run.phase != ENDED or component.name not in run.storages:
            return None
        report = run.reports.get(component.name)
        reported = {Path(name).name for name in report.files} if report is not None else set()
        return run if may_improve(run, component.name) or Path(path).name not in reported else None


def may_improve(run: Run, storage: str) -> bool:
    """Whether another report of this storage may improve the condition of a run that is over."""
    open_question = run.condition in (RunCondition.INTERRUPTED, RunCondition.INCOMPLETE) or storage not in run.reports
    return run.phase == ENDED and storage in run.storages and open_question
