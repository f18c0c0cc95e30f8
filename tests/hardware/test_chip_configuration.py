"""Chips configured through the whole system: an Operator, real processes, an emulated PACMAN with chips behind it."""

import h5py
import numpy as np
import pytest
from emulated_board import Emulator
from processes import LIMIT, free_port, until
from system import rows_of, system

from larpixdaq.errors import ControlHeld, RequestError
from larpixdaq.operator import Operator

#: Seconds to configure a network, which writes the chips one after the other.
SLOW = 60.0


@pytest.fixture
def chips(tmp_path):
    """An emulated board with 12 powered chips that are not configured yet, and its board file."""
    network = tmp_path / "network.json"
    board = Emulator("--chips", "12", "--asic", "2", "--power-on", "--revision", "2", "--write-network", str(network))
    board.network = str(network)
    yield board
    board.close()


@pytest.fixture
def setup(line, chips):
    ports = chips.ready["1"]
    return line, line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}")


def bring_up(operator, network):
    assert operator.load_board(network).result(LIMIT)["chips"] == 12
    result = operator.configure_network().result(SLOW)
    assert result["ok"], result


def test_registers_are_written_read_and_compared(setup, chips):
    _, operator = setup
    bring_up(operator, chips.network)
    request = operator.validate_configuration()
    responses = list(request)
    assert any(response.kind == "progress" and response.total == 12 for response in responses)
    result = responses[-1].value
    assert (result["ok"], result["registers"], result["silent"]) == (True, 12 * 237, [])

    key = next(iter(operator.retrieve_configuration().result(LIMIT)))
    sent = operator.send_configuration({"all": {"threshold_global": 40}, key: {"pixel_trim_dac": [7] * 64}})
    assert sent.result(LIMIT) == {"chips": 12, "registers": 12 + 64}
    read = operator.read_configuration(key, ["threshold_global", "pixel_trim_dac", 65]).result(LIMIT)["chips"][key]
    assert (read["threshold_global"], read["pixel_trim_dac"]) == (40, [7] * 64)
    assert operator.validate_configuration().result(LIMIT)["ok"]

    reset = operator.reset(24).result(LIMIT)  # a short reset
    assert reset == {"io_groups": [1], "length": 24, "configuration": {"1": "kept"}}
    confirmed = operator.retrieve_configuration(key, "threshold_global").result(LIMIT)[key]["confirmed"]
    assert confirmed == {"threshold_global": 40}
    assert operator.validate_configuration().result(LIMIT)["ok"]
    assert operator.reset().result(LIMIT)["configuration"] == {"1": "lost"}
    assert not operator.retrieve_configuration(key, "threshold_global").result(LIMIT)[key]["confirmed"]
    assert operator.validate_configuration(key).result(LIMIT)["silent"] == [key]


def test_differences_are_named_and_enforced(setup, chips):
    made, operator = setup
    bring_up(operator, chips.network)
    keys = list(operator.retrieve_configuration().result(LIMIT))
    # The next producer does not know of this change, as if another system had made it.
    operator.send_configuration({keys[3]: {"threshold_global": 99}}).result(LIMIT)
    made.processes["producer"].kill()
    until(
        lambda: not any(c["alive"] for c in operator.components().result(LIMIT) if c["kind"] == "producer"), "its loss"
    )
    made.restart("producer")
    made.await_kinds(operator, "producer")
    operator.load_board(chips.network).result(LIMIT)
    result = operator.validate_configuration().result(LIMIT)
    assert not result["ok"]
    assert result["differences"] == [
        {"chip": keys[3], "register": "threshold_global", "address": 64, "expected": 255, "found": 99}
    ]
    result = operator.enforce_configuration().result(LIMIT)
    assert (result["ok"], result["written"]) == (True, 1)


def test_words_sent_in_a_run_are_rows_before_their_answers(setup, chips):
    _, operator = setup
    bring_up(operator, chips.network)
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    assert operator.validate_configuration().result(LIMIT)["ok"]
    ended = operator.end_run().result(SLOW)
    assert ended["condition"] == "COMPLETE", ended
    rows = rows_of(ended["files"][0])
    sent = rows[(rows["packet_type"] == 3) & (rows["direction"] == 0)]
    answers = rows[(rows["packet_type"] == 3) & (rows["direction"] == 1)]
    assert len(sent) == len(answers) == 12 * 237
    names = ["io_group", "io_channel", "chip_id", "register_address"]
    order = {tuple(row): at for at, row in enumerate(rows[rows["packet_type"] == 3][names].tolist())}
    assert len(order) == 12 * 237
    at_of = {}
    for at, row in enumerate(rows):
        if row["packet_type"] == 3:
            at_of.setdefault(tuple(row[names].tolist()), []).append((at, int(row["direction"])))
    assert all([way for _, way in sorted(found)] == [0, 1] for found in at_of.values())
    with h5py.File(ended["files"][0]) as file:
        counts = file["ledger/counts"][:]
    assert counts["sent_rows"][counts["io_group"] == 1].sum() == len(sent)


ROUTINE = """
from larpixdaq.routines import Routine

def _thresholds(controller, send_data, send_info, value):
    key = list(controller.chips)[0]
    controller[key].config.threshold_global = value
    controller.write_configuration(key, "threshold_global")
    ok, diff = controller.verify_configuration([key], timeout=0.3)
    return controller, [str(key), ok, str(diff), controller.io.ping(), controller.io.get_vddd(io_group=1)]

def _waits(controller, send_data, send_info):
    send_info("waiting")
    while True:
        pass

def _old(controller, send_data, send_info, *args):
    controller.run(0.05, "old")
    controller.reads[-1].extract("adc_counts", chip_key=args[0])
    return controller, "success"

registration = {
    "thresholds": Routine("thresholds", _thresholds, ["value"]),
    "waits": Routine("waits", _waits, []),
    "old": Routine("old", _old, ["chip"]),
}
"""


def test_a_routines_controller_reads_and_writes_and_its_values_stay(tmp_path, line, chips):
    routines = tmp_path / "routines"
    routines.mkdir()
    (routines / "mine.py").write_text(ROUTINE)
    ports = chips.ready["1"]
    pacman = ("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--pacman-revision", "2")
    operator = line.start(*pacman, "--routines", str(routines))
    bring_up(operator, chips.network)
    key, ok, diff, ping, vddd = operator.run_routine("thresholds", 55).result(SLOW)
    assert (ok, diff, ping, vddd) == (True, "{}", {1: True}, [1800, 50.0])
    found = operator.read_configuration(key, "threshold_global").result(LIMIT)["chips"]
    assert found == {key: {"threshold_global": 55}}
    with pytest.raises(RequestError, match=r"packets have no 'adc_counts' \(today: dataword\)\n") as caught:
        operator.run_routine("old", key).result(LIMIT)
    assert "Did you mean" not in str(caught.value).splitlines()[0]

    # The time limit ends the child; the next child knows board and values.
    request = operator.call("LArPix board", "run_routine", name="waits", args=[], kwargs={}, time_limit=0.5)
    with pytest.raises(RequestError, match="stopped at its time limit"):
        request.result(SLOW)
    known = operator.retrieve_configuration(key, "threshold_global").result(LIMIT)
    assert known == {key: {"wanted": {"threshold_global": 55}, "confirmed": {"threshold_global": 55}}}
    assert operator.validate_configuration().result(SLOW)["ok"]


NETWORK_OF_A_ROUTINE = """
from larpixdaq.routines import Routine

def _sync(controller, send_data, send_info):
    key = list(controller.chips)[-1]
    chip = controller[key]
    chip.config.enable_external_sync = 1
    controller.write_configuration(key, "enable_external_sync")
    return controller, [str(key), type(chip.config).__name__, *controller.verify_configuration([key], timeout=0.5)]

def _strange(controller, send_data, send_info):
    from larpix import Chip
    controller.chips[list(controller.chips)[0]].config = Chip("1-1-1", version="2b").config
    return controller, None

registration = {"sync": Routine("sync", _sync, []), "strange": Routine("strange", _strange, [])}
"""


def test_v2d_chips_get_the_magic_word_from_the_operator_and_from_routines(tmp_path, line):
    """The emulated chips take no other configuration words."""
    (tmp_path / "routines").mkdir()
    (tmp_path / "routines/mine.py").write_text(NETWORK_OF_A_ROUTINE)
    network = tmp_path / "network.json"
    board = Emulator("--chips", "12", "--asic", "2d", "--power-on", "--write-network", str(network))
    try:
        ports = board.ready["1"]
        pacman = ("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--asic", "2d")
        operator = line.start(*pacman, "--routines", str(tmp_path / "routines"))
        other = tmp_path / "other.json"
        other.write_text(network.read_text().replace('"2d"', '"2b"'))
        with pytest.raises(RequestError, match="asic_version is 2b, this producer has --asic 2d"):
            operator.load_board(str(other)).result(LIMIT)
        bring_up(operator, str(network))
        operator.send_configuration({"all": {"enable_external_trigger": 1}}).result(LIMIT)
        result = operator.validate_configuration().result(SLOW)
        assert (result["ok"], result["registers"], result["without_magic"]) == (True, 12 * 256, 0), result
        key, config, ok, different = operator.run_routine("sync").result(SLOW)
        assert (config, ok, different) == ("Configuration_v2d", True, {})
        names = ["enable_external_trigger", "enable_external_sync"]
        wanted = operator.retrieve_configuration(key, names).result(LIMIT)[key]["wanted"]
        assert (wanted["enable_external_trigger"], wanted["enable_external_sync"]) == (1, 1)
        with pytest.raises(RequestError, match=r"expected a configuration of v2d chips .* found Configuration_v2b"):
            operator.run_routine("strange").result(SLOW)
        assert operator.validate_configuration().result(SLOW)["ok"]
    finally:
        board.close()


def test_boards_report_their_status(setup):
    _, operator = setup
    with pytest.raises(RequestError, match=r"no chips are known yet: load_board\(file\) loads them"):
        operator.validate_configuration().result(LIMIT)
    assert operator.ping().result(LIMIT) == {"1": True}
    (status,) = operator.board_status().result(LIMIT)
    assert (status["answers"], status["clock_locked"], status["heartbeat_s"]) == (True, True, 10.0)
    assert (status["revision"], status["supplies"]) == (None, [])  # not configured, and not readable
    with pytest.raises(RequestError, match=r"its revision is not known, .* --pacman-revision 1=N"):
        operator.power(True, tiles=0, vdda_dac=46_020).result(LIMIT)
    (status,) = operator.power(False).result(LIMIT)
    assert (status["tiles"], status["analog_power"]) == ([], False)
    (status,) = operator.power(True, tiles=[0, 2]).result(LIMIT)
    assert (status["tiles"], status["analog_power"]) == ([0, 2], True)
    clocks = operator.set_uart_clock(5, io_channel=[1, 2]).result(LIMIT)
    assert clocks == {"ratio": 5, "io_groups": {"1": {"1": 5, "2": 5}}}
    assert operator.get_boards().result(LIMIT)["boards"][0]["kind"] == "pacman"


def test_boards_of_all_revisions_are_powered_in_one_system(tmp_path):
    """The board of revision 4 sleeps 2 s while its tile is read."""
    dacs = {"2": (54_691, 54_691), "3": (46_020, 40_605), "4": (46_500, None), "5": (48_092, 32_838)}
    boards = [Emulator("--chips", "4", "--revision", revision) for revision in dacs]
    try:
        addresses = [
            f"{revision}={one.addresses[0].partition('=')[2]}" for revision, one in zip(dacs, boards, strict=True)
        ]
        with system(tmp_path) as made:
            made.launch_core()
            made.launch_producer("--pacman", *addresses, "--pacman-revision", "2=2", "3=3", "4=4")
            operator = made.operator()
            made.await_kinds(operator, "producer")
            for revision, (vdda, vddd) in dacs.items():
                request = operator.power(True, tiles=0, vdda_dac=vdda, vddd_dac=vddd, io_group=int(revision))
                (status,) = request.result(LIMIT)
                assert (status["revision"], status["tiles"]) == (int(revision), [0])
                (supply,) = status["supplies"]
                assert supply["vdda_mv"] == pytest.approx(vdda / (30_384 if revision == "2" else 25_700) * 1000, abs=4)
    finally:
        for one in boards:
            one.close()


@pytest.mark.parametrize(
    ("action", "params", "says"),
    [
        ("read_configuration", {"chip": "1-1"}, "chip '1-1': expected a chip key"),
        ("read_configuration", {"chip": "1-1-900"}, "chip '1-1-900': expected a chip key"),
        ("read_configuration", {"chip": "7-1-2"}, "chip 7-1-2: no board of io_group 7 takes commands here"),
        ("read_configuration", {"chip": "1-1-2", "registers": "gain"}, "register 'gain': v2 chips have none"),
        ("read_configuration", {"chip": "1-1-2", "registers": 999}, "register 999: expected a name or an address"),
        ("read_configuration", {"chip": 5}, "chip: expected a chip key, a list of them, or None for all, found 5"),
        (
            "read_configuration",
            {"chips": "1-1-2"},
            "got an unexpected keyword argument 'chips'; expected read_configuration(chip=None, registers=None)",
        ),
        ("list_routines", {"x" * 100_000: 1}, "; expected list_routines()"),
        ("load_routines", {"directory": 3}, "load_routines: expected the name of a directory, found 3"),
        ("run_routine", {"name": "no"}, "no routine 'no'; there are calibrate, discover_network, gain, hello_world"),
        ("read_configuration", {"chip": "1-1-2"}, "chip 1-1-2: no answer"),
        ("send_configuration", {"updates": 3}, "send_configuration: expected {chip: {register: value}}"),
        ("send_configuration", {}, "missing a required argument: 'updates'"),
        (
            "send_configuration",
            {"updates": {"1-1-2": {"threshold_global": 999}}},
            "chip 1-1-2: register threshold_global",
        ),
        ("send_configuration", {"updates": {"1-1-2": {None: 3}}}, "chip 1-1-2: register None: expected a name or an"),
        ("send_configuration", {"updates": {"1-1-2": {"gain": 3}}}, "chip 1-1-2: register 'gain': v2 chips have none"),
        ("load_board", {"file": "nothing.json"}, "board file nothing.json: "),
        ("load_board", {"file": "io/pacman.json"}, "board file io/pacman.json: "),
        ("load_board", {"file": "controller/pcb-1_chip_info.json"}, "asic_version is 1, this producer has --asic 2"),
        ("load_board", {"file": 3}, "load_board: expected the name of a board file, found 3"),
        ("configure_network", {}, "configure_network: load_board(file) first"),
        ("power", {"on": "yes"}, "power: on: expected True or False"),
        (
            "power",
            {"on": True, "tiles": []},
            "power: tiles: expected one or more whole numbers, found none",
        ),
        (
            "set_uart_clock",
            {"ratio": 2, "io_channel": 34},
            "io_channel: boards of revision 5 have UART registers of 1 to 33, found 34",
        ),
        ("ping", {"io_group": []}, "ping: io_group: expected a number, a list, or None for all (1), found none"),
        ("set_uart_clock", {"ratio": 0}, "set_uart_clock: ratio: expected a whole number from 1 to 255, found 0"),
        ("board_status", {"io_group": 3}, "io_group 3: no such board takes commands here; those that do: 1"),
    ],
)
def test_bad_requests_are_refused_in_one_line_with_the_reason(one_board, action, params, says):
    with pytest.raises(RequestError) as raised:
        one_board.call("LArPix board", action, **params).result(LIMIT)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert one_board.ping().result(LIMIT) == {"1": True}


@pytest.fixture(scope="module")
def one_board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    board = Emulator("--chips", "2", "--power-on")
    try:
        ports = board.ready["1"]
        with system(folder) as made:
            yield made.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}")
    finally:
        board.close()


def test_only_the_operator_in_control_changes_chips(one_board):
    one_board.take_control().result(LIMIT)
    with Operator(one_board._connection.link.core) as other:
        for action in (
            "read_configuration",
            "write_configuration",
            "reset",
            "power",
            "load_board",
            "send_configuration",
        ):
            with pytest.raises(ControlHeld):
                other.call("LArPix board", action).result(LIMIT)
        assert other.ping().result(LIMIT) == {"1": True}


def test_a_silent_command_port_is_reported_and_data_continue(line):
    """The board's data port sends, but its command port does not answer."""
    board = Emulator("--rate", "500")
    try:
        ports = board.ready["1"]
        silent = free_port()
        operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{silent}")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        for _ in range(2):
            with pytest.raises(RequestError) as raised:
                operator.ping().result(LIMIT)
            assert f"PACMAN io_group 1, command port tcp://127.0.0.1:{silent}: no answer within 2 s" in str(
                raised.value
            )
        before = line.status_of(operator, "producer")["packets"]
        until(lambda: line.status_of(operator, "producer")["packets"] > before, "further data")
        board.stop()
        board.finish()
        ended = operator.end_run().result(SLOW)
        assert ended["condition"].startswith("COMPLETE")
        rows = rows_of(ended["files"][0])
        assert np.count_nonzero(rows["packet_type"] == 0) > before
    finally:
        board.close()
