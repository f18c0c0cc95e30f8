"""Power, DACs, resets and clocks of PACMAN boards of each revision, on models of their command servers' registers."""

import pytest
from pacman_server_models import MODELS, WORD, Boards, Crash

from larpixdaq.errors import RequestError
from larpixdaq.hardware import power as power_module
from larpixdaq.hardware.actions import BoardActions
from larpixdaq.hardware.pacman_registers import REVISIONS
from larpixdaq.hardware.producer_link import BoardError
from larpixdaq.schema import Asic
from larpixdaq.sources import command_channel

#: Usual DAC settings of each revision.
DACS = {2: (54_691, 54_691), 3: (46_020, 40_605), 4: (46_500, 28_500), 5: (48_092, 32_838)}


@pytest.fixture
def pauses(monkeypatch):
    """Record the pauses between steps instead of making them."""
    made = []
    monkeypatch.setattr(power_module.time, "sleep", made.append)
    return made


def board(revision, configured=None, *, firmware=0, generation=Asic.V2):
    model = MODELS[revision](firmware)
    link = Boards({1: model}, {1: revision if configured is None else configured}, generation)
    return model, BoardActions(link, link.invalidate, power_module.no_progress), link


def test_options_and_tables_name_the_same_revisions():
    assert tuple(REVISIONS) == command_channel.REVISIONS


@pytest.mark.parametrize("revision", [2, 3, 4, 5])
def test_power_reaches_the_dacs_and_the_enable_of_the_tile_that_was_asked_for(revision, pauses):
    vdda, vddd = DACS[revision]
    tile = 0 if revision == 2 else 2
    model, actions, link = board(revision)
    (status,) = actions.power(True, tiles=[tile], vdda_dac=vdda, vddd_dac=vddd)
    assert {place: dac for place, dac in model.dac.items() if dac} == {("A", tile): vdda, ("D", tile): vddd}
    assert model.fpga[0x10] == 1 << tile
    assert status["tiles"] == [tile]
    (supply,) = status["supplies"]
    assert supply["tile"] == tile
    assert supply["vdda_mv"] == pytest.approx(model.mv("A", tile), abs=4)
    assert supply["vddd_mv"] == pytest.approx(model.mv("D", tile), abs=4)
    assert link.invalidated
    (status,) = actions.power(False)
    assert (status["tiles"], status["analog_power"], model.fpga[0x10], model.fpga[0x14]) == ([], False, 0, 0)


def test_currents_are_in_ma_where_their_unit_is_known(pauses):
    found = {}
    for revision in MODELS:
        _, actions, _ = board(revision)
        actions.power(True, tiles=0)
        (status,) = actions.board_status()
        found[revision] = {
            name: value for name, value in status["supplies"][0].items() if name.endswith(("_ma", "_uv"))
        }
        assert bool(status["doubts"]) == (revision != 2)
        if revision == 2:
            assert (status["vplus_mv"], status["vplus_ma"]) == (12_000, 500)
        if revision == 4:
            assert status["supplies"][0]["vddd_mv"] == -1  # the server says 7999
    assert found == {
        2: {"vdda_ma": 150, "vddd_ma": -50},
        3: {"vdda_shunt_uv": 400, "vddd_shunt_uv": 400},
        4: {"vdda_ma": -5, "vddd_ma": 400},
        5: {"vdda_ma": 100, "vddd_ma": 200},
    }


def test_without_a_revision_no_dac_is_written_and_no_voltage_shown(pauses):
    for revision in (2, 3, 4):
        model, actions, _ = board(revision, 0)
        with pytest.raises(RequestError, match=r"its revision is not known, .* --pacman-revision 1=N"):
            actions.power(True, tiles=0, vdda_dac=54_691)
        with pytest.raises(RequestError, match="revision is not known"):
            actions.orders.set_vdda(54_691, io_group=1)
        with pytest.raises(RequestError, match="revision is not known"):
            actions.orders.set_reg(0x24010, 54_691, io_group=1)
        with pytest.raises(RequestError, match="revision is not known"):
            actions.orders.get_vddd(io_group=1)
        assert model.writes == []
        (status,) = actions.power(True, tiles=0)  # the registers that all revisions have
        assert (status["revision"], status["tiles"], status["supplies"]) == (None, [0], [])
        assert "revision is not known" in status["doubts"][0]
        assert all(register < 0x24000 for register, _ in model.writes)


def test_the_revision_is_read_if_the_server_has_it_and_a_wrong_one_is_refused(pauses):
    model, actions, _ = board(5, 0)
    assert actions.board_status()[0]["revision"] == 5
    actions.power(True, tiles=9, vdda_dac=48_092)
    assert model.dac["A", 9] == 48_092
    for revision, configured in ((5, 4), (3, 5)):
        model, actions, _ = board(revision, configured)
        with pytest.raises(BoardError, match=f"its revision is {configured} by --pacman-revision, but its register"):
            actions.power(True, tiles=0, vdda_dac=40_000)
        assert model.writes == []
        (status,) = actions.board_status()
        assert (status["revision"], status["supplies"]) == (None, [])
        assert "0x24220 reads" in status["doubts"][0]
        model.fpga[0x10] = model.fpga[0x14] = 1
        actions.power(False)  # switching off works nevertheless
        assert model.fpga[0x10] == model.fpga[0x14] == 0


def test_a_dac_that_reads_back_another_value_fails_and_the_tile_is_off(pauses):
    model, actions, _ = board(3)
    model.i2c_broken = True  # writes are echoed nevertheless
    with pytest.raises(
        BoardError, match=r"tile 4: vddd DAC: set to 40605, reads back 0x00000000; the tile was switched off"
    ):
        actions.power(True, tiles=4, vddd_dac=40_605)
    assert model.fpga[0x10] == 0


@pytest.mark.parametrize("revision", [2, 4, 5])
def test_a_voltage_that_does_not_fit_the_dac_fails_and_the_tile_is_off(revision, pauses):
    """These boards cannot read back DACs."""
    model, actions, _ = board(revision)
    model.i2c_broken = True
    with pytest.raises(BoardError, match=r"tile 0: vdda is 0 mV with DAC \d+, expected 1\d\d\d mV .* switched off"):
        actions.power(True, tiles=0, vdda_dac=DACS[revision][0])
    assert model.fpga[0x10] == 0


def test_an_enable_that_reads_back_another_value_fails(pauses):
    model, actions, _ = board(4)
    model.stuck = {0x10: 1}
    with pytest.raises(BoardError, match=r"tiles \(register 0x10\): set to 0x4, reads back 0x1"):
        actions.power(True, tiles=2)
    model.stuck = {0x14: 0}
    with pytest.raises(BoardError, match=r"analog power \(register 0x14\): set to 1, reads back 0"):
        actions.power(True, tiles=2)


def test_a_ramp_switches_tiles_on_at_0_v_and_raises_them_one_by_one(pauses):
    model, actions, _ = board(4)
    actions.power(True, tiles=[1, 3], vdda_dac=2_500, vddd_dac=1_200, ramp=True)
    steps = [(f"0x{register:x}", value) for register, value in model.writes if register != 0x14]
    assert steps == [
        ("0x24021", 0), ("0x24011", 0), ("0x10", 0b10),
        ("0x24011", 1000), ("0x24011", 2000), ("0x24011", 2500), ("0x24021", 1000), ("0x24021", 1200),
        ("0x24023", 0), ("0x24013", 0), ("0x10", 0b1010),
        ("0x24013", 1000), ("0x24013", 2000), ("0x24013", 2500), ("0x24023", 1000), ("0x24023", 1200),
    ]  # fmt: skip
    assert len(pauses) == 2 * (3 + 5)
    with pytest.raises(RequestError, match="ramp: tile 1 is on already"):
        actions.power(True, tiles=[1, 2], vdda_dac=2_500, ramp=True)


def test_the_time_limit_of_a_request_includes_the_sleep_of_the_board(pauses):
    """rev4 sleeps 1 s in each read of VDDD or IDDD; Boards.ask() compares. Tiles are read one after the other."""
    models = {1: MODELS[4](), 2: MODELS[4]()}
    link = Boards(models, {1: 4, 2: 4})
    actions = BoardActions(link, link.invalidate, power_module.no_progress)
    actions.power(True)
    assert models[1].slept == models[2].slept == 16
    assert max(seconds for _, _, seconds in link.requests) == 2
    assert actions.orders.get_reg(0x24042, io_group=1) >= 0
    slept = models[1].slept
    assert actions.board_status(supplies=False)[0]["supplies"] == []
    assert models[1].slept == slept


def test_time_limits_of_channels_grow_with_the_time_that_a_board_needs():
    from larpixdaq.sources.command_channel import HostLookup
    from larpixdaq.sources.pacman import PacmanChannel

    line = PacmanChannel(1, HostLookup("127.0.0.1"), 1)
    try:
        due = []
        for seconds in (0.0, 16.0):
            line.send_raw(bytes(16), seconds)
            due.append(line.due())
        assert 15 < due[1] - due[0] < 17
    finally:
        line.close()


def test_words_for_chips_are_refused_by_a_firmware_that_numbers_io_channels_in_another_way():
    import numpy as np

    from larpixdaq.sources.command_channel import HostLookup
    from larpixdaq.sources.pacman import PacmanChannel

    line = PacmanChannel(1, HostLookup("127.0.0.1"), 1)
    try:
        for version, refused in (([4, 0, 0x10242024, 0x10242024], True), ([894] * 4, False)):
            answer = b"".join(WORD.pack(b"R", 4 * at, value) for at, value in enumerate(version))
            line.firmware(answer)
            line.send_words(np.ones(1, np.uint8), np.ones(1, np.uint64))
            reply = line.take()
            assert (reply is not None) == refused
            assert not refused or "firmware (uci_rev5) numbers io_channels in another way" in reply.error
    finally:
        line.close()


def test_registers_that_crash_servers_or_set_dacs_are_refused(pauses):
    model, actions, _ = board(4)
    for ask in (
        lambda: actions.orders.get_reg(0x25000, io_group=1),
        lambda: actions.orders.set_reg(0x25000, 1, io_group=1),
    ):
        with pytest.raises(RequestError, match="register 0x25000: the board's registers end at 0x24fff"):
            ask()
    with pytest.raises(Crash):
        model.word(b"R" + bytes(3) + (0x25000).to_bytes(4, "little") + bytes(8))
    model, actions, _ = board(5)
    with pytest.raises(RequestError, match="UART registers of 1 to 33, found 34"):  # 0x24010 is VDDA of tile 0
        actions.set_uart_clock(2, io_channel=34)
    actions.set_uart_clock(2)
    assert not any(model.dac.values())
    assert actions.orders.capacity([(1, 34), (1, 40)]) == pytest.approx([5e6 / 66] * 2)  # the value at power-up
    _, actions, _ = board(2)
    assert list(actions.set_uart_clock(2)["io_groups"]["1"]) == ["1", "2", "3", "4"]
    with pytest.raises(RequestError, match="boards of revision 2 have UART registers of 1 to 4, found 5"):
        actions.set_uart_clock(2, io_channel=5)


def test_a_clock_ratio_that_reads_back_another_value_fails(pauses):
    model, actions, _ = board(4)
    model.stuck = {0x5010: 10}
    with pytest.raises(BoardError, match=r"clock ratio 2: 1 of 32 io_channels read back something else: 3 \(10\)"):
        actions.set_uart_clock(2)
    with pytest.raises(BoardError, match=r"3 \(10\)"):
        actions.orders.set_uart_clock_ratio(3, 2, io_group=1)


def test_the_capacity_of_a_line_follows_the_clock_of_the_revision(pauses):
    for revision, ratio, bits in ((2, 2, 5e6), (4, 5, 10e6), (4, 10, 5e6), (5, 1, 10e6), (3, 2, 5e6), (3, 10, 5e6)):
        _, actions, _ = board(revision)
        actions.set_uart_clock(ratio)
        assert actions.orders.capacity([(1, 2)]) == pytest.approx([bits / 66])


@pytest.mark.parametrize(
    ("generation", "length", "configuration"),
    [
        (Asic.V2, 10, "kept"), (Asic.V2, 24, "kept"), (Asic.V2, 100, "not known"), (Asic.V2, 256, "lost"),
        (Asic.V3, 15, "kept"), (Asic.V3, 30, "kept"), (Asic.V3, 31, "lost"), (Asic.V1, 256, "not known"),
    ],
)  # fmt: skip
def test_a_reset_reports_whether_the_configuration_is_kept(generation, length, configuration, pauses):
    model, actions, link = board(4, generation=generation)
    assert actions.reset(length)["configuration"] == {"1": configuration}
    assert model.writes == [(0x1014, length), (0x1010, 6), (0x1010, 2)]
    assert bool(link.invalidated) == (configuration != "kept")
    assert pauses == [length / 10e6]  # until the reset is over


def test_resets_without_effect_or_refused_by_the_board_fail(pauses):
    model, actions, _ = board(4, generation=Asic.V3)
    with pytest.raises(RequestError, match="length 10: chips ignore a reset below 15 ticks"):
        actions.reset(10)
    assert model.writes == []
    model.stuck = {0x1014: 256}
    with pytest.raises(BoardError, match="length of a reset: set to 1000, reads back 256"):
        actions.reset(1000)


def test_module_2_firmware_gets_its_tile_clocks_and_receivers_switched_on(pauses):
    model, actions, _ = board(4, firmware=894)
    (status,) = actions.power(True, tiles=1)
    assert (model.fpga[0x10], model.fpga[0x18], status["tiles"]) == (0x302, 0xF0, [1])
    (status,) = actions.power(False, tiles=1)
    assert (model.fpga[0x10], model.fpga[0x14], status["tiles"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"on": True, "tiles": 8}, "tiles: a board of revision 4 has 0 to 7, found 8"),
        ({"on": True, "tiles": 10}, "power: tiles: expected a whole number from 0 to 9, found 10"),
        ({"on": True, "vdda_dac": 1 << 16}, "vdda_dac: expected a whole number from 0 to 65535"),
        ({"on": True, "ramp": 1}, "ramp: expected True or False"),
        ({"on": True, "ramp": True}, "ramp: expected vdda_dac or vddd_dac"),
        ({"on": False, "vdda_dac": 0}, "vdda_dac: only with on=True"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(params, says, pauses):
    model, actions, _ = board(4)
    with pytest.raises(RequestError) as raised:
        actions.power(**params)
    assert says in str(raised.value)
    assert model.writes == []
