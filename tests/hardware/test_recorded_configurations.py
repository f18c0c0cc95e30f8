"""Configurations of chips in the file: before the data, after changes, in every part, and after a recovery."""

import h5py
import numpy as np
import pytest
from emulated_board import Emulator
from file_builder import V2, Feed, random_rows, run_info
from larpix.format import hdf5format
from processes import LIMIT
from system import rows_of, system

from larpixdaq.errors import ProtocolError, RequestError
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hdf5 import repair
from larpixdaq.hdf5.layout import OLD_INFO
from larpixdaq.hdf5.recovery import recover
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.tables import configurations_of_part
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import READ, REGISTERS, SENT, Block, Configurations

SLOW = 60.0
ROUTINE = """
from larpixdaq.routines import Routine

def _lost(controller, send_data, send_info):
    controller["1-1-12"].config.threshold_global = 77
    controller.write_configuration("1-1-12", "threshold_global")
    send_info("written")
    while True:
        pass

registration = {"lost": Routine("lost", _lost, [])}
"""


def configured(*chips, asic="2", threshold=30, known=SENT | READ):
    """Return configurations of chips of io_channel 1, all registers sent and read, register 70 with another value."""
    registers = ChipRegisters(asic)
    arrays = np.zeros((3, len(chips), REGISTERS), np.uint8)
    arrays[:2, :, : registers.count] = registers.defaults
    arrays[:2, :, 64] = threshold
    arrays[1, :, 70] += 1
    arrays[2, :, : registers.count] = known
    return Configurations(asic, np.array([(1, 1, chip) for chip in chips], np.uint8), *arrays)


def configuration_block(feed, configs):
    block, rows = feed.info(configs.text())
    return Block(*(getattr(block, name) for name in Block.__struct_fields__[:-1]), configs=configs.pack()), rows


def rows(n):
    return random_rows(np.random.default_rng(n), n)


def table(path):
    with h5py.File(path, "r", swmr=True) as file:
        return file["run/configs"][:], file["configs"][:]


@pytest.mark.parametrize("asic", ["2", "2b"])
def test_larpix_control_reads_the_configurations_that_fit(tmp_path, asic):
    feed, file = Feed(), RunFile(tmp_path, run_info(V2, asic_version=asic))
    other = {"2": "2b", "2b": "2"}[asic]
    file.add(*configuration_block(feed, configured(11, 12, asic=asic)))
    file.add(*configuration_block(feed, configured(13, asic=other)))  # another generation in the same run
    half = configured(14, asic=asic)
    half.known[0, 64] = 0  # a register without a known value
    file.add(*configuration_block(feed, half))
    file.add(*feed.block(rows(100)))
    file.end(feed.end())
    path = file.close().path
    assert verify(path).ok, verify(path).findings
    all_, fitting = table(path)
    assert all_["chip_id"].tolist() == [11, 12, 13, 14]
    assert all_["different"].tolist() == [1] * 4
    assert fitting["chip_id"].tolist() == [11, 12]
    chips = hdf5format.from_file(str(path), load_configs=True)["configs"]
    assert [(str(chip.chip_key), chip.config.threshold_global) for chip in chips] == [("1-1-11", 30), ("1-1-12", 30)]
    assert file_info(path)["chips"] == {
        "number": 4,
        "sent": int(np.count_nonzero(all_["known"] & SENT)),
        "read": int(np.count_nonzero(all_["known"] & READ)),
        "different": 4,
    }


@pytest.mark.parametrize("asic", ["2d", "lightpix-1"])
def test_files_of_generations_that_larpix_control_names_otherwise_are_read_by_it(tmp_path, asic):
    """It knows no 2d, so that their configurations are only in /run/configs."""
    feed, file = Feed(), RunFile(tmp_path, run_info(V2, asic_version=asic))
    file.add(*configuration_block(feed, configured(11, asic=asic)))
    file.add(*feed.block(rows(100)))
    file.end(feed.end())
    path = file.close().path
    assert verify(path).ok, verify(path).findings
    all_, _ = table(path)
    assert (all_["chip_id"].tolist(), set(all_["asic"].tolist())) == ([11], {asic.encode()})
    found = hdf5format.from_file(str(path), load_configs=True)
    assert [str(chip.chip_key) for chip in found["configs"]] == ([] if asic == "2d" else ["1-1-11"])


def test_every_part_begins_with_the_known_configurations(tmp_path):
    feed, second = Feed(), Feed(producer="second")
    first = RunFile(tmp_path, run_info())
    first.add(*configuration_block(feed, configured(11, 12)))
    first.add(*configuration_block(second, configured(13)))
    first.add(*feed.block(rows(70_000 // 5)))
    first.add(*configuration_block(feed, configured(12, threshold=40)))  # not yet written when the next part begins
    after = RunFile(tmp_path, run_info(), 1, first.positions(), configurations=first.configurations())
    first.seal(continued=True)
    first.publish()
    configs, fitting = table(after.path)
    assert configs["chip_id"].tolist() == fitting["chip_id"].tolist() == [11, 13, 12]
    assert configs["sent"][:, 64].tolist() == [30, 30, 40]
    assert len(set(configs["producer"].tolist())) == 2
    after.add(*feed.block(rows(10)))
    after.end(feed.end())
    after.end(second.end())
    after.work(pressed=True)
    after.abandon()
    path = recover(after.path).path
    assert verify(path).ok, verify(path).findings
    for mine, before in zip(table(path), (configs, fitting), strict=True):
        np.testing.assert_array_equal(mine, before)


@pytest.mark.parametrize("written", [True, False], ids=["in the file", "in the journal"])
def test_configurations_survive_a_killed_writer(tmp_path, written):
    feed, file = Feed(), RunFile(tmp_path, run_info())
    file.add(*configuration_block(feed, configured(11, 12)))
    if written:
        for _ in range(5):
            file.add(*feed.block(rows(16_384)))
    file.add(*configuration_block(feed, configured(12, 13, threshold=40)))
    file.end(feed.end())
    file.work(pressed=True)
    file.abandon()
    before = configurations_of_part(file.path)
    assert before.rows["chip_id"].tolist() == [11, 12, 13]
    assert before.rows["sent"][:, 64].tolist() == [30, 40, 40]
    path = recover(file.path).path
    configs, fitting = table(path)
    assert configs["chip_id"].tolist() == fitting["chip_id"].tolist() == [11, 12, 12, 13]
    np.testing.assert_array_equal(
        configurations_of_part(path).rows, before.rows
    )  # for the next part, without a journal
    assert verify(path).ok, verify(path).findings


def test_a_file_of_an_earlier_version_has_no_configurations_and_is_valid(tmp_path):
    """Files of a version without /run/configs, /run/sources and live times can be recovered and verified."""
    feed, file = Feed(), RunFile(tmp_path, run_info())
    file.add(*feed.block(rows(100)))
    file.end(feed.end())
    file.work(pressed=True)
    file.abandon()
    repair.repair_superblock(file.path)
    with h5py.File(file.path, "r+", libver="v110") as plain:
        row = plain["run/info"][:]
        del plain["run/configs"], plain["run/sources"], plain["run/info"], plain["run/checksums"]
        plain["run/info"] = row[list(OLD_INFO.names)].astype(OLD_INFO)
        plain.create_dataset("run/checksums", shape=(14,), dtype=[("name", "S32"), ("rows", "<u8"), ("crc32", "<u4")])
    assert not len(configurations_of_part(file.path).rows)
    path = recover(file.path).path
    assert verify(path).ok, verify(path).findings
    assert file_info(path)["chips"]["number"] == 0


def test_a_block_with_invalid_configurations_is_refused(tmp_path):
    feed, file = Feed(), RunFile(tmp_path, run_info())
    block, message = configuration_block(feed, configured(11))
    fields = {name: getattr(block, name) for name in Block.__struct_fields__}
    wrong = Block(**fields | {"configs": type(block.configs)("2", b"\1\1", b"")})
    with pytest.raises(ProtocolError, match="expected 1 to 256 chips of 3 bytes, found 2 bytes"):
        file.add(wrong, message)
    with pytest.raises(ProtocolError, match="configurations belong to a text"):
        file.add(Block(**fields | {"text": None}), message)
    file.add(block, message)
    file.abandon()


def test_sent_and_read_registers_are_in_the_file_before_the_data(tmp_path):
    network, routines = tmp_path / "network.json", tmp_path / "routines"
    (tmp_path / "system").mkdir()
    routines.mkdir()
    (routines / "lost.py").write_text(ROUTINE)
    stuck = "1-1-13:64.0=1"
    board = Emulator(
        "--chips", "12", "--asic", "2b", "--power-on", "--write-network", str(network), "--stuck-bits", stuck
    )
    ports = board.ready["1"]
    try:
        with system(tmp_path / "system") as made:
            where = f"127.0.0.1:{ports['data']}:{ports['command']}"
            operator = made.start("--asic", "2b", "--routines", str(routines), "--pacman", where)
            operator.power(True).result(LIMIT)
            operator.load_board(str(network)).result(LIMIT)
            assert operator.configure_network().result(SLOW)["ok"]
            operator.write_configuration().result(LIMIT)
            operator.send_configuration({"all": {"threshold_global": 50}}).result(LIMIT)
            assert operator.validate_configuration().result(SLOW)["different"] == 1
            prepared = operator.prepare_run(comment="cosmics").result(LIMIT)
            assert prepared["warnings"] == ["LArPix board: chip 1-1-13 register 64 was told 50 and says 51"]
            operator.begin_run().result(LIMIT)
            operator.send_configuration({"1-1-11": {"threshold_global": 60}}).result(LIMIT)
            lost = operator.run_routine("lost")
            assert next(r for r in lost if r.kind == "progress").text == "written"
            operator.abort_routine().result(LIMIT)
            with pytest.raises(RequestError, match="aborted by the operator"):
                lost.result(LIMIT)
            known = operator.retrieve_configuration("1-1-12", "threshold_global").result(LIMIT)["1-1-12"]
            assert known == {"wanted": {"threshold_global": 50}, "confirmed": {}}
            operator.reset().result(LIMIT)
            ended = operator.end_run().result(LIMIT)
        assert ended["condition"].startswith("COMPLETE"), ended
        (path,) = ended["files"]
    finally:
        board.close()
    configs, _ = table(path)
    before = configs[configs["sequence"] == 0]
    assert before["chip_id"].tolist() == list(range(11, 23))
    assert (before["known"] == SENT | READ).all()
    assert (before["sent"][:, 64] == 50).all()
    assert before["read"][:, 64].tolist() == [50, 50, 51, *[50] * 9]
    assert before["different"].tolist() == [0, 0, 1, *[0] * 9]
    changed = configs[configs["sequence"] > 0]
    at = changed["chip_id"].tolist()
    assert at[:2] == [11, 12]
    assert changed["sent"][:2, 64].tolist() == [60, 77], "also by an aborted routine"
    assert changed["known"][:2, 64].tolist() == [SENT, SENT]
    assert at[2:] == list(range(11, 23))
    assert not changed["known"][2:].any(), "not known after a reset"
    first = rows_of(path)["packet_type"][:3].tolist()
    assert first == [5, 5, 5], "two rows of text, and 'Beginning run'"
    texts = file_info(path)["texts"]
    assert texts["comment"] == "cosmics"
    assert {"version larpix-daq", "version larpix-control", "version HDF5", "version Python"} <= set(texts)
    chips = hdf5format.from_file(path, load_configs=True)["configs"]
    assert [chip.config.threshold_global for chip in chips] == [50] * 12 + [60, 77]
