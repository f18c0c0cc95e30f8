"""Run control without sockets: a RunControl, and components that answer when the test says so."""

from fake_core import counts, storage_status

from larpixdaq.constants import RunCondition
from larpixdaq.control.catalogue import Catalogue
from larpixdaq.control.registry import Registry
from larpixdaq.control.run_control import RunControl
from larpixdaq.errors import LarpixDaqError
from larpixdaq.keys.key_store import ANYONE
from larpixdaq.protocol.control import Answer, Heartbeat, Register, packed

KINDS = {
    "board 1": "producer",
    "board 2": "producer",
    "disk 1": "storage",
    "disk 2": "storage",
    "monitor": "run_data",
}
EPOCHS = {"board 1": 1, "board 2": 2}
#: Rows that a producer makes in each run and epoch.
ROWS = 10


def open_catalogue(directory):
    catalogue = Catalogue(directory)
    catalogue._db.execute("PRAGMA synchronous=OFF")  # for speed: tests need no protection from power cuts
    return catalogue


class Team:
    """A core with components, whose requests wait in `waiting` until answer().

    Every request must be about a run that the catalogue knows already.
    """

    def __init__(self, directory):
        self.catalogue = open_catalogue(directory)
        self.peers = Registry()
        self.runs = RunControl(self.peers, self.catalogue, self)
        self.waiting = []  # (name, request, action, params)
        self.sent = []  # (name, action)
        self.ids = 0
        self.now = 1000.0
        self.instance = {}
        self.current_run = {}  # name -> number of the run in which a component is
        self.inherited = {}  # producer -> epochs of predecessors that its end record includes
        self.reports = {}  # (storage, run) -> its answer to report_run

    def new_id(self):
        self.ids += 1
        return str(self.ids)

    def send(self, name, request, action, params):
        if name not in self.peers.components:
            return False
        run = self.catalogue.find(params["run"])
        assert run is not None, "a request names a run that the catalogue does not have"
        self.sent.append((name, action))
        if request not in [waiting[1] for waiting in self.waiting]:
            self.waiting.append((name, request, action, params))
        return True

    def register(self, name, instance="1", run=None, begun=False, **info):
        self.instance[name] = instance
        info = {"layout": 2, "asic": "2", "epoch": EPOCHS.get(name, 0), "free_bytes": 1 << 40, "directory": "/d"} | info
        actions = ["report_run"] if KINDS[name] == "storage" else []
        message = Register(
            name=name, kind=KINDS[name], instance=instance, info=info, run=run, begun=begun, actions=actions
        )
        component = self.peers.register(message, name.encode(), self.now, ANYONE)
        self.runs.registered(component, self.now)
        return component

    def beat(self, name, *position, **status):
        """Deliver a heartbeat with this status. `position`: (run, begun), by default those of the registry."""
        component = self.peers.components[name]
        component.status = storage_status(**status) if component.kind == "storage" else status
        run, begun = position or (component.run, component.begun)
        self.runs.heard(component, Heartbeat(run=run, begun=begun), self.now)

    def lose(self, name):
        self.peers.remove(self.peers.components[name])
        self.runs.lost(name, self.now)

    def value(self, name, action, params):
        if KINDS[name] == "producer":
            epoch = EPOCHS[name]
            if action == "prepare_run":
                return {"epoch": epoch, "layout": 2}
            if action in ("end_run", "abort_run"):
                inherited = [epoch_end(old) for old in self.inherited.get(name, [])]
                return epoch_end(epoch) | {"warning": None, "inherited": inherited}
        if KINDS[name] == "storage":
            if action == "prepare_run":
                return {"file": f"/d/{name}", "free_bytes": 1 << 40}
            if action == "end_run":
                known = [source for source in params["producers"] if source["next"] is not None]
                stored = [[source["name"], source["epoch"], 1, ROWS] for source in known]
                whole = len(known) == len(params["producers"])
                condition = RunCondition.COMPLETE if whole else RunCondition.INTERRUPTED
                report = {"files": [name], "condition": condition, "rows": ROWS * len(stored), "stored": stored}
                self.reports[name, params["run"]] = report
                return report
            if action == "report_run":
                nothing = {"files": [], "condition": RunCondition.INTERRUPTED, "rows": 0, "stored": []}
                return self.reports.get((name, params["run"]), nothing)
        return {}

    def answer(self, index=0, failing=False, **changed):
        name, request, action, params = self.waiting.pop(index)
        component = self.peers.components.get(name)
        if component is None:
            return
        if failing:
            answer = Answer(request=request, kind="error", text="it broke", error="failed")
        else:
            answer = Answer(request=request, kind="result", value=packed(self.value(name, action, params) | changed))
        self.runs.answered(component, answer, self.now)

    def answer_all(self):
        while self.waiting:
            self.answer()

    def advance(self, seconds):
        self.now += seconds
        self.runs.tick(self.now)

    def close(self):
        self.catalogue.close()


def epoch_end(epoch):
    return {"epoch": epoch, "next": 4, "rows": ROWS, "counts": [counts(1, ROWS)]}


def finished(run, file, condition=RunCondition.COMPLETE):
    """Return an entry of a storage's list of finished files."""
    return {"run": run, "file": file, "bytes": 1234, "sha256": "ab" * 32, "condition": condition}


class Reply:
    """Keeps the result or error of a step of the run."""

    def __init__(self):
        self.ends = []

    def progress(self, component, text, done=0, total=0):
        assert not self.ends

    def result(self, value):
        self.ends.append(value)

    def error(self, error):
        assert isinstance(error, LarpixDaqError)
        self.ends.append(error)

    def value(self):
        (value,) = self.ends
        if isinstance(value, Exception):
            raise value
        return value


def ask(team, action):
    """Start a step of the run. Returns its Reply, which has no result yet."""
    reply = Reply()
    if action == "prepare":
        team.runs.prepare("c", "physics", "me", reply, team.now)
    elif action == "abort":
        team.runs.abort("me", reply, team.now)
    else:
        getattr(team.runs, action)(reply, team.now)
    return reply


def do(team, action):
    """Take a step of the run, in which all components answer. Returns its result."""
    reply = ask(team, action)
    team.answer_all()
    return reply.value()


def restart(team):
    """Return another core with the same catalogue, as after a restart."""
    team.close()
    return Team(team.catalogue.path.parent)
