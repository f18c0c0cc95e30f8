"""The 16 uses of an Operator in larpix-web 0.1.0rc2: each works, or its error says what to write, and that works."""

import json
from pathlib import Path

import pytest
import yaml
from emulated_board import Emulator
from processes import LIMIT

from larpixdaq.errors import NoCore
from larpixdaq.operator import Operator

NETWORK = "controller/v2_example.json"
CHIP = "1-1-2"
LAYOUT = {
    "multitile_layout_version": "2.4.16",
    "pixel_pitch": 4,
    "chip_channel_to_position": {2000: [0, 0]},
    "tile_chip_to_io": {1: {2: 1001}},
    "tile_positions": {1: [0, 0, 0]},
    "tile_orientations": {1: [1, 1, 1]},
    "tile_indeces": {1: [1, 1]},
    "tpc_centers": {1: [0, 0, 0]},
}
OLD_ROUTINE = """
from larpixdaq.routines import Routine

def _named(controller, send_data, send_info, *args):
    return controller, args[0]

registration = {"named": Routine("named", _named, ["chip"])}
"""
CONTROLLER = r"\.state\(\) and \.components\(\)"
SUBSCRIPT = r"a Response is no dictionary with \['message'\]: its result is \.value"
TIMEOUT = r"timeout=None is no argument of it any more; wait with \.result\(timeout=None\)"
ROUTINE = (
    r"unexpected keyword argument 'timeout'; .*time_limit=.* ends the routine, \.result\(timeout=\) ends the waiting"
)


def last(request):
    """Return the last response, as larpix-web takes it."""
    return list(request)[-1]


def layout():
    """Return the path of a pixel layout."""
    path = Path("layout.yaml").absolute()
    path.write_text(yaml.safe_dump(LAYOUT))
    return str(path)


def in_run(daq, step):
    """Take a short run and return the result of one of its steps."""
    results = {name: getattr(daq, name)().result(LIMIT) for name in ("prepare_run", "begin_run", "end_run")}
    return results[step]


#: By route or event of larpix-web: its use, the error (None: it works), and the same as it is written today.
USES = {
    "GET /state": (lambda o: o._controller.request_state(), CONTROLLER, lambda o: o.state().result(LIMIT)),
    "GET /component": (lambda o: o._controller.request_clients(), CONTROLLER, lambda o: o.components().result(LIMIT)),
    "GET /boards": (lambda o: last(o.get_boards())["message"], SUBSCRIPT, lambda o: o.get_boards().result(LIMIT)),
    "POST /boards": (lambda o: last(o.load_board(NETWORK)), None, lambda o: o.load_board(NETWORK).result(LIMIT)),
    "GET /pixels": (
        lambda o: last(o.retrieve_pixel_layout())["message"],
        SUBSCRIPT,
        lambda o: o.retrieve_pixel_layout().result(LIMIT),
    ),
    "POST /pixels": (
        lambda o: last(o.load_pixel_layout(layout()))["message"],
        SUBSCRIPT,
        lambda o: o.load_pixel_layout(layout()).result(LIMIT),
    ),
    "GET /routines": (
        lambda o: json.dumps(last(o.list_routines())),
        r"Object of type Response \(its result is \.value\) is not JSON serializable",
        lambda o: last(o.list_routines()).value,
    ),
    "prepare-run": (
        lambda o: o.prepare_physics_run(timeout=None), TIMEOUT, lambda o: in_run(o, "prepare_run")
    ),
    "start-run": (lambda o: o.begin_physics_run(timeout=None), TIMEOUT, lambda o: in_run(o, "begin_run")),
    "end-run": (lambda o: o.end_physics_run(timeout=None), TIMEOUT, lambda o: in_run(o, "end_run")),
    "run_routine": (
        lambda o: last(o.run_routine("named", CHIP, timeout=None)),
        ROUTINE,
        lambda o: o.run_routine("named", CHIP).result(timeout=LIMIT),
    ),
    "write_config": (
        lambda o: o.write_configuration(CHIP, timeout=None),
        TIMEOUT,
        lambda o: o.write_configuration(CHIP).result(LIMIT),
    ),
    "verify_config": (
        lambda o: o.validate_configuration(CHIP, timeout=None),
        TIMEOUT,
        lambda o: o.validate_configuration(CHIP).result(LIMIT),
    ),
    "retrieve_config": (
        lambda o: o.retrieve_configuration(CHIP, timeout=None),
        TIMEOUT,
        lambda o: o.retrieve_configuration(CHIP).result(LIMIT),
    ),
    "send_config": (
        lambda o: o.send_configuration({CHIP: {"threshold_global": 200}}, timeout=None),
        TIMEOUT,
        lambda o: o.send_configuration({CHIP: {"threshold_global": 200}}).result(LIMIT),
    ),
    "read_config": (
        lambda o: o.read_configuration(CHIP, timeout=None),
        TIMEOUT,
        lambda o: o.read_configuration(CHIP).result(LIMIT),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def daq(line):
    """An Operator with chips and a pixel layout, like the one that larpix-web keeps for a request."""
    (line.folder / "routines").mkdir()
    (line.folder / "routines" / "named.py").write_text(OLD_ROUTINE)
    board = Emulator("--chips", NETWORK, "--asic", "2", "--power-on")
    try:
        line.launch_core()
        line.launch_log()
        operator = line.start("--pacman", *board.addresses, "--asic", "2", "--routines", line.folder / "routines")
        operator.load_board(NETWORK).result(LIMIT)
        operator.configure_network().result(LIMIT)
        operator.load_pixel_layout(layout()).result(LIMIT)
        yield operator
    finally:
        board.close()


def test_they_are_sixteen():
    assert len(USES) == 16


@pytest.mark.parametrize("name", USES)
def test_each_use_works_or_says_what_to_write(name, daq):
    use, error, today = USES[name]
    if error is None:
        assert use(daq).kind == "result"
    else:
        with pytest.raises(Exception, match=error):
            use(daq)
    assert json.dumps(today(daq))


def test_a_response_is_written_into_as_a_dictionary(daq):
    """larpix-web sets id, display and name of each response, and gets None from a wait that has timed out."""
    for response in daq.state():
        with pytest.raises(TypeError, match=r"\['id'\]: its result is \.value"):
            response["id"] = 1
        with pytest.raises(TypeError, match=r"\['message'\]: its result is \.value"):
            response.get("message", None)
        assert response is not None


def test_the_end_of_a_web_request_closes_its_operator(line, daq):
    operator = Operator(line.core)
    operator.cleanup()
    with pytest.raises(NoCore, match="this Operator is closed"):
        operator.state().result()
