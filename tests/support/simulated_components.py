"""Producers and storages that behave as real ones do, without sockets: what a model of the run states plays with.

Each does what it is asked when it is told to, remembers which run it is in, and knows what became of its rows, so that
what the core says of a run can be held against the truth.
"""

from pathlib import Path

from run_control_harness import KINDS, ROWS, Team, epoch_end, finished, open_catalogue

from larpixdaq.constants import ENDED, RunCondition
from larpixdaq.control.registry import Registry
from larpixdaq.control.run_control import RunControl
from larpixdaq.protocol.control import Answer, packed

#: What the catalogue must say of a run before anybody hears of it.
BEFORE = {
    "prepare_run": {"PREPARING", "READY", "BEGINNING", "RUN"},
    "begin_run": {"BEGINNING", "RUN"},
    "end_run": {"ENDING", "ENDED", "CANCELLED"},
    "abort_run": {"ENDING", "ENDED"},
    "cancel_run": {"PREPARING", "CANCELLED"},
    "report_run": {"ENDING", "ENDED"},
}


class Refused(Exception):
    """A component was asked for what it cannot do."""


class World(Team):
    def __init__(self, directory):
        super().__init__(Path(directory))
        self.directory = Path(directory)
        self.whole = True
        self.asked = set()  # ids of all requests
        self.begun = {}  # name -> whether its run has begun
        self.epochs = {"board 1": 1, "board 2": 2}
        self.processes = dict.fromkeys(KINDS, 0)  # how often each was started
        self.sources = {}  # (run, producer, epoch) -> "open", "closed", "aborted", "recovered" or "gone"
        self.files = {}  # (storage, run) -> {source: rows}
        self.records = {}  # (storage, run) -> sources whose end it has
        self.parts = {}  # (storage, run) -> names of files
        self.closed = {name: [] for name, kind in KINDS.items() if kind == "storage"}

    # the core's side

    def send(self, name, request, action, params):
        if name in self.peers.components and request not in self.asked:  # else it is only asked again
            self.asked.add(request)
            phases = BEFORE[action] | ({"PREPARING"} if KINDS[name] == "run_data" else set())
            run = self.catalogue.find(params["run"])
            assert run is not None
            assert run.phase in phases, f"{name} is told {action} while the catalogue says {run.phase}"
        return super().send(name, request, action, params)

    def restart_core(self):
        """Another core on the same catalogue. What was asked by the one before is still on its way."""
        self.catalogue.close()
        self.catalogue = open_catalogue(self.directory)
        self.peers = Registry()
        self.runs = RunControl(self.peers, self.catalogue, self)

    def come(self, name):
        """Register, as it is now."""
        seen = [run for storage, run in self.files if storage == name]
        self.register(
            name,
            str(self.processes[name]),
            self.inside.get(name),
            epoch=self.epochs.get(name, 0),
            highest_run=max(seen, default=0),
            begun=self.begun.get(name, False),
        )

    def beat(self, name):
        """A heartbeat of a component that is registered."""
        status = {"finished": self.closed.get(name, [])[-16:]} if KINDS[name] == "storage" else {}
        super().beat(name, self.inside.get(name), self.begun.get(name, False), **status)

    # the components' side

    def begin_process(self, name, ring_is_there):
        """A component's process has died and another takes its place; requests that the first had are gone with it."""
        self.processes[name] += 1
        self.inside[name], self.begun[name] = None, False
        self.waiting = [one for one in self.waiting if one[0] != name]
        if KINDS[name] == "producer":
            for source, how in self.sources.items():
                if source[1] == name and how == "open":
                    self.sources[source] = "recovered" if ring_is_there else "gone"
            self.epochs[name] += 100

    def answer(self, index=0, how="well"):
        """How: "well", "failing", "nonsense" (it does as asked, and its answer is none) or "partly" (a storage that has
        not got all)."""
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
        """What all kinds do about the run they are in."""
        if action == "prepare_run":
            if self.inside.get(name) is not None:
                raise Refused(f"in run {self.inside[name]}")
            self.inside[name], self.begun[name] = run, False
        elif self.inside.get(name) != run:
            raise Refused(f"not in run {run}")
        elif action == "begin_run":
            if self.begun[name]:
                raise Refused("has begun")
            self.begun[name] = True
        else:
            self.inside[name], self.begun[name] = None, False

    def _run_data(self, name, action, params):
        self._enter(name, action, params["run"])
        return {}

    def _producer(self, name, action, params):
        run, epoch = params["run"], self.epochs[name]
        if action == "cancel_run" and self.inside.get(name) != run:
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
        if action == "cancel_run" and self.inside.get(name) != run:
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
        """A storage takes in what producers have of a run, all or (not `whole`) a part of it, and closes a file.

        Of a producer that died with its ring it has what it had.
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
        if name != "disk 2":  # which believes that all is well, whatever it has: it is the core that compares
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

    # the truth

    def check(self, run):
        """What the catalogue says of a run that is over is not better than what is in the files."""
        if run.phase != ENDED or run.condition not in (RunCondition.COMPLETE, RunCondition.SUSPECT):
            return
        sources = [(run.run, name, epoch) for name, epochs in run.producers.items() for epoch in epochs]
        for source in sources:
            assert self.sources[source] not in ("open", "gone"), f"{run.condition}, and nobody knows how {source} ended"
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
        """Whether all that this run's producers made is known and can still be had."""
        return all(
            self.sources[run.run, name, epoch] not in ("open", "gone")
            for name, epochs in run.producers.items()
            for epoch in epochs
        )
