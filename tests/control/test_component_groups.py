"""Components in groups: no component disappears, counts add up, the worst comes first, and many are readable."""

import json
from collections import Counter

import msgspec
from fake_core import producer_status, storage_status
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.control import display
from larpixdaq.control.component_groups import (
    LEVELS,
    MANY,
    component_groups,
    counts,
    described,
    group_name,
    is_grouped,
)
from larpixdaq.protocol.reports import MonitorStatus, SupervisedProcess, SupervisorStatus
from larpixdaq.runtime.units import natural

KINDS = ("producer", "storage", "run_data")


def component(name, kind, facts, *, module="", host="daq1", **changed):
    return {"name": name, "kind": kind, "module": module, "alive": True, "stuck": False, "heard_s": 0.1,
            "info": {"host": host}, "status": facts, **changed}  # fmt: skip


def status_of(kind, **changed):
    if kind == "producer":
        return producer_status(run=7, counted_run=7, packets=100, rate=1000.0, **changed)
    if kind == "storage":
        return storage_status(files=["x.part"], bytes_per_second=1_000_000, **changed)
    return msgspec.to_builtins(MonitorStatus(run=7, rate=25_000.0, seen=0.5))


def detector(modules=25, hosts=4):
    """Return the components of 100 hosts in 25 modules, three on each host."""
    return [
        component(f"board {host}" if kind == "producer" else f"{kind} {host}", kind, status_of(kind),
                  module=f"module {host // hosts}", host=f"daq{host}")
        for host in range(modules * hosts)
        for kind in KINDS
    ]  # fmt: skip


def status(components, **facts):
    return {"state": "RUN", "run": {"run": 7, "kind": "physics", "begun": None, "comment": "", "missing": []},
            "components": components, **facts}  # fmt: skip


def alarm(number, name, condition, level="alarm", **changed):
    return {"id": number, "condition": condition, "component": name, "subject": name, "level": level,
            "text": f"{name} {condition}", "raised": 1.0, "last": 1.0, **changed}  # fmt: skip


def test_300_components_without_a_problem():
    lines = display.status_lines(status(detector()))
    assert lines[1] == "300 components alive, in 25 groups, 0 with a problem"
    assert [line.split("  ")[0] for line in lines[2:]] == [f"module {number}" for number in range(25)]
    assert lines[2] == (
        "module 0            12 components alive; 4 producers: 4,000 packets/s, 400 packets of the run; 4 storages: "
        "4 files open, 4 MB/s written, at least 1.1 TB free each; 4 monitors"
    )


def test_problems_among_300_components():
    components = detector()
    by_name = {one["name"]: one for one in components}
    lost = [f"{kind} {host}" for host in (40, 41) for kind in ("board", *KINDS[1:])] + ["board 8"]
    for place, name in enumerate(lost):
        by_name[name] |= {"alive": False, "heard_s": 2.0 + place}
    by_name["storage 9"]["status"] = storage_status(paused="no space left on /data")
    by_name["board 20"] |= {"stuck": True}
    by_name["run_data 99"]["status"] = {"rate": "nonsense"}
    alarms = [alarm(3 + place, name, "component-lost") for place, name in enumerate(lost)]
    alarms += [
        alarm(10, "board 21", "rate", "warning"),
        alarm(11, "", "catalogue"),
        alarm(12, "gone", "component-lost"),
    ]
    found = status(components, alarms=alarms)
    found["run"]["missing"] = ["board 40", "storage 40", "never registered"]
    lines = display.status_lines(found)
    assert lines[1:7] == [
        "ALARM 11 since 1970-01-01 00:00:01 UTC:  catalogue",
        "ALARM 12 since 1970-01-01 00:00:01 UTC: gone component-lost",
        "MISSING in this run: never registered",
        "300 components: 7 LOST, 1 stuck, 292 alive, in 25 groups, 4 with a problem",
        "module 10  ALARM    12 components: 6 LOST, 6 alive; 4 producers: 2,000 packets/s, 200 packets of the run; "
        "4 storages: 2 files open, 2 MB/s written, at least 1.1 TB free each; 4 monitors",
        "    6 LOST, last heard 2 s to 7 s ago, 2 MISSING in this run, alarms 3-8: board 40, board 41, run_data 40, "
        "run_data 41, storage 40, storage 41",
    ]
    assert lines[7:13] == [
        "    6 others alive",
        "module 2   ALARM    12 components: 1 LOST, 11 alive; 4 producers: 3,000 packets/s, 300 packets of the run; "
        "4 storages: 3 files open, 3 MB/s written, at least 1.1 TB free each; 4 monitors",
        "    board 8    LOST   100 packets of the run",
        "      LOST, last heard 8 s ago, alarm 9",
        "    storage 9  alive  1.1 TB free; PAUSED",
        "      PAUSED: storage 9 is not writing: no space left on /data",
    ]
    assert [line.split("  ")[0] for line in lines if line.startswith("module")] == [
        "module 10", "module 2", "module 5", "module 24",
        *(f"module {number}" for number in range(25) if number not in (10, 2, 5, 24)),
    ]  # fmt: skip
    assert len(lines) < 50
    everything = display.status_lines(found, unfold=True)
    for one in components:
        assert any(one["name"] in line for line in everything)
    assert json.loads(json.dumps(described(found)))[0]["members"][0] == {
        "name": "board 40", "level": "alarm",
        "problems": ["LOST, last heard 2 s ago, MISSING in this run, alarm 3"],
    }  # fmt: skip


def test_few_components_without_modules_have_a_line_each():
    few = [component(f"a{number}", "storage", storage_status()) for number in range(MANY)]
    lines = display.status_lines(status(few))
    assert [line.split()[0] for line in lines[1:]] == [one["name"] for one in few]
    assert len(display.status_lines(status([*few, component("b", "storage", storage_status(), host="daq2")]))) == 4
    assert len(display.status_lines(status([few[0] | {"module": "north"}, *few[1:]]))) == 4


def test_more_groups_than_lines():
    """A hundred hosts without modules: those without a problem are one line."""
    components = [one | {"module": ""} for one in detector()]
    components[0] |= {"alive": False}
    lines = display.status_lines(status(components))
    assert lines[2].startswith("host daq0  ALARM    3 components: 1 LOST, 2 alive")
    assert lines[-1].startswith("99 groups without a problem: 297 components alive; 99 producers: 99,000 packets/s")
    assert len(lines) == 7


def test_an_acknowledged_alarm_comes_after_others():
    components = [component(name, "storage", storage_status(), module=name) for name in ("a", "b", "c")]
    for one in components[:2]:
        one["alive"] = False
    seen = {"acknowledged": 2.0, "by": "me"}
    found = status(components, alarms=[alarm(1, "a", "component-lost", **seen), alarm(2, "b", "component-lost")])
    assert [(group.name, group.level) for group in component_groups(found)] == [
        ("b", "alarm"), ("a", "warning"), ("c", "")
    ]  # fmt: skip


def test_what_a_folded_line_must_not_hide():
    boards = [{"io_group": 3, "name": "x", "setup": ["its clock has 64 bits"]}]
    changes = {
        "io_group 3 is": producer_status(verdicts={"3": "suspect"}, counted_run=6),
        "its clock has 64 bits": producer_status(boards=boards),
        "WAITING: north": msgspec.to_builtins(SupervisorStatus([SupervisedProcess("north", state="waiting")])),
    }
    for words, facts in changes.items():
        kind = "supervisor" if "processes" in facts else "producer"
        (group,) = component_groups(status([component("a", kind, facts)]))
        assert group.level == "warning"
        assert words.split(" is")[0] in group.members[0].problems[0].text
    lines = display.status_lines(
        status([component("a", "producer", producer_status(dropped=5), module="m", log_level="DEBUG")])
    )
    assert lines[-1].endswith("1 producer: 1 with unknown rate, 5 rows dropped; log level DEBUG: 1")


names = st.sampled_from(["", "module 1", "module 2", "module 10", "x" * 64, "\u0663"])
facts = st.builds(
    component,
    st.text(min_size=1, max_size=8),
    st.sampled_from([*KINDS, "log", "supervisor", "another"]),
    st.one_of(
        st.just({}),
        st.builds(producer_status, packets=st.integers(0, 9), run=st.sampled_from([None, 7]), rate=st.just(2.0)),
        st.builds(storage_status, paused=st.sampled_from(["", "full"]), rows=st.integers(0, 9) | st.just("nonsense")),
    ),
    module=names,
    host=st.sampled_from([None, "daq1", 7, "9" * 5000]),
    alive=st.booleans(),
    stuck=st.booleans(),
)
alarms = st.lists(
    st.builds(
        alarm,
        st.integers(1, 99),
        st.sampled_from(["", "a", "b"]),
        st.sampled_from(["component-lost", "component-stuck", "rate", "storage-paused"]),
        st.sampled_from(["warning", "alarm"]),
        acknowledged=st.sampled_from([None, 3.0]),
    ),
    max_size=6,
)


@given(st.lists(facts, max_size=20, unique_by=lambda one: one["name"]), alarms, st.lists(st.sampled_from("abc")))
def test_every_component_is_in_one_group_and_counts_add_up(components, raised, missing):
    found = status(components, alarms=raised)
    found["run"]["missing"] = missing
    groups = component_groups(found)
    members = [member for group in groups for member in group.members]
    assert Counter(member.name for member in members) == Counter(one["name"] for one in components)
    assert all(
        group.members and {group_name(member.facts) for member in group.members} == {group.name} for group in groups
    )
    levels = [LEVELS.index(group.level) for group in groups]
    assert levels == sorted(levels, reverse=True)
    for group in groups:
        assert group.level == max((member.level for member in group.members), key=LEVELS.index)
        assert all(bool(member.problems) is bool(member.level) for member in group.members)
    total = Counter()
    for member in members:
        total.update(counts(member, 7))
    assert sum((Counter(group.sums()) for group in groups), Counter()) == +total
    # Whatever makes `status` exit with 1 is unfolded.
    if display.needs_attention(found) and not set(missing) - {one["name"] for one in components}:
        assert groups[0].level
    lines = "\n".join(display.status_lines(found))
    for member in members:
        if member.problems and is_grouped(components):
            assert member.name in lines
    everything = "\n".join(display.status_lines(found, unfold=True))
    assert all(one["name"] in everything for one in components)
    for number in (one["id"] for one in raised):
        assert str(number) in lines or "-" in lines
    assert [(one["name"], [member["name"] for member in one["members"]]) for one in described(found)] == [
        (group.name, [member.name for member in group.members]) for group in groups
    ]


@given(st.lists(st.text(max_size=12)), st.integers(0, 99), st.integers(0, 99))
def test_names_with_numbers_have_a_total_order(texts, one, other):
    assert sorted(texts, key=natural) == sorted(sorted(texts), key=natural)
    assert (natural(f"module {one}") < natural(f"module {other}")) is (one < other)


def test_a_status_that_is_not_understood():
    (group,) = component_groups(status([component("a", "producer", {"packets": "five"})]))
    assert (group.level, group.sums()) == ("warning", {})
    assert "another version" in group.bad[0].problems[0].text
