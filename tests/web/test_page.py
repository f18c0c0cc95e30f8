"""What a page gets: values as JSON, and snapshot, deltas and arrays, whenever it reads."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from web_viewer import LivePage, read_array

from larpixdaq.web.page import History, Outbox, Section, Tail, binary_frame, to_json

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=20)
    | st.integers(0, 2**64 - 1).map(np.uint64)
    | st.floats(width=32).map(np.float32)
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.integers(), inner, max_size=5),
    max_leaves=20,
)


@given(_VALUES)
def test_every_value_is_json_that_a_browser_reads_exactly(value: Any) -> None:
    def check(part: Any) -> None:
        if isinstance(part, dict | list):
            for inner in part.values() if isinstance(part, dict) else part:
                check(inner)
        elif isinstance(part, int):
            assert abs(part) <= 2**53
        elif isinstance(part, float):
            assert math.isfinite(part)

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    check(json.loads(to_json(value).decode(), parse_constant=no_constant))


def test_arrays_become_lists_and_tables_lists_of_dicts() -> None:
    table = np.zeros(2, [("io_group", "u1"), ("rate", "f8"), ("packets", "u8"), ("name", "S4")])
    table["rate"] = [1.5, np.nan]
    table["packets"] = [3, 2**63]
    table["name"] = [b"ab", b"\xff"]
    assert json.loads(to_json(table)) == [
        {"io_group": 0, "rate": 1.5, "packets": 3, "name": "ab"},
        {"io_group": 0, "rate": None, "packets": str(2**63), "name": "\\xff"},
    ]
    assert json.loads(to_json({1: np.arange(3, dtype="u8"), "n": np.float32(0.5), "b": b"x"})) == {
        "1": [0, 1, 2],
        "n": 0.5,
        "b": "x",
    }
    assert json.loads(to_json(table[0])) == {"io_group": 0, "rate": 1.5, "packets": 3, "name": "ab"}
    assert json.loads(to_json("\ud800 </script>\x00")) == "? </script>\x00"


@given(st.integers(0, 40), st.sampled_from(["u1", "<f4"]), st.data())
def test_arrays_come_back_from_a_frame(chips: int, dtype: str, data: st.DataObject) -> None:
    content = data.draw(st.binary(min_size=chips * 64 * np.dtype(dtype).itemsize, max_size=chips * 64 * 4))
    values = np.frombuffer(content[: chips * 64 * np.dtype(dtype).itemsize], dtype).reshape(chips, 64)
    header, found = read_array(binary_frame({"name": "pixels", "seen": 0.5}, values))
    assert header == {"name": "pixels", "seen": 0.5, "shape": [chips, 64], "coding": "deflate-raw"}
    assert found.tobytes() == values.tobytes() or not chips


class _Socket:
    """Hands over frames in place of a websocket."""

    def __init__(self) -> None:
        self.frames: list[str | bytes] = []

    def recv(self, timeout: float) -> str | bytes:
        return self.frames.pop(0)


class PageModel(RuleBasedStateMachine):
    """A page that reads at any time has, once it has read all, the state as it is, the newest arrays, and all
    responses."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.tail = History(5), Tail(4)
        self.sections: dict[str, Section | Tail | History] = {
            "status": Section(), "alarms": Section([]), "log": self.tail, "history": self.history,
        }  # fmt: skip
        self.outbox = Outbox(self.sections, {"name": "n", "role": "observer"})
        self.socket = _Socket()
        self.page = LivePage(self.socket)  # type: ignore[arg-type]
        self.newest: dict[str, bytes] = {}
        self.last: dict[str, str] = {}
        self.time = 0.0

    @rule(name=st.sampled_from(["status", "alarms"]), value=st.integers(0, 3))
    def set(self, name: str, value: int) -> None:
        section = self.sections[name]
        assert isinstance(section, Section)
        if section.set(value):
            self.outbox.change(name)

    @rule(count=st.integers(1, 3))
    def log(self, count: int) -> None:
        self.outbox.append("log", [self.tail.append(f"line {self.time} {i}") for i in range(count)])

    @rule(rates=st.dictionaries(st.integers(1, 3), st.floats(0, 1e6), max_size=3))
    def rate(self, rates: dict[int, float]) -> None:
        self.time += 1
        self.outbox.append("history", [self.history.append(self.time, rates, sum(rates.values()))])

    @rule()
    def flood(self) -> None:
        self.outbox.append("log", [self.tail.append(f"flood {i}") for i in range(400)])

    @rule(value=st.integers(0, 255))
    def array(self, value: int) -> None:
        frame = binary_frame({"name": "pixels"}, np.full((1, 2), value, "u1"))
        self.newest["pixels"] = frame
        self.outbox.set_array("pixels", frame)

    @rule(request=st.sampled_from(["a", "b"]), kind=st.sampled_from(["ack", "progress", "result"]), n=st.integers())
    def respond(self, request: str, kind: str, n: int) -> None:
        json_text = json.dumps({"type": "response", "id": request, "kind": kind, "n": n})
        self.last[request] = json_text
        self.outbox.respond(request, kind, json_text.encode())

    @rule()
    def read(self) -> None:
        self.socket.frames += self.outbox.take()
        while self.socket.frames:
            self.page.take(0)
        state = self.page.state
        assert state["status"] == json.loads(self.sections["status"].json)
        assert state["alarms"] == json.loads(self.sections["alarms"].json)
        assert state["log"][-4:] == json.loads(self.tail.json)
        expected = json.loads(self.history.json)
        kept = len(expected["times"])
        assert state["history"]["times"][-kept or None :] == expected["times"]
        for group, column in expected["io_groups"].items():
            assert state["history"]["io_groups"][group][-kept:] == column
        for name, frame in self.newest.items():
            assert self.page.arrays[name][1].tobytes() == read_array(frame)[1].tobytes()
        for request, text in self.last.items():
            assert self.page.responses[request][-1] == json.loads(text)
        assert self.outbox.waiting == 0
        assert self.outbox.take() == []

    @invariant()
    def little_waits(self) -> None:
        assert self.outbox.waiting < 1 << 20


TestPageModel = PageModel.TestCase
