"""The simulation of bench/scaling.py: its counts hold whatever fails, and simple cases are as computed by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
model: Any = importlib.import_module("line_model")

COSTS = model.Costs(
    receive=20, pack=24, uplink=30, from_ring=31, packed=45, from_broker=25, plain=78, publish_1=26, publish_3=43,
    deliver=31, trip_1=1, trip_3=2, bytes=7, resume=0.3, resume_brokers=0.3,
)  # fmt: skip
TIMES = {
    "number": st.integers(0, 1), "at": st.floats(0.1, 4), "seconds": st.floats(0.1, 4) | st.just(float("inf")),
}  # fmt: skip
FAULTS = (
    st.builds(model.Fault, kind=st.sampled_from(["storage", "broker", "rack"]), **TIMES)
    | st.builds(model.Fault, kind=st.just("disk"), speed=st.floats(1e4, 1e7), **TIMES)
    | st.builds(model.Fault, kind=st.just("processor"), speed=st.floats(0.01, 1), **TIMES)
)


@st.composite
def plans(draw: st.DrawFn) -> Any:
    brokers = draw(st.integers(0, 3))
    storages = draw(st.integers(1, 2))
    rates = draw(st.lists(st.integers(0, 300_000), min_size=1, max_size=3))
    faults = [
        fault
        for fault in draw(st.lists(FAULTS, max_size=4))
        if fault.kind == "rack" or fault.number < (brokers if fault.kind == "broker" else storages)
    ]
    return model.Plan(
        rates=[(1.5 * index, float(rate)) for index, rate in enumerate(rates)],
        seconds=4.0,
        producers=draw(st.integers(1, 3)),
        storages=storages,
        same_host=draw(st.booleans()) and not brokers,
        ring=draw(st.integers(1 << 20, 64 << 20)),
        spool=draw(st.sampled_from([0, 4 << 20, 1 << 30])),
        spool_disk=draw(st.sampled_from([2e6, 300e6])),
        disk=draw(st.sampled_from([2e6, 300e6])),
        cache=draw(st.sampled_from([0.0, 1e6])),
        network=draw(st.sampled_from([1e6, 1e9])),
        brokers=brokers,
        replicas=draw(st.integers(1, brokers)) if brokers else 1,
        stream_bytes=draw(st.sampled_from([float("inf"), 2e6])),
        racks=draw(st.integers(1, 3)),
        forget_after=draw(st.sampled_from([1.0, 60.0])),
        board_queue=draw(st.sampled_from([0, 100_000])),
        faults=faults,
        drain=20.0,
    )


@given(plans(), st.integers(0, 3), st.sampled_from([20.0, 5_000.0]))
def test_no_row_is_lost_from_the_counts(plan: Any, seed: int, receive: float) -> None:
    line = model.Line(plan, COSTS._replace(receive=receive), seed)
    result = line.run()
    assert result.sent == result.stored + result.missed + result.dropped + result.lost + result.waiting
    assert 0 <= result.ring <= 1.001
    for producer in line.producers:
        assert producer.sent == producer.backlog + producer.missed + producer.dropped + producer.made
    made = sum(producer.made for producer in line.producers)
    for storage in line.storages:  # each has all rows, or they are counted
        ways = storage.deliveries
        assert storage.rows == sum(way.stored for way in ways)
        rest = sum(way.stored + way.lost + way.skipped for way in ways) + waiting(line, ways)
        if line.streams:
            uplinks = [producer.deliveries[0] for producer in line.producers]
            rest += sum(way.lost for way in uplinks) + waiting(line, uplinks)
        assert made == rest


def waiting(line: Any, ways: Any) -> int:
    for way in ways:
        assert way.rows == sum(batch.rows for batch in [*way.queue, *way.flight])
    return sum(way.rows for way in ways)


def test_ring_holds_a_stopped_storage() -> None:
    """200,000 rows/s for 5 s are 36 MB in a ring of 512 MiB."""
    plan = model.Plan(
        rates=[(0, 200_000.0)], seconds=10, same_host=True, faults=[model.Fault("storage", 0, 2, 5)], tick=0.02
    )
    result = model.Line(plan, COSTS).run()
    assert result.stored == result.sent == 2_000_000
    assert result.ring == pytest.approx(5.3 * 200_000 * 36 / (508 << 20), rel=0.05)
    assert not result.spool
    assert result.delays[2] == pytest.approx(5.3, abs=0.2)


def test_spool_takes_what_the_ring_cannot_and_the_rest_is_dropped() -> None:
    """Of 60 s at 100,000 rows/s, 216 MB, a ring of 64 MiB and a spool of 64 MiB hold some 130 MB."""
    settings = {"same_host": True, "ring": 64 << 20, "spool": 64 << 20, "faults": [model.Fault("storage", 0, 0, 60)]}
    result = model.Line(model.Plan(rates=[(0, 100_000.0)], seconds=60, **settings), COSTS).run()
    assert result.stored + result.dropped == result.sent
    assert result.stored * 36 == pytest.approx(124 << 20, rel=0.05)
    assert result.spool == pytest.approx(64 << 20, rel=0.05)


def test_two_storages_are_two_copies() -> None:
    plan = model.Plan(
        rates=[(0, 50_000.0)], seconds=100, producers=2, storages=2, racks=3,
        faults=[model.Fault("storage", 1, 10, float("inf"))],
    )  # fmt: skip
    result = model.Line(plan, COSTS).run()
    assert result.stored == result.sent
    assert result.skipped == pytest.approx(2 * 90 * 50_000, rel=0.01)
    assert result.ring == pytest.approx(60 * 50_000 * 36 / (508 << 20), rel=0.05)  # until the storage is forgotten


def test_what_was_on_its_way_to_a_stopped_storage_comes_again() -> None:
    """The network takes 2.3 s for a batch, and the storage is stopped meanwhile."""
    settings = {"network": 2e5, "faults": [model.Fault("storage", 0, 1, 1)]}
    result = model.Line(model.Plan(rates=[(0, 300_000.0), (2, 0.0)], seconds=4, **settings), COSTS).run()
    assert result.stored == result.sent == 600_000


def test_rows_of_a_dead_host_that_one_storage_has_are_not_lost() -> None:
    """Storage 1 is stopped when the host of producer 2 loses its power; storage 0 has its rows."""
    faults = [model.Fault("storage", 1, 1, 3), model.Fault("rack", 2, 2, float("inf"))]
    line = model.Line(
        model.Plan(rates=[(0, 100_000.0)], seconds=4, producers=3, storages=2, racks=3, faults=faults), COSTS
    )
    result = line.run()
    assert line.storages[1].deliveries[2].lost == pytest.approx(100_000, rel=0.15)  # of the second before
    assert result.lost <= 0.15 * 100_000
    assert result.stored + result.missed + result.lost == result.sent


def test_an_election_is_waited_out_in_the_ring() -> None:
    settings = {"storages": 2, "racks": 3, "brokers": 3, "faults": [model.Fault("broker", 0, 5, float("inf"))]}
    result = model.Line(model.Plan(rates=[(0, 100_000.0)], seconds=20, producers=3, **settings), COSTS, 1).run()
    assert result.stored == result.sent
    assert 4 <= result.delays[2] <= 9.5
    assert result.ring <= 9.5 * 100_000 * 36 / (508 << 20)


def test_one_message_is_on_its_way_to_the_brokers() -> None:
    """Each takes a second: the first has the 10,000 rows of a tick, 29 further ones what fits of 70,000."""
    plan = model.Plan(rates=[(0, 100_000.0)], seconds=20, brokers=1, replicas=1)
    result = model.Line(plan, COSTS._replace(trip_1=1000.0)).run()
    assert result.stored == result.sent == 2_000_000
    assert result.drained_at == pytest.approx(30, abs=0.5)


def test_one_line_without_simpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(SystemExit, match=r"^the simulation needs SimPy: pip install simpy$"):
        model.Line(model.Plan(rates=[(0, 1.0)], seconds=1), COSTS)
