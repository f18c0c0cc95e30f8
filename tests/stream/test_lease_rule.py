"""The rule of a lease: at no time two holders, whatever is delayed, lost, stopped or out of date."""

import msgspec
import pytest
from example_counts import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from larpixdaq.stream.lease import MARGIN, Entry, LeaseRecord, LeaseRule

SECONDS = 3.0
CANDIDATES = st.integers(0, 2)


class Model(RuleBasedStateMachine):
    """Three candidates with clocks of their own, and a bucket whose answers come late, never, or are out of date."""

    @initialize(rates=st.lists(st.floats(0.9, 1.1), min_size=3, max_size=3))
    def begin(self, rates):
        self.now = 0.0
        self.rates = rates
        self.rules = [LeaseRule(f"holder {number}", SECONDS) for number in range(3)]
        self.states = [None]  # all entries that were the newest one, in order
        self.revision = 0
        self.open = [None, None, None]  # (value, replaced revision) of the write that a candidate waits for
        self.stray = []  # writes whose candidate waits no more, but which may still come to the bucket
        self.terms = {}  # highest term of each, and whose it was

    def clock(self, candidate):
        return 1000.0 * candidate + self.now * self.rates[candidate]

    def apply(self, write):
        """Return the new revision; None if the bucket refuses."""
        value, last = write
        newest = self.states[-1]
        if last != (newest.revision if newest is not None else 0):
            return None
        self.revision += 1
        self.states.append(Entry(value, self.revision))
        return self.revision

    @rule(seconds=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.1, 2.0, 3.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(candidate=CANDIDATES, age=st.sampled_from([0, 0, 0, 1, 3]))
    def read(self, candidate, age):
        if self.open[candidate] is None:
            self.rules[candidate].seen(self.states[max(0, len(self.states) - 1 - age)], self.clock(candidate))

    @rule(candidate=CANDIDATES)
    def attempt(self, candidate):
        if self.open[candidate] is None and not self.rules[candidate].is_over:
            self.open[candidate] = self.rules[candidate].attempt(self.clock(candidate))

    @rule(candidate=CANDIDATES)
    def answer(self, candidate):
        """The write comes to the bucket, and its answer to the candidate."""
        write, self.open[candidate] = self.open[candidate], None
        if write is not None:
            revision = self.apply(write)
            if revision is None:
                self.rules[candidate].must_read()
            else:
                self.rules[candidate].written(revision)

    @rule(candidate=CANDIDATES, late=st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    def turn(self, candidate, late):
        """A candidate does all that it may, as Lease does; the bucket is `late` seconds in writing."""
        if self.open[candidate] is None and self.rules[candidate].reads:
            self.read(candidate, 0)
        self.attempt(candidate)
        self.now += late
        self.answer(candidate)

    @rule(candidate=CANDIDATES)
    def take_at_the_first_moment(self, candidate):
        """A candidate reads, and writes as soon as it may."""
        if self.open[candidate] is not None:
            return
        self.read(candidate, 0)
        for _ in range(400):
            self.attempt(candidate)
            if self.open[candidate] is not None:
                break
            self.now += 0.01
        self.one_holder()
        self.answer(candidate)

    @rule(candidate=CANDIDATES)
    def lose(self, candidate):
        """The candidate waits for an answer no more."""
        write, self.open[candidate] = self.open[candidate], None
        if write is not None:
            self.stray.append(write)
            self.rules[candidate].must_read()

    @precondition(lambda self: self.stray)
    @rule(data=st.data())
    def arrive_late(self, data):
        self.apply(self.stray.pop(data.draw(st.integers(0, len(self.stray) - 1))))

    @rule(candidate=CANDIDATES)
    def release(self, candidate):
        if self.open[candidate] is None and (write := self.rules[candidate].release()) is not None:
            self.apply(write)
            self.rules[candidate] = LeaseRule(f"{candidate} at {self.now:g}, {self.revision}", SECONDS)

    @rule(candidate=CANDIDATES)
    def restart(self, candidate):
        """The process dies, and another one comes in its place."""
        if (write := self.open[candidate]) is not None:
            self.stray.append(write)
        self.open[candidate] = None
        self.rules[candidate] = LeaseRule(f"{candidate} again at {self.now:g}, {self.revision}", SECONDS)

    @invariant()
    def one_holder(self):
        if not hasattr(self, "rules"):
            return
        terms = [self.rules[candidate].term(self.clock(candidate)) for candidate in range(3)]
        held = [(term, candidate) for candidate, term in enumerate(terms) if term is not None]
        assert len(held) <= 1, held
        for term, candidate in held:
            assert self.terms.setdefault(term, self.rules[candidate]) is self.rules[candidate]
            assert term == max(self.terms), "an earlier term has come again"


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=examples(100), stateful_step_count=60, deadline=None)


def _write(rule, now, revision):
    assert rule.attempt(now) is not None
    rule.written(revision)


def test_holder_knows_its_end_before_anybody_else_can_begin():
    holder, other = LeaseRule("a", SECONDS), LeaseRule("b", SECONDS)
    holder.seen(None, 0.0)
    value, last = holder.attempt(0.0)
    assert last == 0
    holder.written(7)
    assert holder.term(0.0) == 7
    other.seen(Entry(value, 7), 0.0)  # the earliest sight
    assert holder.term(SECONDS - MARGIN - 0.01) == 7
    assert holder.term(SECONDS - MARGIN) is None
    assert other.attempt(SECONDS - 0.01) is None
    assert other.attempt(SECONDS)[1] == 7


def test_holder_that_writes_again_before_anybody_else_continues_its_term():
    rule = LeaseRule("a", SECONDS)
    rule.seen(None, 0.0)
    _write(rule, 0.0, 7)
    assert rule.term(100.0) is None
    assert rule.is_own
    _write(rule, 100.0, 8)
    assert rule.term(100.0) == 7


def test_lost_answer_counts_from_its_sending():
    rule = LeaseRule("a", SECONDS)
    rule.seen(None, 0.0)
    value, _ = rule.attempt(0.0)
    rule.must_read()
    assert rule.attempt(0.5) is None
    rule.seen(Entry(value, 3), 1.5)
    assert rule.term(1.5) == 3
    assert rule.term(SECONDS - MARGIN) is None


def test_released_lease_is_taken_at_once():
    holder, other = LeaseRule("a", SECONDS), LeaseRule("b", SECONDS)
    holder.seen(None, 0.0)
    _write(holder, 0.0, 1)
    value, last = holder.release()
    assert last == 1
    assert holder.term(0.0) is None
    other.seen(Entry(value, 2), 0.1)
    _write(other, 0.1, 3)
    assert other.term(0.1) == 3


def test_rival_is_a_process_that_has_written_since_the_first_look():
    def entry(holder, count):
        return Entry(msgspec.json.encode(LeaseRecord(holder, count, SECONDS)), count)

    rule = LeaseRule("a", SECONDS)
    for count, now in ((5, 0.0), (5, 1.0), (4, 1.5)):  # it may be dead, and brokers that lag behind tell nothing new
        rule.seen(entry("b", count), now)
        assert rule.rival is None
    rule.seen(entry("b", 6), 2.0)
    assert rule.rival.holder == "b"
    rule.seen(entry("b", 6), 2.5)
    assert rule.rival.holder == "b"
    rule.seen(entry("", 7), 3.0)
    assert rule.rival is None
    _write(rule, 3.0, 8)
    assert rule.rival is None
    rule.seen(entry("c", 9), 4.0)  # it has replaced an entry that was seen
    assert rule.rival.holder == "c"


@pytest.mark.parametrize("value", [b"", b"\xff", b"[]", b'{"holder": 3}'])
def test_unreadable_value_is_a_lease_that_somebody_holds(value):
    rule = LeaseRule("a", SECONDS)
    rule.seen(Entry(value, 1), 0.0)
    assert rule.attempt(SECONDS - 0.1) is None
    assert rule.attempt(SECONDS)[1] == 1


def test_longer_lease_of_the_holder_counts():
    rule = LeaseRule("a", SECONDS)
    rule.seen(Entry(msgspec.json.encode(LeaseRecord("b", 1, 10.0)), 1), 0.0)
    assert rule.attempt(9.9) is None
    assert rule.attempt(10.0) is not None


def test_after_a_pause_of_the_brokers_the_holder_can_write_first():
    rule = LeaseRule("a", SECONDS)
    entry = Entry(msgspec.json.encode(LeaseRecord("b", 1, SECONDS)), 1)
    for now in (0.0, 1.0, 10.0, 11.0, 12.0):
        rule.seen(entry, now)
        assert rule.attempt(now) is None
    rule.seen(entry, 13.0)
    assert rule.attempt(13.0) is not None


def test_removed_entry_is_not_replaced_at_once():
    rule = LeaseRule("a", SECONDS)
    rule.seen(Entry(msgspec.json.encode(LeaseRecord("b", 1, SECONDS)), 5), 0.0)
    rule.seen(None, 0.5)
    assert rule.attempt(1.0) is None
    rule.seen(None, 3.5)
    assert rule.attempt(3.5)[1] == 0


def test_brokers_that_have_lost_their_last_writes_do_not_stop_a_lease():
    rule = LeaseRule("a", SECONDS)
    rule.seen(None, 0.0)
    value, _ = rule.attempt(0.0)
    rule.written(5)
    _write(rule, 1.0, 6)
    rule.must_read()
    rule.seen(Entry(value, 5), 2.0)
    assert rule.attempt(2.0)[1] == 5
