"""The run states in any order of requests, answers, losses, restarts and delays, against a simple model."""

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
from larpixdaq.control.catalogue import Author
from larpixdaq.errors import ComponentError, LarpixDaqError, RequestError, StateError

NAMES = st.sampled_from(list(KINDS))
STORAGES = st.sampled_from([name for name, kind in KINDS.items() if kind == "storage"])
ALLOWED = {"prepare": ("STOP",), "begin": ("READY",), "end": ("READY", "RUN")}
#: Seconds within which end_run and abort_run reach STOP; twice the longest step of time is added.
LIMITS = {"end": 30, "abort": 41}
LONGEST_STEP = 5.5


class Model(RuleBasedStateMachine):
    """`state`: the expected state of the core; `open_step`: the unfinished step as (action, reply, begin)."""

    def __init__(self):
        super().__init__()
        # In memory if possible, because the catalogue waits for its disk at each of thousands of steps.
        self.directory = tempfile.mkdtemp(dir=DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else None)
        self.world = World(self.directory)
        for name in KINDS:
            self.world.register_component(name)
        self.state = "STOP"
        self.open_step = None
        self.numbers = []
        self.alive = set(KINDS)
        self.candidate = None  # (run, phase) of the unfinished run of a dead core
        self.resumed_end_since = None  # when a restarted core continued end_run

    # What the model knows.

    def follow_endings(self):
        """Update the expected state by the steps that have ended."""
        if self.open_step is not None and self.open_step[1].ends:
            action, reply, _ = self.open_step
            (value,) = reply.ends
            self.open_step = None
            failed = isinstance(value, Exception)
            if action == "prepare":
                self.state = "STOP" if failed else "READY"
            elif action == "begin":
                self.state = "STOP" if failed else "RUN"
            else:
                assert not failed, f"{action} did not reach STOP: {value}"
                self.state = "STOP"
                self.resumed_end_since = None
        if self.resumed_end_since is not None and self.world.runs.state == "STOP":
            self.resumed_end_since, self.state = None, "STOP"

    def placed(self, name):
        """A component has reported its run, which may bring back the unfinished run of the catalogue."""
        if self.candidate is not None and self.world.current_run.get(name) == self.candidate[0]:
            phase = self.candidate[1]
            self.candidate = None
            self.state = "READY" if phase == "READY" else "RUN"
            if phase == "ENDING":
                self.resumed_end_since = self.world.now
        if self.candidate is not None:
            run = self.world.catalogue.find(self.candidate[0])
            if {*run.producers, *run.storages} <= self.world.peers.components.keys():  # all of them outside of it
                self.candidate = None

    @initialize(steps=st.sampled_from([2, 2, 1, 0]))
    def begin(self, steps):
        for _ in range(steps):
            self.go_on()

    # What Operators do.

    @rule(action=st.sampled_from(["prepare", "begin", "end", "abort"]))
    def ask(self, action):
        self.follow_endings()
        before = self.open_step
        refusal = None
        try:
            reply = ask(self.world, action)
        except LarpixDaqError as error:
            refusal = error
        if refusal is not None:
            assert action != "abort"
            busy = before is not None or self.resumed_end_since is not None
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
            number = self.world.catalogue.highest
            assert number > max(self.numbers, default=0)
            self.numbers.append(number)
            self.candidate = None
        if action in ("end", "abort"):
            self.resumed_end_since = None
        self.open_step = (action, reply, self.world.now)

    @rule(number=st.none() | st.integers(1, 5))
    def comment(self, number):
        """It changes no state, and comes to all storages of its run in the end."""
        try:
            run = self.world.runs.comment(number, "beam is on", Author("", "me", "owner"))
        except RequestError:
            assert number not in self.numbers
            assert number is not None or not self.numbers
        else:
            assert run == (number or self.numbers[-1])

    @rule(how=st.sampled_from(["well", "well", "failing", "nonsense", "partly"]))
    def go_on(self, how="well"):
        """The next step of a run, with all answers at once: random requests would rarely bring a run to its end."""
        self.follow_endings()
        if self.open_step is None and self.resumed_end_since is None:
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
        """A component is silent for a second, but continues its work."""
        if name in self.alive:
            self.alive.discard(name)
            if name in self.world.peers.components:
                component = self.world.peers.components[name]
                self.world.lose(name)
                component.heard = self.world.now - 1
                self.world.peers.lost[name] = component

    @rule(name=NAMES, process=st.sampled_from(["same", "new", "new, without its ring"]))
    def come_back(self, name, process):
        if name in self.alive:
            return
        if process != "same":
            self.world.restart_process(name, process == "new")
        self.alive.add(name)
        self.world.register_component(name)
        self.placed(name)

    @rule(name=NAMES)
    def beat(self, name):
        if name in self.world.peers.components:
            asked = self.world.runs._procedures.awaits(self.world.peers.components[name])
            self.world.beat(name)
            if not asked:
                self.placed(name)

    @rule(name=STORAGES, data=st.data(), whole=st.booleans())
    def deliver(self, name, data, whole):
        """Blocks reach a storage, perhaps long after the end of their run."""
        runs = sorted({run for storage, run in self.world.files if storage == name})
        if runs:
            self.world.write(name, data.draw(st.sampled_from(runs)), whole=whole)

    # What happens to the core.

    @rule()
    def the_core_dies(self):
        self.follow_endings()
        self.world.restart_core()
        self.open_step = self.resumed_end_since = None
        self.state = "STOP"
        last = self.world.catalogue.find()
        self.candidate = None if last is None or last.is_over else (last.run, last.phase)

    @rule()
    def components_find_the_core(self):
        for name in sorted(self.alive):
            if name not in self.world.peers.components:
                self.world.register_component(name)
                self.placed(name)

    @rule(seconds=st.sampled_from([0.1, 1.1, LONGEST_STEP]))
    def wait(self, seconds):
        self.world.advance(seconds)

    # What must hold.

    @invariant()
    def the_state_is_that_of_the_model(self):
        self.follow_endings()
        if self.open_step is None and self.resumed_end_since is None:
            assert self.world.runs.state == self.state
            assert (self.world.runs.number is None) == (self.state == "STOP")

    @invariant()
    def stop_is_reached_in_time(self):
        if self.open_step is not None and self.open_step[0] in LIMITS:
            assert self.world.now - self.open_step[2] <= LIMITS[self.open_step[0]] + 2 * LONGEST_STEP
        if self.resumed_end_since is not None:
            assert self.world.now - self.resumed_end_since <= 2 + LIMITS["end"] + 2 * LONGEST_STEP

    @invariant()
    def no_run_is_called_better_than_it_is(self):
        for number in self.numbers:
            self.world.check(self.world.catalogue.find(number))

    def teardown(self):
        """In the end all components come back and deliver all blocks, and the next run can be prepared."""
        try:
            for name in sorted(set(KINDS) - self.alive):
                self.come_back(name, "same")
            self.components_find_the_core()
            for _ in range(12):
                self.let_all_answer()
            if self.world.runs.state != "STOP" and self.resumed_end_since is None:
                self.ask("end")
            for _ in range(12):
                self.let_all_answer()
            assert self.world.runs.state == "STOP"
            assert self.open_step is None
            for name in (name for name, kind in KINDS.items() if kind == "storage"):
                assert not self.world.catalogue.undelivered(name)
            # A component that has refused to end is still in its run, and the core must know it for abort_run below.
            known = {name: one.run for name, one in self.world.peers.components.items()}
            assert known == {name: self.world.current_run.get(name) for name in KINDS}
            for name in (name for name, kind in KINDS.items() if kind == "storage"):
                for run in sorted({run for storage, run in self.world.files if storage == name}):
                    self.world.write(name, run, whole=True)
                    self.let_all_answer()
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

    def let_all_answer(self):
        self.world.answer_all()
        self.world.advance(LONGEST_STEP)
        for name in sorted(self.world.peers.components):
            self.beat(name)
        self.world.answer_all()
        self.follow_endings()

    def deliveries_have_counted(self):
        for number in self.numbers:
            run = self.world.catalogue.find(number)
            if self.candidate is not None and number == self.candidate[0]:
                continue  # no component of the run has come back: the next prepare_run gives it up
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
