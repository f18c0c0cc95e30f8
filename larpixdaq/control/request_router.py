"""Requests of Operators: the actions of the core itself, and the way of other requests to a component and back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from larpixdaq import config
from larpixdaq.constants import LOG_LEVELS, PRODUCER, QUERIES, RUN_ACTIONS, RUN_DATA, Name
from larpixdaq.control.alarms import Alarms
from larpixdaq.control.attachments import Attachments, Piece
from larpixdaq.control.audit import Audit, parameters
from larpixdaq.control.catalogue import MAX_COMMENT, MAX_KIND, MAX_SHIFTER, AlarmRow, Author, Catalogue, Run
from larpixdaq.control.log_shipping import LimitedLog, present_level, set_level
from larpixdaq.control.registry import Component, Control, OperatorPeer, Peer, Registry
from larpixdaq.control.run_control import RunControl
from larpixdaq.control.scatter_gather import ReplyRoute, Team
from larpixdaq.errors import (
    ComponentError,
    ControlHeld,
    LarpixDaqError,
    NotAllowed,
    RequestError,
    StateError,
    UnknownAction,
)
from larpixdaq.keys.credentials import make_token
from larpixdaq.keys.key_store import MAX_OPEN, KeyStore, Role
from larpixdaq.keys.peer_limits import PeerLimits, request_rate
from larpixdaq.protocol.control import ActionRequest, Answer, FromCore, packed
from larpixdaq.protocol.stream import RunNumber
from larpixdaq.runtime.timing import Load
from larpixdaq.runtime.units import LEVEL_NAMES, call_text
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.core")
#: Actions that an observer's key does not allow, beside those that need control.
_CONTROL_ACTIONS: Final = frozenset({"take_control", "release_control", "set_log_level"})
#: Actions that an observer's key does not allow, that need no control, and that go into the audit.
_NOTED_ACTIONS: Final = frozenset({"acknowledge_alarm"})
#: Maximum number of rows of the history of alarms in an answer.
_MAX_ALARM_ROWS: Final = 10_000
#: Actions for the core's own user alone.
_KEY_ACTIONS: Final = frozenset({"keys", "invite", "revoke", "rotate"})
#: Actions of the e-log and on snapshots: they need no control, because they change nothing that is taken.
_LOG_ACTIONS: Final = frozenset({"attach", "comment", "set_shifter", "save_snapshot", "remove_snapshot"})
#: Maximum number of unanswered requests of one Operator.
MAX_UNANSWERED: Final = 1000
#: Name of a snapshot: without / and .json, so that it is not taken for the path of a file.
SnapshotName = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^(?!.*\.json\Z)[^\x00-\x1f\x7f/]+\Z")]
#: Names of the kinds of components in errors.
_KIND_NAMES: Final = {PRODUCER: "producer", RUN_DATA: "online monitor"}


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Prepare(msgspec.Struct, forbid_unknown_fields=True):
    comment: str = ""
    kind: str = ""
    by: str | None = None


class _Comment(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    run: RunNumber | None = None
    by: str | None = None


class _Shifter(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Snapshot(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _SaveSnapshot(msgspec.Struct, forbid_unknown_fields=True):
    name: SnapshotName
    asic: Annotated[str, Meta(max_length=16)]
    chips: Annotated[int, Meta(ge=1)]
    data: bytes
    comment: Annotated[str, Meta(max_length=MAX_COMMENT)] = ""


class _Actions(msgspec.Struct, forbid_unknown_fields=True):
    component: str | None = None


class _RunInfo(msgspec.Struct, forbid_unknown_fields=True):
    run: RunNumber | None = None


class _LogLevel(msgspec.Struct, forbid_unknown_fields=True):
    level: str
    component: str | None = None


class _Invite(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    role: Role
    expires: Annotated[float, Meta(gt=0, le=MAX_OPEN)] = 600.0
    address: Annotated[str, Meta(max_length=256)] = ""


class _Revoke(msgspec.Struct, forbid_unknown_fields=True):
    name: Name


class _Alarms(msgspec.Struct, forbid_unknown_fields=True):
    history: bool = False
    since: Annotated[float, Meta(ge=0, le=1e11)] = 0.0  # unix s
    limit: Annotated[int, Meta(ge=1, le=_MAX_ALARM_ROWS)] = 1000


class _Acknowledge(msgspec.Struct, forbid_unknown_fields=True):
    alarm: Annotated[int, Meta(ge=1)]
    comment: Annotated[str, Meta(max_length=1000)] = ""


class _CoreRequest(NamedTuple):
    """A request to the core itself; `params` is one of the structs above."""

    operator: OperatorPeer
    params: Any
    reply: ReplyRoute
    now: float


def _check_length(action: str, what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise RequestError(f"{action}: {what} has {len(text)} characters, at most {limit}")


def check_may_change(operator: OperatorPeer, action: str) -> None:
    """Raise NotAllowed if the key of an Operator is that of an observer."""
    if operator.member.role == "observer":
        raise NotAllowed(f"{action}: the key of {operator.member} allows to look, not to change")


class CoreActions:
    """The actions of the core itself. Actions that change something need control."""

    def __init__(
        self,
        peers: Registry,
        control: Control,
        runs: RunControl,
        catalogue: Catalogue,
        *,
        address: str,
        keys: KeyStore | None,
        revoked: Callable[[list[str]], None],
        audit: Audit,
        alarms: Alarms,
        limits: PeerLimits,
        refused_connections: Callable[[], int],
        second_core: Callable[[], dict[str, str] | None] = lambda: None,
    ) -> None:
        """`address`: of the core. `keys`: None if no keys are in use. `revoked` is called with revoked public keys.
        `audit`, `limits` and `refused_connections`, the number of connections refused for want of a key, are for
        `status`, as is `second_core`: what is known of a core on standby, empty if there is none; None: not known.
        """
        self._address, self._keys, self._revoked = address, keys, revoked
        self._audit, self._limits, self._refused_connections = audit, limits, refused_connections
        self._alarms, self._second_core = alarms, second_core
        self._peers, self._control, self._runs, self._catalogue = peers, control, runs, catalogue
        self._attachments = Attachments(catalogue)
        self._log = LimitedLog(_log)
        self._started = time.time()
        #: Number of messages refused since the start.
        self.refused = 0
        self.load = Load()
        #: Parameters, handler, and whether the action needs control. A handler that returns None uses `reply`.
        self._actions: Final[dict[str, tuple[type[Any], Callable[[_CoreRequest], Any], bool]]] = {
            "state": (_Empty, lambda request: runs.state, False),
            "components": (_Empty, lambda request: peers.describe(request.now), False),
            "actions": (_Actions, self._list_actions, False),
            "status": (_Empty, self._status, False),
            "run_info": (_RunInfo, self._run_info, False),
            "alarms": (_Alarms, self._list_alarms, False),
            "acknowledge_alarm": (_Acknowledge, self._acknowledge, False),
            "keys": (_Empty, self._list_keys, False),
            "invite": (_Invite, self._invite, False),
            "revoke": (_Revoke, self._revoke, False),
            "rotate": (_Empty, self._rotate, False),
            "set_log_level": (_LogLevel, self._set_log_level, False),
            "take_control": (_Empty, self._take_control, False),
            "release_control": (_Empty, self._release_control, False),
            "prepare_run": (_Prepare, self._prepare, True),
            "begin_run": (_Empty, lambda request: runs.begin(request.reply, request.now, request.operator.name), True),
            "end_run": (_Empty, lambda request: runs.end(request.reply, request.now, request.operator.name), True),
            "abort_run": (_Empty, lambda request: runs.abort(request.operator.name, request.reply, request.now), True),
            "comment": (_Comment, self._comment, False),
            "attach": (Piece, self._attach, False),
            "set_shifter": (_Shifter, self._set_shifter, False),
            "save_snapshot": (_SaveSnapshot, self._save_snapshot, False),
            "snapshots": (_Empty, lambda request: catalogue.snapshots(), False),
            "snapshot": (_Snapshot, lambda request: {"data": catalogue.snapshot(request.params.name)}, False),
            "remove_snapshot": (_Snapshot, self._remove_snapshot, False),
        }

    def handle(
        self, operator: OperatorPeer, action: str, params: dict[str, Any], reply: _OperatorReply, now: float
    ) -> None:
        """Do an action of the core and answer through `reply`, at once or later. Raises a LarpixDaqError if refused."""
        if action not in self._actions:
            raise RequestError(f"the core has no action {action!r}; it has {', '.join(sorted(self._actions))}")
        kind, handler, changing = self._actions[action]
        try:
            request_params = msgspec.convert(params, kind)
        except msgspec.ValidationError as error:
            raise RequestError(f"{action}: {error}") from None
        if changing or action in _CONTROL_ACTIONS | _NOTED_ACTIONS | _LOG_ACTIONS:
            check_may_change(operator, action)
        if action in _KEY_ACTIONS and operator.member.role != "owner":
            raise NotAllowed(f"{action}: keys are for the core's own user, on its host; this is {operator.member}")
        if changing:
            self._control.claim(operator, now)
            lines = f"requests of {operator.name} to the core"
            self._log(lines, logging.INFO, "%s: %s", operator.name, call_text(action, params))
        if changing or action in _NOTED_ACTIONS or action in ("invite", "revoke", "rotate", "set_log_level"):
            reply.accepted(action, params)
        elif action in _LOG_ACTIONS and not (isinstance(request_params, Piece) and not request_params.is_last):
            reply.accepted(action, {name: value for name, value in params.items() if name != "data"})
        value = handler(_CoreRequest(operator, request_params, reply, now))
        if value is not None:
            reply.result(value)

    def _key_store(self) -> KeyStore:
        if self._keys is None:
            raise RequestError("the core was started with --insecure: no keys are in use")
        return self._keys

    def _list_keys(self, request: _CoreRequest) -> dict[str, Any]:
        keys = self._key_store()
        uninformed = keys.uninformed()
        return {
            "members": [
                {"name": one.name, "role": one.role, "since": one.since, "informed": one.name not in uninformed}
                for one in keys.members()
            ],
            "invitations": [{"name": one.name, "role": one.role, "expires": one.expires} for one in keys.invitations()],
            "rotates": bool(keys.next_server),
        }

    def _invite(self, request: _CoreRequest) -> dict[str, Any]:
        keys, params = self._key_store(), request.params
        port = config.address(self._address, config.CORE_PORT).rpartition(":")[2]
        where = config.address(params.address, int(port)) if params.address else config.outside_address(self._address)
        pair = keys.invite(params.name, params.role, params.expires)
        _log.warning("%s: invites %s %r", request.operator.name, params.role, params.name)
        return {
            "token": make_token(where, keys.server.public, pair),
            "expires": time.time() + params.expires,
            "only_here": config.is_loopback(where),
        }

    def _revoke(self, request: _CoreRequest) -> dict[str, Any]:
        gone = self._key_store().revoke(request.params.name)
        _log.warning("%s: revokes the key of %r", request.operator.name, request.params.name)
        self._revoked(gone)
        return {}

    def _rotate(self, request: _CoreRequest) -> dict[str, Any]:
        self._key_store().rotate()
        _log.warning("%s: new keys for the core and its user, from its next start on", request.operator.name)
        return self._list_keys(request)

    def _list_actions(self, request: _CoreRequest) -> dict[str, list[str]]:
        component = request.params.component
        actions = {"core": sorted(self._actions)}
        actions |= {peer.name: peer.actions for peer in self._peers.components.values()}
        if component is None:
            return actions
        if component not in actions:
            raise RequestError(f"no component is named {component!r}; there are {', '.join(actions)}")
        return {component: actions[component]}

    def _status(self, request: _CoreRequest) -> dict[str, Any]:
        run = self._runs.run
        last = self._catalogue.find()
        if last is not None and run is not None and last.run == run.run:
            last = self._catalogue.find(run.run - 1)
        return {
            "state": self._runs.state,
            "busy": self._runs.busy,
            "run": self._describe(run) if run is not None else None,
            "last_run": self._describe(last) if last is not None else None,
            "components": self._peers.describe(request.now),
            "operators": sorted(peer.name for peer in self._peers.operators.values()),
            "control": self._control.describe(request.now),
            "shifter": self._catalogue.shifter(),
            "insecure": self._keys is None,
            "log_level": present_level(),
            "load": self.load.shares(),
            "refused_messages": self.refused,
            "limits": [msgspec.to_builtins(limit) for limit in self._limits.report()],
            "audit": self._audit.status(),
            "alarms": self._alarms.open(),
            "alarm_state": self._alarms.status(),
            "refused_connections": self._refused_connections(),
            "version": VERSION,
            "started": self._started,
            "process": config.process_identity(),
            "state_dir": str(self._catalogue.path.parent),
            "second_core": self._second_core(),
        }

    def _set_log_level(self, request: _CoreRequest) -> dict[str, Any]:
        level, name = request.params.level.upper(), request.params.component
        if level not in LOG_LEVELS:
            raise RequestError(f"set_log_level: level {request.params.level!r:.100}: expected {LEVEL_NAMES}")
        living = self._peers.components
        if name is not None and name != "core" and name not in living:
            raise ComponentError(f"no component is named {name!r}; there are core, {', '.join(living)}")
        names = ["core", *living] if name is None else [name]
        text, words = "%s: log level %s of %s", (request.operator.name, level, "all" if name is None else name)
        if said := _log.isEnabledFor(logging.WARNING):
            _log.warning(text, *words)
        for one in names:
            if one == "core":
                set_level(level)
            else:
                living[one].wanted_log_level = level
        if not said:
            _log.warning(text, *words)
        return {"levels": dict.fromkeys(names, level)}

    def _run_info(self, request: _CoreRequest) -> dict[str, Any]:
        run = self._runs.find(request.params.run, "run_info")
        info = self._describe(run)
        info["begun_ns"], info["stopped_ns"] = run.begun_ns, run.stopped_ns
        info["connected"] = run.connected
        info["comments"] = self._catalogue.comments(run.run)
        info["attachments"] = self._catalogue.attachments(run.run)
        info["file_details"] = self._catalogue.files(run.run)
        if run is self._runs.run:
            info["live"] = {peer.name: peer.status for peer in self._peers.components.values()}
        return info

    def _describe(self, run: Run) -> dict[str, Any]:
        """Describe a run for people and programs; times in unix seconds, None before they are known."""
        return {
            "run": run.run,
            "kind": run.kind,
            "comment": run.comment,
            "operator": run.operator,
            "shifter": run.shifter,
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

    def _list_alarms(self, request: _CoreRequest) -> dict[str, Any] | None:
        if not request.params.history:
            return {"open": self._alarms.open()}

        def reply(found: list[AlarmRow] | OSError) -> None:
            if isinstance(found, OSError):
                request.reply.error(RequestError(f"alarms: {found}"))
            else:
                rows = [msgspec.structs.asdict(row) for row in found]
                request.reply.result({"open": self._alarms.open(), "history": rows})

        self._alarms.history(request.params.since, request.params.limit, reply)
        return None

    def _acknowledge(self, request: _CoreRequest) -> dict[str, Any]:
        return self._alarms.acknowledge(request.params.alarm, request.operator.name, request.params.comment)

    def _take_control(self, request: _CoreRequest) -> dict[str, Any]:
        previous = self._control.take(request.operator)
        if previous:
            _log.warning("%s has taken control from %s", request.operator.name, previous)
        return self._control.describe(request.now) or {}

    def _release_control(self, request: _CoreRequest) -> dict[str, Any]:
        self._control.release(request.operator)
        return self._control.describe(request.now) or {}

    def _prepare(self, request: _CoreRequest) -> None:
        params = request.params
        _check_length("prepare_run", "the comment", params.comment, MAX_COMMENT)
        _check_length("prepare_run", "the kind", params.kind, MAX_KIND)
        shifter = self._author("prepare_run", request, params.by).shifter
        self._runs.prepare(params.comment, params.kind, request.operator.name, request.reply, request.now, shifter)

    def _comment(self, request: _CoreRequest) -> dict[str, Any]:
        params = request.params
        if not params.text.strip():
            raise RequestError("comment: expected a text, found nothing")
        _check_length("comment", "the text", params.text, MAX_COMMENT)
        return {"run": self._runs.comment(params.run, params.text, self._author("comment", request, params.by))}

    def _attach(self, request: _CoreRequest) -> dict[str, Any]:
        piece: Piece = request.params
        run = self._runs.find(piece.run, "attach").run
        return self._attachments.take(request.operator.session, run, piece, self._author("attach", request, piece.by))

    def _set_shifter(self, request: _CoreRequest) -> dict[str, Any]:
        self._catalogue.set_shifter(self._author("set_shifter", request, request.params.name))
        return self._catalogue.shifter()

    def _save_snapshot(self, request: _CoreRequest) -> dict[str, Any]:
        params: _SaveSnapshot = request.params
        author = self._author("save_snapshot", request, None)
        self._catalogue.add_snapshot(params.name, params.asic, params.chips, params.comment, author, params.data)
        return {"name": params.name, "chips": params.chips, "bytes": len(params.data)}

    def _remove_snapshot(self, request: _CoreRequest) -> dict[str, Any]:
        self._catalogue.remove_snapshot(request.params.name)
        return {"name": request.params.name}

    def _author(self, action: str, request: _CoreRequest, name: str | None) -> Author:
        """Return who asks for an entry of the e-log. `name`: the shifter; None: who is on shift."""
        shifter = self._catalogue.shifter()["name"] if name is None else name if name.strip() else ""
        _check_length(action, "the shifter's name", shifter, MAX_SHIFTER)
        return Author(shifter, request.operator.name, request.operator.member.name)


class Transport(Team, Protocol):
    """The way to components and Operators: the core's socket."""

    def send_to(self, peer: Peer, message: FromCore) -> bool: ...


class _Routed(NamedTuple):
    """An Operator's request that a component works on."""

    component: str
    action: str
    operator: OperatorPeer
    request: str


class _Audited(NamedTuple):
    """A request that was accepted, whose outcome goes into the audit."""

    operator: OperatorPeer
    action: str
    component: str


class _OperatorReply:
    """Sends the answers to one request to its Operator."""

    def __init__(self, router: RequestRouter, operator: OperatorPeer, request: str) -> None:
        self._router, self._operator, self._request = router, operator, request

    def accepted(self, action: str, params: dict[str, Any], component: str = "") -> None:
        """Note in the audit that the request is allowed; its outcome follows."""
        self._router.accepted(self._request, _Audited(self._operator, action, component), params)

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None:
        answer = Answer(request=self._request, kind="progress", component=component, text=text, done=done, total=total)
        self._router.answer(self._operator, answer)

    def result(self, value: Any) -> None:
        answer = Answer(request=self._request, kind="result", component="core", value=packed(value))
        self._router.answer(self._operator, answer)

    def error(self, error: LarpixDaqError) -> None:
        code = error.code if isinstance(error, RequestError) else "failed"
        answer = Answer(request=self._request, kind="error", component="core", text=str(error), error=code)
        if isinstance(error, ControlHeld):
            answer.by, answer.since = error.by, error.since
        self._router.answer(self._operator, answer)


class RequestRouter:
    """Passes requests of Operators to the core's own actions or to components, and the answers back.

    Every request gets an ack at once and exactly one result or error. A repeated request is done once.
    """

    def __init__(
        self,
        peers: Registry,
        control: Control,
        actions: CoreActions,
        transport: Transport,
        audit: Audit,
        limits: PeerLimits,
    ) -> None:
        self._peers, self._control, self._actions, self._transport = peers, control, actions, transport
        self._audit, self._limits = audit, limits
        self._rate = request_rate()
        self._log = LimitedLog(_log)
        self._routed: dict[str, _Routed] = {}
        self._audited: dict[tuple[str, str], _Audited] = {}  # by session and request

    def requested(self, operator: OperatorPeer, message: ActionRequest, now: float) -> None:
        if message.again and not operator.recent.knows(message.request):
            text = f"the outcome of {message.action} is no longer known"
            self._transport.send_to(operator, Answer(request=message.request, kind="error", text=text, error="failed"))
            return
        if operator.recent.is_repeat(message.request):
            answer = operator.recent.answer(message.request)
            if answer is not None:
                self._transport.send_to(operator, answer)
            return
        operator.unanswered += 1
        reply = _OperatorReply(self, operator, message.request)
        if limit := self._reached(operator):
            self._limits.reached(str(operator.member) if operator.member.role != "owner" else operator.name, limit)
            self._audit.refuse("too many requests", operator.member, operator.name, message.action)
            reply.error(RequestError(f"{message.action}: too many requests: the limit is {limit}"))
            return
        self.answer(operator, Answer(request=message.request, kind="ack", component="core"))
        try:
            if message.component in ("", "core") and not message.kind:
                self._actions.handle(operator, message.action, message.params, reply, now)
            else:
                self._route(operator, message, reply, now)
        except LarpixDaqError as error:
            if isinstance(error, NotAllowed | ControlHeld):
                kind = "not allowed to a role" if isinstance(error, NotAllowed) else "without control"
                self._audit.refuse(kind, operator.member, operator.name, message.action)
            if (operator.session, message.request) not in self._audited:  # else answer() logs it
                self._log_failure(operator, message.action, getattr(error, "code", ""), error)
            reply.error(error)

    def _reached(self, operator: OperatorPeer) -> str:
        """Return the limit that another request exceeds; "" if none. Operators of one invited key share its rate."""
        who = operator.session if operator.member.role == "owner" else operator.member.public
        if not self._rate.passes(who, 1):
            return f"{self._rate.rate:g} requests a second"
        return f"{MAX_UNANSWERED} unanswered requests" if operator.unanswered > MAX_UNANSWERED else ""

    def accepted(self, request: str, audited: _Audited, params: dict[str, Any]) -> None:
        """Note an accepted request in the audit, and its outcome later."""
        self._audited[audited.operator.session, request] = audited
        text = parameters(params)
        self._audit.note(audited.operator, audited.action, component=audited.component, detail=text, outcome="accepted")

    def _route(self, operator: OperatorPeer, message: ActionRequest, reply: _OperatorReply, now: float) -> None:
        component = self._find_component(message)
        if message.action in RUN_ACTIONS:
            raise RequestError(f"only the core may request {message.action} of a component")
        if message.action not in component.actions:
            known = ", ".join(component.actions) or "none"
            raise UnknownAction(f"{component.name} has no action {message.action!r}; it has {known}")
        if message.action not in QUERIES:
            check_may_change(operator, message.action)
            self._control.claim(operator, now)
            self._log_request(logging.INFO, operator, message, component)
            reply.accepted(message.action, message.params, component.name)
        else:
            self._log_request(logging.DEBUG, operator, message, component)
        request = self._transport.new_id()
        self._routed[request] = _Routed(component.name, message.action, operator, message.request)
        if not self._transport.send(component.name, request, message.action, message.params):
            del self._routed[request]
            raise ComponentError(f"{component.name} does not take {message.action}: its queue is full or it has ended")

    def _find_component(self, message: ActionRequest) -> Component:
        living = self._peers.components
        if message.component:
            if message.component not in living:
                known = ", ".join(living) or "none"
                raise ComponentError(f"no component is named {message.component!r}; there are {known}")
            return living[message.component]
        components = self._peers.of_kind(message.kind)
        if not components:
            what = _KIND_NAMES.get(message.kind, f"component of kind {message.kind!r}")
            known = ", ".join(living) or "none"
            raise ComponentError(f"{message.action}: no {what} is alive (alive components: {known})")
        return components[0]

    def answered(self, component: Component, answer: Answer) -> bool:
        """Pass a component's answer on to the Operator. Returns False if no Operator has made the request."""
        routed = self._routed.get(answer.request)
        if routed is None or routed.component != component.name:
            return False
        self._forward(answer, component.name)
        return True

    def _forward(self, answer: Answer, name: str) -> None:
        routed = self._routed[answer.request]
        if answer.kind in ("result", "error"):
            del self._routed[answer.request]
        answer.request, answer.component = routed.request, name
        self.answer(routed.operator, answer)

    def answer(self, operator: OperatorPeer, answer: Answer) -> None:
        if answer.kind in ("result", "error"):
            operator.recent.keep(answer.request, answer)
            operator.unanswered -= 1
            if (audited := self._audited.pop((operator.session, answer.request), None)) is not None:
                outcome = "done" if answer.kind == "result" else f"failed: {answer.text}"
                if answer.kind == "error" and not audited.component:  # a component logs its own failures
                    self._log_failure(operator, audited.action, answer.error, answer.text)
                self._audit.note(operator, audited.action, component=audited.component, outcome=outcome)
        if operator.session in self._peers.operators:
            self._transport.send_to(operator, answer)

    def _log_request(self, level: int, operator: OperatorPeer, message: ActionRequest, component: Component) -> None:
        kind = "requests" if level == logging.INFO else "queries"
        what = call_text(message.action, message.params)
        self._log(f"{kind} of {operator.name}", level, "%s: %s of %s", operator.name, what, component.name)

    def _log_failure(self, operator: OperatorPeer, action: str, code: str, why: object) -> None:
        """Log that a request was refused or has failed. `code`: of the error."""
        refused = code in (StateError.code, ControlHeld.code, NotAllowed.code, UnknownAction.code)
        level = logging.INFO if refused and code != NotAllowed.code else logging.WARNING
        how = "refused" if refused else "failed"
        self._log(f"{how} requests of {operator.name}", level, "%s: %s %s: %s", operator.name, action, how, why)

    def peer_removed(self, peer: Peer, what: str) -> None:
        """Drop the requests of a removed Operator, except those whose outcome goes into the audit, and fail those to a
        removed component. `what` is the reason."""
        if isinstance(peer, OperatorPeer):
            self._routed = {
                key: routed
                for key, routed in self._routed.items()
                if routed.operator is not peer or (peer.session, routed.request) in self._audited
            }
            return
        for request, routed in list(self._routed.items()):
            if routed.component == peer.name:
                text = f"{peer.name} was {what} while it worked on {routed.action}"
                self._forward(Answer(request=request, kind="error", text=text, error=ComponentError.code), peer.name)
