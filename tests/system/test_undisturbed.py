"""Requests and routines do not disturb a run: all words of a board that never waits are in the file."""

import inspect
import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
from emulated_board import emulator
from processes import LIMIT
from system import rows_of

from larpixdaq.constants import QUERIES, RUN_ACTIONS
from larpixdaq.errors import ControlHeld, ProtocolError, RequestError
from larpixdaq.hardware.actions import BoardActions, ChipActions, LayoutActions
from larpixdaq.hardware.board_setup import RegisterActions
from larpixdaq.hardware.discovery_action import DiscoveryActions
from larpixdaq.hardware.power_up import PowerActions
from larpixdaq.hardware.snapshots import SnapshotActions
from larpixdaq.hardware.supervisor import Child
from larpixdaq.operator import Operator

SLOW = 60.0
ROUTINES = """
import os
from larpixdaq.routines import Routine

def _spins(controller, send_data, send_info):
    send_info("spinning")
    while True:
        pass

def _holds(controller, send_data, send_info):
    send_info("spinning")
    sum(iter(int, 1))  # in C, and nobody else gets the interpreter's lock

def _listens(controller, send_data, send_info):
    controller.io.listen_to = "all"
    controller.io.start_listening()
    _holds(controller, send_data, send_info)

def _prints(controller, send_data, send_info):
    for line in range(50_000):
        print("line", line)
    return controller, "printed"

def _dies(controller, send_data, send_info):
    os.abort()

registration = {f.__name__[1:]: Routine(f.__name__[1:], f, []) for f in (_spins, _holds, _listens, _prints, _dies)}
"""


@contextmanager
def undisturbed(line, folder, rate, *wrong):
    """Yield an Operator in a run, and check at the end that no word was lost.

    io_group 1 has four chips that are not brought up. The board of io_group 2 sends `rate` messages/s of one word and
    does not wait for the producer: words would be lost if the producer stood still for long.
    """
    (folder / "routines").mkdir()
    (folder / "routines" / "mine.py").write_text(ROUTINES)
    network = folder / "network.json"
    with (
        emulator("--rate", str(rate), "--queue", str(rate // 2), "--wait-for-go", "--stay") as board,
        emulator("--chips", "4", "--power-on", *wrong, "--write-network", str(network)) as tile,
    ):
        where = [board.addresses[0].replace("1=", "2="), tile.addresses[0]]
        operator = line.start("--routines", folder / "routines", "--pacman", *where)
        operator.load_board(str(network)).result(LIMIT)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        board.go()
        yield operator
        board.stop()
        sent = board.finish()["sent"]["1"]["words"]
        ended = operator.end_run().result(SLOW)
        assert ended["condition"] == "COMPLETE", ended
        rows = np.concatenate([rows_of(path) for path in ended["files"]])
        words = (rows["packet_type"] < 4) | (rows["packet_type"] > 5)
        assert np.count_nonzero(words & (rows["direction"] == 1) & (rows["io_group"] == 2)) == sent > rate


def test_routines_that_never_end(line, tmp_path):
    with undisturbed(line, tmp_path, 200_000) as operator:
        for routine in ("spins", "holds", "listens"):
            with pytest.raises(RequestError, match=r"stopped at its time limit of 0\.7 s"):
                operator.run_routine(routine, time_limit=0.7).result(LIMIT)


def test_networks_and_routines_that_go_wrong(line, tmp_path):
    with undisturbed(line, tmp_path, 20_000, "--broken-links", "1-1-11/1-1-12") as operator:
        result = operator.configure_network(tries=1).result(SLOW)
        assert (result["ok"], result["silent"], result["different"]) == (False, ["1-1-12"], 0)
        request = operator.run_routine("holds")
        while "spinning" not in next(request).text:
            pass
        with pytest.raises(RequestError, match="routine holds is running, and only one can"):
            operator.validate_configuration().result(LIMIT)
        assert operator.abort_routine().result(LIMIT) == "holds"
        with pytest.raises(RequestError, match="routine holds: aborted by the operator"):
            request.result(LIMIT)
        with pytest.raises(RequestError, match="routine dies: its process was ended by signal SIGABRT"):
            operator.run_routine("dies").result(LIMIT)
        assert operator.run_routine("prints").result(LIMIT) == "printed"


#: Values that are invalid for nearly all parameters.
ODD = [
    *(None, True, (1 << 63) - 1, math.nan, "x" * 3000, "a\nb", [], ["1-1-11", 5], {1: 2}, {"1-1-11": {None: 1}}),
    *({"1-1-11": {"threshold_global": math.nan}}, np.zeros(2, [("a", "u1")])),
]
#: Valid values of required parameters.
NEEDED = {"power": {"on": True}, "set_uart_clock": {"ratio": 2}, "run_routine": {"name": "hello_world"}}


def parameters(action):
    """Return the parameters of an action with their defaults."""
    kinds = (
        *(BoardActions, ChipActions, LayoutActions, SnapshotActions),
        *(RegisterActions, PowerActions, DiscoveryActions, Child),
    )
    method = next(getattr(kind, action) for kind in kinds if hasattr(kind, action))
    found = inspect.signature(method).parameters
    return {name: found[name].default for name in found if name not in ("self", "call")}


def test_actions_with_invalid_parameters(line, tmp_path):
    """Every action with every invalid value of each parameter: the error is one line that begins with the action."""
    with undisturbed(line, tmp_path, 20_000) as operator:
        assert operator.configure_network().result(SLOW)["ok"]
        actions = [action for action in operator.actions().result(LIMIT)["LArPix board"] if action not in RUN_ACTIONS]
        requests = [(action, {"nonsense": 1}) for action in actions]
        requests += [
            (action, NEEDED.get(action, {}) | {name: value})
            for action in actions
            for name, default in parameters(action).items()
            for value in ODD
            if value is not default  # with which some actions work for seconds
        ]
        refused = 0
        for action, params in requests:
            try:
                operator.call("LArPix board", action, **params).result(LIMIT)
            except RequestError as error:
                text = str(error)
                assert re.match(rf"{action}: |no routine|routine hello_world", text), (params, text)
                assert "\n" not in text
                assert len(text) <= 2000
                assert not re.search(r"(Type|Value|Attribute|Key|Index|Overflow|Assertion)Error", text), (params, text)
                refused += 1
        assert refused > 200
        with pytest.raises(ProtocolError, match="the limit is"):
            operator.load_board("x" * 10_000_000)
        with Operator(operator._connection.link.core) as second:
            for action in set(actions) - QUERIES:
                with pytest.raises(ControlHeld):
                    second.call("LArPix board", action).result(LIMIT)
            assert second.ping().result(LIMIT) == {"1": True, "2": True}
