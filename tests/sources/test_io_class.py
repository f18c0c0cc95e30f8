"""IO classes in processes of their own: packets, words to the chips, and warnings when the process ends."""

import json
import select
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from emulated_board import own_address, word
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from io_class_examples import BEGAN, COUNT, data_packet
from larpix.packet import TimestampPacket
from processes import LIMIT, until
from source_driver import Driver
from system import rows_of, system

from larpixdaq import constants, schema
from larpixdaq._native.decoders import PacmanDecoder, split_log
from larpixdaq.errors import ConfigError
from larpixdaq.runtime.launcher import start_time
from larpixdaq.schema import Asic
from larpixdaq.sources import io_class
from larpixdaq.sources.io_class import IoClassSource
from larpixdaq.sources.io_class_child import Encoder, make

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def opened(monkeypatch):
    """Opens sources of classes in io_class_examples.py, which are closed in the end."""
    monkeypatch.chdir(SUPPORT)
    made = []

    def open_(name, *arguments, **options):
        source = IoClassSource(name, arguments, **{"asic": Asic.V2, **options})
        made.append(source)
        source.open()
        return source

    yield open_
    for source in made:
        source.close()


def balanced(counts):
    at = dict(zip(constants.COUNTS, counts.tolist(), strict=True))
    return at["bytes_in"] == sum(
        at[name] for name in ("header_bytes", "word_bytes", "trailing_bytes", "rejected_bytes")
    )


def sent(driver, channel, io_channel, *words):
    """Send words and wait for the reply."""
    channel.send_words(np.full(len(words), io_channel, np.uint8), np.array(words, np.uint64))
    replies = []

    def replied():
        driver.turn()
        replies.append(channel.take())
        return replies[-1] is not None

    until(replied, "a reply")
    assert not channel.busy
    return replies[-1]


def test_packets_of_a_class_become_rows(opened):
    source = opened("io_class_examples:Echo")
    assert source.io_groups == (2, 7)
    driver = Driver(source)
    driver.until(lambda: driver.n >= 2 * (COUNT + 3), "rows")
    rows = driver.rows
    for io_group, kind in ((2, 6), (7, 7)):
        own = rows[rows["io_group"] == io_group]
        # a second message with the time of the first, because there are so many words
        assert own["packet_type"].tolist().count(4) == 2
        assert set(own["timestamp"][own["packet_type"] == 4]) == {BEGAN}
        data = own[own["packet_type"] == 0]
        assert data["timestamp"].tolist() == list(range(COUNT))
        assert (data["receipt_timestamp"] == 10 * data["timestamp"]).all()
        assert {*data["io_channel"]} == {3}
        assert (data["valid_parity"] == 1).all()
        assert own["packet_type"][-1] == kind
    assert rows[rows["packet_type"] == 6][["trigger_type", "dataword", "timestamp"]].tolist() == [(ord("H"), 1, 500)]
    assert [bytes(one["raw"][1:16]).rstrip(b"\0") for one in source.take_unknown()] == [b"io_group 9", b"MessagePacket"]
    assert driver.count("unknown_words", 2) == 2
    assert all(map(balanced, driver.counts[[2, 7]]))
    assert [line.verdict for line in source.evidence(0)] == ["suspect", "complete"]


def test_words_go_to_the_class_and_come_back(opened):
    source = opened("io_class_examples.Echo", "", "0")
    driver = Driver(source)
    driver.until(lambda: driver.n >= 4, "the first rows")
    here, there = source.channels
    words = [word(3, chip, 65, chip) for chip in (11, 12)]
    assert sent(driver, there, 5, *words) == (b"", "")
    driver.until(lambda: driver.n >= 7, "the words")
    back = driver.rows[-2:]
    assert back[["io_group", "io_channel", "chip_id", "register_data", "direction"]].tolist() == [
        (7, 5, 11, 11, 1),
        (7, 5, 12, 12, 1),
    ]
    reply = sent(driver, here, 1, word(2, 99, 0))
    assert reply.error == "IO class io_class_examples.Echo, io_group 2: RuntimeError: no such chip here"
    here.send_raw(bytes(16))  # it has no registers
    driver.until(lambda: here.take() is not None, "a reply")
    # A clock that does not fit into the layout: its lower half is stored, with a warning.
    assert sent(driver, here, 1, word(2, 98, 0)) == (b"", "")
    driver.until(lambda: driver.n == 9, "the word")
    assert driver.rows["receipt_timestamp"][-1] == 0
    assert "give --clock64" in source.boards()[0].setup[0].why.replace("an IO class: with", "give")


def test_clocks_of_64_bits(opened):
    source = opened("io_class_examples:Echo", "", "0", clock64=True)
    driver = Driver(source)
    sent(driver, source.channels[0], 1, word(2, 98, 0))
    driver.until(lambda: (driver.rows["receipt_timestamp"] == 1 << 40).any(), "the word")


def test_v1_chips(opened):
    source = opened("io_class_examples:Echo", "", "0", asic=Asic.V1)
    driver = Driver(source)
    sent(driver, source.channels[0], 1, 0x5A5A5A5A5A5A)
    driver.until(lambda: (driver.rows["chip_key"] == b"2-1-150").any(), "the word")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("absent.module:Class", "module absent.module cannot be imported: No module named 'absent'"),
        ("Absent_IO", "no class Absent_IO with send, start_listening, empty_queue in larpix.io"),
        ("os.path:join", "no class join with send, start_listening, empty_queue in os.path"),
    ],
)
def test_a_wrong_class_is_an_error_in_one_line(name, error):
    with pytest.raises(ConfigError) as caught:
        make(name, ())
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_that_look_like_numbers_are_numbers():
    made = make("io_class_examples:Plain", ("config.json", "3", "-1.5", "1e3"))
    assert made.arguments == ("config.json", 3, -1.5, 1000.0)


def test_a_class_that_cannot_be_used_is_an_error_in_one_line(opened):
    with pytest.raises(ConfigError) as caught:
        opened("io_class_examples:Broken")
    assert str(caught.value) == "IO class io_class_examples:Broken: OSError: [Errno 19] no such board: 'here'"


def test_a_class_that_dies_is_reported_and_started_again_after_longer_delays(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(io_class, "RESTART_DELAY", 0.05)
    last = tmp_path / "last"
    source = opened("io_class_examples:Echo", str(last), "0")
    driver = Driver(source)
    driver.until(lambda: driver.n >= 4, "the first rows")
    last.touch()
    driver.until(lambda: len(driver.problems) >= 3, "three attempts")
    last.unlink()
    name = "IO class io_class_examples:Echo"
    ended = f"{name}: its process ended with status 5; starts again in"
    assert driver.problems[:3:2] == [f"{ended} 0.05 s", f"{ended} 0.1 s"]
    assert sent(driver, source.channels[0], 1, word(3, 1, 0)).error.startswith(f"{name}, io_group 2: its process ")
    before = driver.n
    driver.until(lambda: driver.n >= before + 4, "the first rows again")
    assert driver.problems[-1].startswith(f"{name}: connected again after ")
    assert [line.why.partition(":")[0] for line in source.evidence(0)].count("board disconnected") >= 2


def test_a_source_is_not_drained_while_a_class_has_more_packets(opened):
    source = opened("io_class_examples:Slow")
    driver = Driver(source)
    rows = np.zeros(100, source.layout.dtype)
    made, drained = 0, []

    def all_there():
        nonlocal made
        if source.read():
            made += source.decode(rows)
        drained.append(source.drained)
        return drained[-1]

    until(lambda: select.select(source.sockets, [], [], 0.1)[0], "the first packet")
    until(all_there, "that there is no more")
    assert made == 6  # a time and a packet each
    assert not any(drained[:-1])
    assert driver.count("packets") == 3


def test_a_class_that_hangs_fails_its_requests(opened, monkeypatch):
    monkeypatch.setattr(io_class, "SEND_LIMIT", 0.1)
    monkeypatch.setattr(io_class, "_END_LIMIT", 0.1)
    source = opened("io_class_examples:Plain")
    assert source.io_groups == (1,)
    reply = sent(Driver(source), source.channels[0], 1, word(3, 1, 0))
    assert reply.error == "IO class io_class_examples:Plain, io_group 1: not sent within 0.1 s"


HOLDER = """
import sys, time
from larpixdaq.sources.io_class import IoClassSource
source = IoClassSource("io_class_examples:Plain", asic=2)
source.open()
print(source._process.pid, flush=True)
time.sleep(60)
"""


def test_the_process_ends_with_its_producer():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, cwd=SUPPORT) as holder:
        try:
            assert holder.stdout is not None
            assert select.select([holder.stdout], [], [], LIMIT)[0]
            pid = int(holder.stdout.readline())
            assert start_time(pid) is not None
        finally:
            holder.kill()
    until(lambda: start_time(pid) is None, "the end of the class's process")


_CLOCKS = st.integers(0, 2**32 + 5) | st.integers(0, 2**64 - 1)


@settings(max_examples=examples(60))
@given(
    st.lists(st.none() | st.tuples(st.sampled_from([2, 7]), st.integers(0, 300), _CLOCKS), max_size=30),
    st.booleans(),
)
def test_packets_make_as_many_words_in_their_order(given_, wide):
    packets = []
    for number, one in enumerate(given_):
        packets.append(TimestampPacket(number) if one is None else data_packet(number, one[0], one[1]))
        if one is not None:
            packets[-1].receipt_timestamp = one[2]
    counts = np.zeros((256, len(constants.COUNTS)), np.uint64)
    decoders = {io_group: PacmanDecoder(io_group, Asic.V2, clock64=wide) for io_group in (2, 7)}
    found = {2: [], 7: []}
    for io_group, decoder in decoders.items():
        decoder.start(counts[io_group])
    for batch in Encoder([2, 7], wide=wide).batches(packets):
        data = np.frombuffer(batch.log, np.uint8)
        spans, used = split_log(data)
        assert used == len(data)
        for io_group, span in zip(batch.io_groups, spans, strict=True):
            rows = np.zeros(100, schema.layout_of(Asic.V2, clock64=True).dtype)
            decoders[io_group].feed(data, span.reshape(1))
            rows = rows[: decoders[io_group].decode(rows)]
            found[io_group] += rows[["timestamp", "io_channel", "receipt_timestamp"]][rows["packet_type"] == 0].tolist()
    for io_group in (2, 7):
        mine = [(i, *one[1:]) for i, one in enumerate(given_) if one is not None and one[0] == io_group]
        assert found[io_group] == [one for one in mine if one[1] < 256]
        assert counts[io_group, constants.Count.REJECTED_WORDS] == sum(one[1] > 255 for one in mine)
        assert balanced(counts[io_group])


def test_larpix_controls_own_class_reads_and_configures_a_board(tmp_path):
    """PACMAN_IO, unchanged, with emulated chips: a run, commands, and an exact ledger."""
    network = tmp_path / "network.json"
    with own_address("--chips", "4", "--power-on", "--lossless", "--write-network", str(network)) as board:
        config = tmp_path / "io.json"
        config.write_text(json.dumps({"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, board.address]]}))
        with system(tmp_path) as made:
            made.launch_core()
            made.launch_storage()
            # hwm, relaxed, timeout and directory of PACMAN_IO
            made.launch_producer("--io-config", "larpix.io.pacman_io:PACMAN_IO", config, "20000", "1", "5000", tmp_path)
            operator = made.operator()
            made.await_kinds(operator, "producer", "storage")
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
            assert operator.ping().result(LIMIT) == {"1": True}
            assert operator.power(True, tiles=[0]).result(LIMIT)[0]["tiles"] == [0]
            assert operator.load_board(str(network)).result(LIMIT)["chips"] == 4
            assert operator.configure_network().result(LIMIT)["ok"]
            assert operator.validate_configuration().result(LIMIT)["ok"]
            triggers = {
                "periodic_trigger_mask": [0] * 64,
                "periodic_trigger_cycles": 100_000,
                "enable_hit_veto": 0,
                "enable_periodic_trigger": 1,
            }
            operator.send_configuration({"all": triggers}).result(LIMIT)
            until(lambda: made.status_of(operator, "producer")["packets"] > 5_000, "packets")
            operator.send_configuration({"all": {"enable_periodic_trigger": 0}}).result(LIMIT)
            assert operator.validate_configuration().result(LIMIT)["ok"]
            board.stop()
            said = board.finish()["sent"]["1"]
            ended = operator.end_run().result(LIMIT)
            assert ended["condition"] == "COMPLETE", ended
        rows = rows_of(ended["files"][0])
        assert np.count_nonzero(rows["direction"] == 1) == said["words"] > 5_000
        assert np.count_nonzero(rows["packet_type"] == 4) == said["messages"]
        with h5py.File(ended["files"][0]) as file:
            counts = file["ledger/counts"][:]
        assert counts["sent_rows"].sum() == np.count_nonzero((rows["direction"] == 0) & (rows["packet_type"] < 4))
