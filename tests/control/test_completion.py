"""Completion of an Operator's calls: which argument is typed, and what it may be, for any text before the cursor."""

import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq.control.completion import Names, parse
from larpixdaq.errors import NoCore
from larpixdaq.operator import Operator

ROUTINES = [
    {"name": "hello_world", "params": []},
    {"name": "hot_channels", "params": [{"name": "above_hz"}, {"name": "seconds"}, {"name": "chips"}]},
]
CHIPS = {f"1-1-{chip}": {"wanted": {"threshold_global": 255, "channel_mask": [0] * 64}} for chip in (9, 11, 12)}


class Answer:
    def __init__(self, value):
        self.value = value

    def result(self, timeout):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class FakeOperator(Operator):
    """Answers at once, and counts what it is asked."""

    def __init__(self, **answers):
        self.answers = {
            "components": [{"name": "LArPix board"}, {"name": "Offline storage"}],
            "actions": {"LArPix board": ["ping", "power"], "core": ["status"]},
            "list_routines": ROUTINES,
            "retrieve_configuration": CHIPS,
            "packet_rate": {},
        } | answers
        self.asked = []

    def close(self):
        pass

    def _answer(self, name):
        self.asked.append(name)
        return Answer(self.answers[name])

    def components(self):
        return self._answer("components")

    def actions(self, component=None):
        return self._answer("actions")

    def list_routines(self, component=None):
        return self._answer("list_routines")

    def retrieve_configuration(self, chip=None, registers=None, component=None):
        return self._answer("retrieve_configuration")

    def packet_rate(self, channels=True, component=None):
        return self._answer("packet_rate")


def completed(text, operator=None):
    argument = parse(text)
    return None if argument is None else Names(operator or FakeOperator()).complete(argument)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("o.run_routine('h", ["hello_world", "hot_channels"]),
        ("o.run_routine(", ["hello_world", "hot_channels"]),
        ("o.run_routine('hot_channels', ", ["above_hz=", "chips=", "seconds="]),
        ("x = 3\nfor i in [1,2]:\n    o.run_routine('hot_channels', 5.0, sec", ["seconds="]),
        ("o.run_routine('hot_channels', above_hz=f(1, 2), sec", ["seconds="]),
        ("o.run_routine('hello_world', ", []),
        ("o.run_routine(name, ", []),
        ("o.ping(component='", ["LArPix board", "Offline storage"]),
        ("o.ping(1, 'LA", ["LArPix board"]),
        ("o.read_configuration('1-1-1", ["1-1-11", "1-1-12"]),
        ("o.read_configuration(['1-1-11', \"1-1-", ["1-1-9", "1-1-11", "1-1-12"]),
        ("o.read_configuration('1-1-11', 'thr", ["threshold_global"]),
        ("o.read_configuration(registers=['channel_mask', 'thr", ["threshold_global"]),
        ("o.send_configuration({'", ["1-1-9", "1-1-11", "1-1-12", "all"]),
        ("o.send_configuration({'1-1-11': {'", ["channel_mask", "threshold_global"]),
        ("o.call('LArPix board', 'p", ["ping", "power"]),
        ("o.call('core', '", ["status"]),
        ("o.adc_histogram(chip='", []),  # a number there
        ("o.no_such_method('", []),
        ("print(o.run_routine('hell", ["hello_world"]),
        ("o.read_configuration('1-1-11')", None),
        ("(1, 2", None),
        ("o.read_configuration('it\\'s', '", ["channel_mask", "threshold_global"]),
        ("o.read_configuration(  # '1-1-\n'", ["1-1-9", "1-1-11", "1-1-12"]),
        ("o.read_configuration('''1-1-12", ["1-1-12"]),
        (")o.read_configuration('", None),
    ],
)
def test_arguments(text, names):
    assert completed(text) == names


def test_chips_of_the_monitor_without_a_board():
    rows = [{"io_group": 2, "io_channel": 1, "chip_id": 30, "rate": 5.0}]
    operator = FakeOperator(retrieve_configuration=NoCore("no chip is known"), packet_rate={"chips": rows})
    assert completed("o.read_configuration('", operator) == ["2-1-30"]
    assert completed("o.read_configuration(registers='", operator) == []


def test_answers_are_kept_for_some_seconds():
    now = [0.0]
    operator = FakeOperator()
    names = Names(operator, lambda: now[0])
    argument = parse("o.ping(component='")
    for now[0] in (0.0, 1.0, 4.9):
        names.complete(argument)
    assert operator.asked == ["components"]
    now[0] = 6.0
    names.complete(argument)
    assert operator.asked == ["components"] * 2


def test_without_a_core_nothing_is_completed():
    names = ("components", "actions", "list_routines", "retrieve_configuration", "packet_rate")
    operator = FakeOperator(**dict.fromkeys(names, NoCore("gone")))
    for text in ("o.run_routine('", "o.ping(component='", "o.read_configuration('", "o.call('core', '"):
        assert completed(text, operator) == []


@settings(max_examples=examples(300))
@given(st.text(st.sampled_from("o.run_routine(call)[]{}'\"\\,=#\n :1-x")))
def test_any_text(text):
    completed(text)
    completed("o.run_routine(" + text)


@given(st.lists(st.sampled_from(["'a'", "1", "f(2, 3)", "[1, (2, 3)]", "{'a': 1, 'b': 'c, d'}", "x == 3", "'\\','"])))
def test_the_position_is_the_number_of_arguments_before(arguments):
    argument = parse(f"o.call({', '.join(arguments)}{', ' if arguments else ''}'ty")
    assert (argument.position, argument.prefix, argument.quote) == (len(arguments), "ty", "'")
    assert argument.texts == tuple(f" {text}" if i else text for i, text in enumerate(arguments))
