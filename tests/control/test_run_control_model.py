"""The run states in any order of requests, answers, losses, restarts and delays, against a simple model of them."""

import shutil
import tempfile

from example_counts import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from run_control_harness import KINDS, ask
from simulated_components import World

from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY
from larpixdaq.constants import RunCondition
from larpixdaq.errors import ComponentError, LarpixDaqError, StateError

NAMES = st.sampled_from(list(KINDS))
STORAGES = st.sampled_from([name for name, kind in KINDS.items() if kind == "storage"])
ALLOWED = {"prepare": ("STOP",), "begin": ("READY",), "end": ("READY", "RUN")}
#: end_run and abort_run reach STOP within so many seconds; twice the longest step of time comes on top.
LIMITS = {"end": 30, "abort": 41}
LONGEST = 5.5


class Model(RuleBasedStateMachine):
    """`state` is what the core must say; `going_on` the step that is not done yet: (action, reply, since when)."""

    def __init__(self):
        super().__init__()
        # In memory where that is possible: the catalogue waits for its disk at each of thousands of steps.
        self.directory = tempfile.mkdtemp(dir=DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else None)
        self.world = World(self.directory)
        for name in KINDS:
            self.world.come(name)
        self.state = "STOP"
        self.going_on = None
        self.numbers = []
        self.alive = set(KINDS)
        self.candidate = None  # (run, phase) that a core which died left behind
        self.ends_by_itself = None  # since when an adopted run is on its way to STOP

    # What the model knows.

    def look(self):
        """Follow what has ended."""
        if self.going_on is not None and self.going_on[1].ends:
            action, reply, _ = self.going_on
            (value,) = reply.ends
            self.going_on = None
            failed = isinstance(value, Exception)
            if action == "prepare":
                self.state = "STOP" if failed else "READY"
            elif action == "begin":
                self.state = "STOP" if failed else "RUN"
            else:
                assert not failed, f"{action} did not reach STOP: {value}"
                self.state = "STOP"
                self.ends_by_itself = None
        if self.ends_by_itself is not None and self.world.runs.state == "STOP":
            self.ends_by_itself, self.state = None, "STOP"

    def placed(self, name):
        """A component has said which run it is in: it may bring back the one that the last core left."""
        if self.candidate is not None and self.world.inside.get(name) == self.candidate[0]:
            phase = self.candidate[1]
            self.candidate = None
            self.state = "READY" if phase == "READY" else "RUN"
            if phase == "ENDING":
                self.ends_by_itself = self.world.now

    @initialize(steps=st.sampled_from([2, 2, 1, 0]))
    def begin(self, steps):
        for _ in range(steps):
            self.go_on()

    # What Operators do.

    @rule(action=st.sampled_from(["prepare", "begin", "end", "abort"]))
    def ask(self, action):
        self.look()
        before = self.going_on
        refusal = None
        try:
            reply = ask(self.world, action)
        except LarpixDaqError as error:
            refusal = error
        if refusal is not None:
            assert action != "abort"
            busy = before is not None or self.ends_by_itself is not None
            if self.state in ALLOWED[action] and not busy:
                assert action == "prepare"
                assert isinstance(refusal, ComponentError)
            return
        if action != "abort":
            assert self.state in ALLOWED[action]
        if before is not None:
            assert action == "abort"
            assert isinstance(before[1].ends[0], StateError)
        if action == "prepare":
            number = self.world.catalogue.highest()
            assert number > max(self.numbers, default=0)
            self.numbers.append(number)
            self.candidate = None
        if action in ("end", "abort"):
            self.ends_by_itself = None
        self.going_on = (action, reply, self.world.now)

    @rule(how=st.sampled_from(["well", "well", "failing", "nonsense", "partly"]))
    def go_on(self, how="well"):
        """The next step of a run, and all answer at once: else runs would hardly ever come to their end."""
        self.look()
        if self.going_on is None and self.ends_by_itself is None:
            self.ask({"STOP": "prepare", "READY": "begin", "RUN": "end"}[self.state])
        self.all_answer(how)

    @rule(name=NAMES, process=st.sampled_from(["new", "new, without its ring"]))
    def die_and_come_back(self, name, process):
        self.lose(name)
        self.come_back(name, process)

    # What components do.

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data(), how=st.sampled_from(["well"] * 4 + ["failing", "nonsense", "partly"]))
    def answer(self, data, how):
        self.world.answer(data.draw(st.integers(0, len(self.world.waiting) - 1)), how)

    @rule(how=st.sampled_from(["well", "well", "failing", "nonsense", "partly"]))
    def all_answer(self, how):
        while self.world.waiting:
            self.world.answer(0, how)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def a_request_is_lost(self, data):
        self.world.waiting.pop(data.draw(st.integers(0, len(self.world.waiting) - 1)))

    @rule(name=NAMES)
    def lose(self, name):
        """Nothing is heard of it for a second; it goes on with what it does."""
        if name in self.alive:
            self.alive.discard(name)
            if name in self.world.peers.components:
                component = self.world.peers.components[name]
                self.world.lose(name)
                self.world.peers.lost[name] = (self.world.now - 1, component)

    @rule(name=NAMES, process=st.sampled_from(["same", "new", "new, without its ring"]))
    def come_back(self, name, process):
        if name in self.alive:
            return
        if process != "same":
            self.world.begin_process(name, process == "new")
        self.alive.add(name)
        self.world.come(name)
        self.placed(name)

    @rule(name=NAMES)
    def beat(self, name):
        if name in self.world.peers.components:
            asked = self.world.runs._procedures.awaits(name)
            self.world.beat(name)
            if not asked:
                self.placed(name)

    @rule(name=STORAGES, data=st.data(), whole=st.booleans())
    def deliver(self, name, data, whole):
        """Blocks reach a storage whose run may be over long since."""
        runs = sorted({run for storage, run in self.world.files if storage == name})
        if runs:
            self.world.write(name, data.draw(st.sampled_from(runs)), whole=whole)

    # What happens to the core.

    @rule()
    def the_core_dies(self):
        self.look()
        self.world.restart_core()
        self.going_on = self.ends_by_itself = None
        self.state = "STOP"
        last = self.world.catalogue.find()
        self.candidate = None if last is None or last.is_over else (last.run, last.phase)

    @rule()
    def components_find_the_core(self):
        for name in sorted(self.alive):
            if name not in self.world.peers.components:
                self.world.come(name)
                self.placed(name)

    @rule(seconds=st.sampled_from([0.1, 1.1, LONGEST]))
    def wait(self, seconds):
        self.world.advance(seconds)

    # What must hold.

    @invariant()
    def the_state_is_that_of_the_model(self):
        self.look()
        if self.going_on is None and self.ends_by_itself is None:
            assert self.world.runs.state == self.state
            assert (self.world.runs.number is None) == (self.state == "STOP")

    @invariant()
    def stop_is_reached_in_time(self):
        if self.going_on is not None and self.going_on[0] in LIMITS:
            assert self.world.now - self.going_on[2] <= LIMITS[self.going_on[0]] + 2 * LONGEST
        if self.ends_by_itself is not None:
            assert self.world.now - self.ends_by_itself <= 2 + LIMITS["end"] + 2 * LONGEST

    @invariant()
    def no_run_is_called_better_than_it_is(self):
        for number in self.numbers:
            self.world.check(self.world.catalogue.find(number))

    def teardown(self):
        """Whatever has happened: all come back, deliver what they have, and the next run can be taken."""
        try:
            for name in sorted(set(KINDS) - self.alive):
                self.come_back(name, "same")
            self.components_find_the_core()
            for _ in range(12):
                self.settle()
            if self.world.runs.state != "STOP" and self.ends_by_itself is None:
                self.ask("end")
            for _ in range(12):
                self.settle()
            assert self.world.runs.state == "STOP"
            assert self.going_on is None
            # Who has refused to end is still in its run. The core must know it: abort_run, below, ends it then.
            known = {name: one.run for name, one in self.world.peers.components.items()}
            assert known == {name: self.world.inside.get(name) for name in KINDS}
            for name in (name for name, kind in KINDS.items() if kind == "storage"):
                for run in sorted({run for storage, run in self.world.files if storage == name}):
                    self.world.write(name, run, whole=True)
                    self.settle()
            self.deliveries_have_counted()
            reply = ask(self.world, "abort")
            self.world.answer_all()
            assert reply.ends
            reply = ask(self.world, "prepare")
            self.world.answer_all()
            assert reply.value()["run"] > max(self.numbers, default=0)
        finally:
            self.world.close()
            shutil.rmtree(self.directory)

    def settle(self):
        self.world.answer_all()
        self.world.advance(LONGEST)
        for name in sorted(self.world.peers.components):
            self.beat(name)
        self.world.answer_all()
        self.look()

    def deliveries_have_counted(self):
        for number in self.numbers:
            run = self.world.catalogue.find(number)
            if self.candidate is not None and number == self.candidate[0]:
                continue  # nobody has come back that was in it: the next prepare_run will give it up
            assert run.is_over
            self.world.check(run)
            cut = run.condition in (RunCondition.ABORTED, RunCondition.CANCELLED)
            if not cut and self.world.deliverable(run) and run.producers:
                assert run.condition in (RunCondition.COMPLETE, RunCondition.SUSPECT), (run.condition, run.reasons)
            for name in run.storages:
                known = {file["path"] for file in self.world.catalogue.files(number) if file["storage"] == name}
                assert set(self.world.parts.get((name, number), [])[-1:]) <= known


Model.TestCase.settings = settings(max_examples=examples(80), stateful_step_count=50)
TestModel = Model.TestCase
