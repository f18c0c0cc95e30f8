"""Simulated producers, storages and monitors without sockets, for the model of the run states.

Each component answers its requests when the model says so, remembers its run, and knows whether its rows are stored. So
the condition that the core gives a run can be compared with the truth.
"""

from pathlib import Path

from run_control_harness import KINDS, ROWS, Team, epoch_end, finished, open_catalogue

from larpixdaq.constants import ENDED, RunCondition
from larpixdaq.control.registry import Registry
from larpixdaq.control.run_control import RunControl
from larpixdaq.protocol.control import Answer, packed

#: Phases that a run may have in the catalogue when a component gets the request.
PHASES = {
    "prepare_run": {"PREPARING", "READY", "BEGINNING", "RUN"},
    "begin_run": {"BEGINNING", "RUN"},
    "end_run": {"ENDING", "ENDED", "CANCELLED"},
    "abort_run": {"ENDING", "ENDED"},
    "cancel_run": {"PREPARING", "CANCELLED"},
    "report_run": {"ENDING", "ENDED"},
    "add_comments": {"PREPARING", "READY", "BEGINNING", "RUN", "ENDING", "ENDED", "CANCELLED"},
}


class Refused(Exception):
    """A component refuses a request."""


class World(Team):
    """A core with simulated components that can die, restart, and lose data."""

    def __init__(self, directory):
        super().__init__(Path(directory))
        self.directory = Path(directory)
        self.whole = True  # whether end_run of a storage stores everything
        self.asked = set()  # ids of all requests
        self.begun = {}  # name -> whether its current run has begun
        self.epochs = {"board 1": 1, "board 2": 2}
        self.processes = dict.fromkeys(KINDS, 0)  # number of restarts
        self.sources = {}  # (run, producer, epoch) -> "open", "closed", "aborted", "recovered" or "gone"
        self.files = {}  # (storage, run) -> {source: rows stored}
        self.records = {}  # (storage, run) -> sources with an end record
        self.parts = {}  # (storage, run) -> names of files
        self.closed = {name: [] for name, kind in KINDS.items() if kind == "storage"}

    # requests and reports of the core

    def send(self, name, request, action, params):
        if name in self.peers.components and request not in self.asked:  # otherwise it is a repetition
            self.asked.add(request)
            phases = PHASES[action] | ({"PREPARING"} if KINDS[name] == "run_data" else set())
            run = self.catalogue.find(params["run"])
            assert run is not None
            assert run.phase in phases, f"{name} gets {action} while the run is {run.phase} in the catalogue"
        return super().send(name, request, action, params)

    def restart_core(self):
        """Start another core with the same catalogue. Requests of the previous core still wait."""
        self.catalogue.close()
        self.catalogue = open_catalogue(self.directory)
        self.peers = Registry()
        self.runs = RunControl(self.peers, self.catalogue, self)

    def register_component(self, name):
        """Register a component with its present run."""
        seen = [run for storage, run in self.files if storage == name]
        self.register(
            name,
            str(self.processes[name]),
            self.current_run.get(name),
            epoch=self.epochs.get(name, 0),
            highest_run=max(seen, default=0),
            begun=self.begun.get(name, False),
        )

    def beat(self, name):
        """Deliver a heartbeat of a registered component."""
        status = {"finished": self.closed.get(name, [])[-16:]} if KINDS[name] == "storage" else {}
        super().beat(name, self.current_run.get(name), self.begun.get(name, False), **status)

    # the components

    def restart_process(self, name, ring_is_there):
        """Replace the process of a component; the requests of the dead process are lost."""
        self.processes[name] += 1
        self.current_run[name], self.begun[name] = None, False
        self.waiting = [waiting for waiting in self.waiting if waiting[0] != name]
        if KINDS[name] == "producer":
            for source, how in self.sources.items():
                if source[1] == name and how == "open":
                    self.sources[source] = "recovered" if ring_is_there else "gone"
            self.epochs[name] += 100

    def answer(self, index=0, how="well"):
        """Answer a waiting request. `how`: "well", "failing", "nonsense" (done, but the answer is invalid), or "partly"
        (a storage does not have all rows)."""
        name, request, action, params = self.waiting.pop(index)
        self.whole = how != "partly"
        try:
            if how == "failing":
                raise Refused("it broke")
            value = getattr(self, f"_{KINDS[name]}")(name, action, params)
            answer = Answer(request=request, kind="result", value=packed("nonsense" if how == "nonsense" else value))
        except Refused as error:
            answer = Answer(request=request, kind="error", text=str(error), error="failed")
        if name in self.peers.components:
            self.runs.answered(self.peers.components[name], answer, self.now)

    def _enter(self, name, action, run):
        """Enter, begin or leave a run. All kinds of components do the same."""
        if action == "prepare_run":
            if self.current_run.get(name) is not None:
                raise Refused(f"in run {self.current_run[name]}")
            self.current_run[name], self.begun[name] = run, False
        elif self.current_run.get(name) != run:
            raise Refused(f"not in run {run}")
        elif action == "begin_run":
            if self.begun[name]:
                raise Refused("has begun")
            self.begun[name] = True
        else:
            self.current_run[name], self.begun[name] = None, False

    def _run_data(self, name, action, params):
        self._enter(name, action, params["run"])
        return {}

    def _producer(self, name, action, params):
        run, epoch = params["run"], self.epochs[name]
        if action == "cancel_run" and self.current_run.get(name) != run:
            return {}
        self._enter(name, action, run)
        source = (run, name, epoch)
        if action == "prepare_run":
            self.sources[source] = "open"
            return {"epoch": epoch, "layout": 2}
        if action == "begin_run":
            return {}
        self.sources[source] = "aborted" if action == "abort_run" else "closed"
        inherited = [
            epoch_end(old)
            for (number, producer, old), how in self.sources.items()
            if (number, producer, how) == (run, name, "recovered")
        ]
        return {} if action == "cancel_run" else epoch_end(epoch) | {"warning": None, "inherited": inherited}

    def _storage(self, name, action, params):
        run = params["run"]
        if action == "report_run":
            return self.report(name, run)
        if action == "add_comments":
            # A storage that has left the run, asked by a core that died since, adds them to its sidecars.
            phase = self.catalogue.find(run).phase
            assert phase in ("ENDED", "CANCELLED") or self.processes[name] or (name, run) in self.files, phase
            return {}
        if action == "cancel_run" and self.current_run.get(name) != run:
            return {}
        self._enter(name, action, run)
        if action == "prepare_run":
            self.files.setdefault((name, run), {})
            return {"file": f"/d/{name}", "free_bytes": 1 << 40}
        if action == "end_run":
            self.write(name, run, whole=self.whole)
            return self.report(name, run)
        return {}

    def write(self, name, run, *, whole):
        """Store the rows of a run, all or (not `whole`) half of them, and close a file.

        Of a producer that died with its ring, the storage keeps the rows that it has.
        """
        held = self.files.setdefault((name, run), {})
        records = self.records.setdefault((name, run), set())
        for source, how in self.sources.items():
            if source[0] != run or how == "gone":
                continue
            held[source] = max(held.get(source, 0), ROWS if whole else ROWS // 2)
            if whole and how != "open":
                records.add(source)
        parts = self.parts.setdefault((name, run), [])
        parts.append(f"/d/{name}_{run}_{len(parts):03}.h5")
        self.closed[name].append(finished(run, parts[-1], self.report(name, run)["condition"]))

    def report(self, name, run):
        held, records = self.files.get((name, run), {}), self.records.get((name, run), set())
        condition = RunCondition.COMPLETE
        if name != "disk 2":  # disk 2 always claims COMPLETE, because the core must compare the numbers itself
            if any(self.sources[source] == "recovered" for source in records):
                condition = RunCondition.SUSPECT
            if any(held[source] != ROWS for source in held):
                condition = RunCondition.INCOMPLETE
            if any(source not in records for source in held):
                condition = RunCondition.INTERRUPTED
        return {
            "files": list(self.parts.get((name, run), [])),
            "condition": condition,
            "rows": sum(held.values()),
            "stored": [[producer, epoch, 1, rows] for (_, producer, epoch), rows in held.items()],
            "ends": [[producer, epoch, 4, self.sources[_, producer, epoch], ROWS] for _, producer, epoch in records],
        }

    # the true state

    def check(self, run):
        """The condition of an ended run in the catalogue is not better than its files."""
        if run.phase != ENDED or run.condition not in (RunCondition.COMPLETE, RunCondition.SUSPECT):
            return
        sources = [(run.run, name, epoch) for name, epochs in run.producers.items() for epoch in epochs]
        for source in sources:
            assert self.sources[source] not in ("open", "gone"), f"{run.condition}, but the end of {source} is unknown"
        whole = [
            name
            for name in run.storages
            if all(self.files.get((name, run.run), {}).get(source) == ROWS for source in sources)
        ]
        assert whole, f"run {run.run} is {run.condition}, and no storage has all of it"
        if run.condition == RunCondition.COMPLETE:
            assert all(len(epochs) == 1 for epochs in run.producers.values())
            assert not any(self.sources[source] == "recovered" for source in sources)

    def deliverable(self, run):
        """Return whether all rows of the run's producers are known and can still be delivered."""
        return all(
            self.sources[run.run, name, epoch] not in ("open", "gone")
            for name, epochs in run.producers.items()
            for epoch in epochs
        )
