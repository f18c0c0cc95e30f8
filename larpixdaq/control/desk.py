"""What the core itself answers to Operators: the run's instructions, control, and everything that it can tell."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from larpixdaq import config
from larpixdaq.blocks import RunNumber
from larpixdaq.control.asks import Reply
from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.control.peers import Control, OperatorPeer, Peers
from larpixdaq.control.runs import RunControl
from larpixdaq.errors import RequestError
from larpixdaq.load import Load
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.core")


class _None(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Prepare(msgspec.Struct, forbid_unknown_fields=True):
    comment: Annotated[str, Meta(max_length=10_000)] = ""
    kind: Annotated[str, Meta(max_length=64)] = ""


class _Comment(msgspec.Struct, forbid_unknown_fields=True):
    text: Annotated[str, Meta(min_length=1, max_length=10_000)]


class _Actions(msgspec.Struct, forbid_unknown_fields=True):
    component: str | None = None


class _RunInfo(msgspec.Struct, forbid_unknown_fields=True):
    run: RunNumber | None = None


class Desk:
    """handle() answers through `reply`, at once or later, or raises a LarpixDaqError. Changing actions need control."""

    def __init__(
        self, peers: Peers, control: Control, runs: RunControl, catalogue: Catalogue, *, insecure: bool
    ) -> None:
        self._peers, self._control, self._runs, self._catalogue = peers, control, runs, catalogue
        self._insecure = insecure
        self._started = time.time()
        #: Messages that were refused since the start.
        self.refused = 0
        #: Of the core's own process.
        self.load = Load()
        self._actions: Final[dict[str, tuple[type[Any], Callable[..., Any], bool]]] = {
            "state": (_None, self._state, False),
            "components": (_None, self._components, False),
            "actions": (_Actions, self._list_actions, False),
            "status": (_None, self._status, False),
            "run_info": (_RunInfo, self._run_info, False),
            "take_control": (_None, self._take_control, False),
            "release_control": (_None, self._release_control, False),
            "prepare_run": (_Prepare, self._prepare, True),
            "begin_run": (_None, self._begin, True),
            "end_run": (_None, self._end, True),
            "abort_run": (_None, self._abort, True),
            "comment": (_Comment, self._comment, True),
        }

    def handle(self, operator: OperatorPeer, action: str, params: dict[str, Any], reply: Reply, now: float) -> None:
        if action not in self._actions:
            raise RequestError(f"the core has no action {action!r}; it has {', '.join(sorted(self._actions))}")
        kind, method, changing = self._actions[action]
        try:
            given = msgspec.convert(params, kind)
        except msgspec.ValidationError as error:
            raise RequestError(f"{action}: {error}") from None
        if changing:
            self._control.claim(operator, now)
            _log.info("%s: %s %s", operator.name, action, params or "")
        value = method(operator, given, reply, now)
        if value is not None:
            reply.result(value)

    # Looking.

    def _state(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> str:
        return self._runs.state

    def _components(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> list[dict[str, Any]]:
        return self._peers.describe(now)

    def _list_actions(self, operator: OperatorPeer, given: _Actions, reply: Reply, now: float) -> dict[str, list[str]]:
        there = {"core": sorted(self._actions)}
        there |= {one.name: one.actions for one in self._peers.components.values()}
        if given.component is None:
            return there
        if given.component not in there:
            raise RequestError(f"no component is named {given.component!r}; there are {', '.join(there)}")
        return {given.component: there[given.component]}

    def _status(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> dict[str, Any]:
        run = self._runs.run
        last = self._catalogue.find()
        if last is not None and run is not None and last.run == run.run:
            last = self._catalogue.find(run.run - 1)
        return {
            "state": self._runs.state,
            "busy": self._runs.main.what if self._runs.main is not None else None,
            "run": self._describe(run) if run is not None else None,
            "last_run": self._describe(last) if last is not None else None,
            "components": self._peers.describe(now),
            "operators": sorted(one.name for one in self._peers.operators.values()),
            "control": self._control.describe(now),
            "insecure": self._insecure,
            "load": self.load.shares(),
            "refused_messages": self.refused,
            "version": VERSION,
            "started": self._started,
            "process": config.process_identity(),
            "state_dir": str(self._catalogue.path.parent),
        }

    def _run_info(self, operator: OperatorPeer, given: _RunInfo, reply: Reply, now: float) -> dict[str, Any]:
        current = self._runs.run
        run = current if given.run is None or (current and current.run == given.run) else None
        if run is None:
            run = self._catalogue.find(given.run)
        if run is None:
            which = "no run yet" if given.run is None else f"no run {given.run}"
            raise RequestError(f"run_info: there is {which} in the catalogue")
        info = self._describe(run)
        info["begun_ns"], info["stopped_ns"] = run.begun_ns, run.stopped_ns
        info["connected"] = run.connected
        info["comments"] = self._catalogue.comments(run.run)
        info["file_details"] = self._catalogue.files(run.run)
        if run is current:
            info["live"] = {one.name: one.status for one in self._peers.components.values()}
        return info

    def _describe(self, run: Run) -> dict[str, Any]:
        """A run for people and programs; times in unix seconds, None when it has not come to that."""
        return {
            "run": run.run,
            "kind": run.kind,
            "comment": run.comment,
            "operator": run.operator,
            "phase": run.phase,
            "condition": run.condition,
            "prepared": run.prepared_ns / 1e9,
            "begun": run.begun_ns / 1e9 if run.begun_ns is not None else None,
            "ended": run.ended_ns / 1e9 if run.ended_ns is not None else None,
            "producers": list(run.producers),
            "storages": run.storages,
            "missing": [
                name
                for name in [*run.producers, *run.storages]
                if run is self._runs.run and name not in self._peers.components
            ],
            "rows": run.rows,
            "stored": run.stored,
            "files": run.files,
            "reasons": run.reasons,
        }

    # Control.

    def _take_control(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> dict[str, Any]:
        before = self._control.take(operator)
        if before:
            _log.warning("%s has taken control from %s", operator.name, before)
        return self._control.describe(now) or {}

    def _release_control(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> dict[str, Any]:
        self._control.release(operator)
        return self._control.describe(now) or {}

    # Changing.

    def _prepare(self, operator: OperatorPeer, given: _Prepare, reply: Reply, now: float) -> None:
        self._runs.prepare(given.comment, given.kind, operator.name, reply, now)

    def _begin(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> None:
        self._runs.begin(reply, now)

    def _end(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> None:
        self._runs.end(reply, now)

    def _abort(self, operator: OperatorPeer, given: _None, reply: Reply, now: float) -> None:
        self._runs.abort(operator.name, reply, now)

    def _comment(self, operator: OperatorPeer, given: _Comment, reply: Reply, now: float) -> dict[str, Any]:
        return {"run": self._runs.comment(operator.name, given.text)}
