"""Leases at real brokers: processes that end, die, stand still, or lose the brokers."""

import contextlib
import itertools
import random
import signal
import subprocess
import sys

import lease_holder
import pytest
from brokers import brokers
from processes import LIMIT, until

from larpixdaq.errors import BrokerError, RevisionConflict
from larpixdaq.stream.jetstream import Brokers, parse_servers
from larpixdaq.stream.lease import MARGIN, SECONDS, Bucket, Lease, clock


@pytest.fixture(scope="module")
def broker():
    with brokers(1) as broker:
        yield broker


def bucket(broker):
    return contextlib.closing(Bucket(Brokers(parse_servers(broker.urls)), "test"))


class Holder:
    """A process of lease_holder. `lines`: (time, term) so far; term 0: it does not hold the lease."""

    def __init__(self, broker, key, path):
        self.path = path
        with open(path, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, lease_holder.__file__, broker.urls, key, str(SECONDS)], stdout=out
            )

    @property
    def lines(self):
        whole = self.path.read_text().rpartition("\n")[0].splitlines()
        return [(float(when), int(term)) for when, term in map(str.split, whole)]

    def __enter__(self):
        until(lambda: self.lines and self.lines[-1][1], "the process to hold the lease")
        return self

    def __exit__(self, *exc):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def test_lease_that_is_given_back_is_taken_at_once(broker):
    with bucket(broker) as mine, bucket(broker) as other:
        first = Lease(mine, "given-back", about={"host": "one"})
        term = until(lambda: first.term, "the first lease")
        second = Lease(other, "given-back", about={"host": "two"})
        until(lambda: second.owner is not None, "the second to see the first")
        assert second.term is None
        assert second.owner.about == {"host": "one"}
        until(lambda: first.waiting == {"host": "two"}, "the first to know that another one waits")
        began = clock()
        first.close()
        assert first.term is None
        assert until(lambda: second.term, "the second lease") > term
        assert clock() - began < SECONDS - MARGIN
        assert second.waiting is None
        third = Lease(mine, "given-back", about={"host": "three"})
        until(lambda: second.waiting == {"host": "three"}, "the second to know of the third")
        third.close()
        until(lambda: second.waiting == {}, "the second to know that nobody waits")
        second.close()


def test_lease_of_a_killed_process_is_taken_after_its_time(broker, tmp_path):
    with Holder(broker, "killed", tmp_path / "out") as holder, bucket(broker) as own:
        lease = Lease(own, "killed")
        until(lambda: lease.owner is not None, "the holder to be seen")
        holder.process.kill()
        until(lambda: lease.term, "the lease", limit=2 * SECONDS)
        taken = clock()
        assert holder.lines[-1][0] < taken
        lease.close()


def test_process_that_stood_still_does_not_hold_the_lease_when_it_goes_on(broker, tmp_path):
    with Holder(broker, "stopped", tmp_path / "out") as holder, bucket(broker) as own:
        lease = Lease(own, "stopped")
        until(lambda: lease.owner is not None, "the holder to be seen")
        holder.process.send_signal(signal.SIGSTOP)
        until(lambda: lease.term, "the lease")
        taken = clock()
        holder.process.send_signal(signal.SIGCONT)
        until(lambda: holder.lines[-1][0] > taken + 0.5, "lines of the process")
        assert {term for when, term in holder.lines if when > taken} == {0}
        lease.close()
        until(lambda: holder.lines[-1][1] > 0, "the process to have the lease again")


def test_holder_without_brokers_stops_in_time_and_continues_the_same_term(broker):
    with bucket(broker) as own:
        lease = Lease(own, "away")
        term = until(lambda: lease.term, "the lease")
        broker.stop(0)
        stopped = clock()
        try:
            until(lambda: lease.term is None, "the end of the lease")
            assert clock() - stopped < SECONDS  # with the delay of this look
            assert lease.is_own
            until(lambda: lease.problem, "the reason")
        finally:
            broker.resume(0)
        assert until(lambda: lease.term, "the lease again") == term
        broker.kill(0)
        until(lambda: lease.term is None, "the end of the lease")
        broker.start(0)
        assert until(lambda: lease.term, "the lease again") == term
        lease.close()


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_never_two_holders(tmp_path):
    """Three processes and three brokers die, stand still and come back, until the lease has had four terms."""
    choose = random.Random(1)
    with brokers(3) as three, contextlib.ExitStack() as stack:
        holders = [Holder(three, "chaos", tmp_path / f"{number}") for number in range(3)]
        stack.callback(lambda: [holder.__exit__() for holder in holders])
        until(lambda: any(holder.lines and holder.lines[-1][1] for holder in holders), "a first holder")
        end, paused, away = clock() + 10 * LIMIT, {}, None
        while len({term for holder in holders for _, term in list(holder.lines) if term}) < 4:
            assert clock() < end
            number = choose.randrange(3)
            what = choose.choice(["stop", "kill", "broker stands still", "broker dies", "wait"])
            process = holders[number].process
            if number in paused:
                process.send_signal(signal.SIGCONT)
                del paused[number]
            elif what == "stop":
                process.send_signal(signal.SIGSTOP)
                paused[number] = True
            elif what == "kill":
                holders[number].__exit__()
                holders.append(holders[number])
                holders[number] = Holder(three, "chaos", tmp_path / f"{len(holders)}")
            elif away is not None:
                (three.resume if away[1] == "broker stands still" else three.start)(away[0])
                away = None
            elif what != "wait":
                (three.stop if what == "broker stands still" else three.kill)(number)
                away = number, what
            pause = clock() + choose.uniform(0.1, 2.5)
            until(lambda pause=pause: clock() > pause, "the pause to end")
        for holder in holders:
            if holder.process.poll() is None:
                holder.process.send_signal(signal.SIGCONT)
        if away is not None:
            (three.resume if away[1] == "broker stands still" else three.start)(away[0])

        def active() -> int:
            return sum(bool(holder.lines and holder.lines[-1][1]) for holder in holders[:3])

        until(lambda: active() == 1, "one holder in the end")
    terms = {}
    for holder in holders:
        for when, term in holder.lines:
            if term:
                first, last, whose = terms.setdefault(term, [when, when, holder])
                assert whose is holder
                terms[term] = [min(first, when), max(last, when), holder]
    spans = [(first, last) for _, (first, last, _) in sorted(terms.items())]
    assert len(spans) >= 4
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(spans)), spans


def test_entries_are_replaced_by_revision(broker):
    with bucket(broker) as one, bucket(broker) as other:
        assert one.get(["entry"]) == [None]
        first = one.put("entry", b"1", 0)
        with pytest.raises(RevisionConflict):
            other.put("entry", b"2", 0)
        second = other.put("entry", b"2", first)
        assert one.get(["entry"]) == [(b"2", second)]
        with pytest.raises(RevisionConflict):
            one.put("entry", b"3", first)
        with pytest.raises(BrokerError, match="limit"):
            one.put("entry", bytes(1 << 20), second)
        one.remove("entry")
        until(lambda: other.get(["entry"]) == [None], "the entry to be removed")


def test_no_broker_is_one_clear_line(tmp_path):
    with pytest.raises(BrokerError, match=r"^bucket larpixdaq: no broker: 127.0.0.1:1: [^\n]*$"):
        Bucket(Brokers(("nats://127.0.0.1:1",)), "test", limit=0.5)
