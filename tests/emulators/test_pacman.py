"""Emulated PACMAN: plausible words, real sockets, and exact counts."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import zmq
from emulated_board import context, drain, emulator, subscriber
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT
from recorded_data import shared_data

from larpixdaq import emulators, schema
from larpixdaq._native import board_emulator, word_codec
from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError
from larpixdaq.emulators.command_server import CommandServer
from larpixdaq.emulators.revisions import REVISIONS
from larpixdaq.runtime.timing import Pace

ASICS = pytest.mark.parametrize("asic", list(schema.Asic))


def messages_of(board, n):
    return [bytes(board.buffer[start : start + length]) for start, length in board.spans[:n].tolist()]


def words_of(messages):
    return b"".join(message[8:] for message in messages)


# --- words


@ASICS
def test_packets_are_plausible(asic):
    """Valid parity, all chips and channels, different pedestals of channels, and growing times."""
    board = board_emulator.PacmanBoard(asic, rate=100_000, seed=1, io_channels=4, chips=10)
    words = np.zeros(50_000, np.uint64)
    board.packets(words)
    rows = np.zeros(len(words), schema.layout_of(asic).dtype)
    assert word_codec.decode(words, rows, asic=asic) == len(words)
    assert rows["valid_parity"].all()
    assert 0.4 < rows["parity"].mean() < 0.6
    v1 = asic == schema.Asic.V1
    chip, channel, kind, adc = (
        rows[name]
        for name in (
            ("chipid", "channel", "type", "adc_counts") if v1 else ("chip_id", "channel_id", "packet_type", "dataword")
        )
    )
    assert set(chip.tolist()) == set(range(11, 21))
    assert set(channel.tolist()) == set(range(32 if v1 else 64))
    assert set(kind.tolist()) == {1 if asic == schema.Asic.V3 else 0}
    assert 5 < adc.std() / (4 if v1 or asic == schema.Asic.V3 else 1) < 60
    if asic != schema.Asic.V2_DIAGNOSTICS:
        assert (np.diff(rows["timestamp"].astype(np.int64)) >= 0).all()
        seconds = (5e6 if v1 else 1e7) * len(words) / 100_000
        assert int(rows["timestamp"][-1]) == pytest.approx(seconds, rel=0.01)
    if asic == schema.Asic.V2:
        assert 0.8 < rows["first_packet"].mean() < 0.95
        assert set(rows["trigger_type"].tolist()) == {0, 1, 2, 3}
        assert np.count_nonzero(rows["local_fifo"] | rows["shared_fifo"]) < 100


@ASICS
def test_odd_packets(asic):
    board = board_emulator.PacmanBoard(asic, rate=100_000, odd=0.01)
    words = np.zeros(50_000, np.uint64)
    board.packets(words)
    rows = np.zeros(len(words), schema.layout_of(asic).dtype)
    assert word_codec.decode(words, rows, asic=asic) == len(words)
    kind = rows["type" if asic == schema.Asic.V1 else "packet_type"]
    assert 400 < np.count_nonzero(kind == 3) < 600
    assert 200 < np.count_nonzero(rows["valid_parity"] == 0) < 300


@pytest.mark.parametrize(("asic", "bits"), [(schema.Asic.V1, 24), (schema.Asic.V2, 31), (schema.Asic.V3, 28)])
def test_chip_times_roll_over(asic, bits):
    ticks = 1 << (bits + (asic == schema.Asic.V1))
    board = board_emulator.PacmanBoard(asic, rate=10_000, tick=ticks - 5_000_000)
    words = np.zeros(10_000, np.uint64)
    board.packets(words)
    rows = np.zeros(len(words), schema.layout_of(asic).dtype)
    word_codec.decode(words, rows, asic=asic)
    (at,) = np.nonzero(np.diff(rows["timestamp"].astype(np.int64)) < 0)
    assert len(at) == 1
    assert 4_900 < at[0] < 5_100
    assert rows["timestamp"][at[0]] > (1 << bits) - 10_000
    assert rows["timestamp"][at[0] + 1] < 10_000


@settings(max_examples=examples(30))
@given(
    pieces=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([0, 1, 7, 65_535])), max_size=8),
    seed=st.integers(0, 2**64),
    pps=st.booleans(),
)
def test_the_same_words_in_batches_of_any_size(pieces, seed, pps):
    kwargs = {"rate": 100, "seed": seed, "pps": pps, "odd": 0.1}
    board, other = (board_emulator.PacmanBoard(schema.Asic.V2, words=3000, **kwargs) for _ in range(2))
    words = b""
    for n, per_message in pieces:
        got = messages_of(board, board.fill(n, per_message))
        assert sum(struct.unpack_from("<H", message, 6)[0] for message in got) == n
        assert all(len(message) == 8 + 16 * struct.unpack_from("<H", message, 6)[0] for message in got)
        if per_message:
            assert len(got) == -(-n // per_message)
        words += words_of(got)
    assert words == words_of(messages_of(other, other.fill(sum(n for n, _ in pieces))))


@pytest.mark.parametrize("pps", [False, True])
def test_larpix_control_reads_the_messages(pps):
    """In 22 s of a board larpix-control finds a heartbeat each 10 s, triggers, and with `pps` a reset each second."""
    from larpix.format.pacman_msg_format import parse

    board = board_emulator.PacmanBoard(schema.Asic.V2, rate=200, seconds=1_700_000_000, pps=pps, seed=4)
    packets_ = []
    for message in messages_of(board, board.fill(4_400)):
        first, *rest = parse(message, io_group=1)
        assert 1_700_000_000 <= first.timestamp <= 1_700_000_022
        packets_ += rest
    syncs = [p for p in packets_ if p.packet_type == 6]
    hits = [p for p in packets_ if p.packet_type == 0]
    assert [p.sync_type for p in syncs if p.sync_type == b"H"] == [b"H"] * 2
    assert sum(p.packet_type == 7 for p in packets_) == 22
    resets = [p.timestamp for p in syncs if p.sync_type == b"S"]
    assert resets == ([10_000_000] * 21 if pps else [])
    assert all(p.has_valid_parity() for p in hits)
    assert {p.io_channel for p in hits} == set(range(1, 9))
    receipts = np.array([p.receipt_timestamp for p in hits], np.int64)
    assert np.count_nonzero(np.diff(receipts) < 0) == len(resets)
    late = receipts - np.array([p.timestamp for p in hits], np.int64)
    assert ((late >= 0) & (late < 300) | (late < 0) & pps).all()
    assert np.count_nonzero(late < 0) <= len(resets)


def test_the_size_of_auto_messages_grows_with_the_rate():
    words = []
    for rate in (1_000, 100_000, 2_400_000):
        board = board_emulator.PacmanBoard(schema.Asic.V2, rate=rate)
        words.append(10_000 / board.fill(10_000))
    assert words[0] < 1.05
    assert 1.5 < words[1] < 4
    assert 30 < words[2] < 60


def test_counting_words():
    board = board_emulator.PacmanBoard(schema.Asic.V2, rate=10, pps=True)
    n = board.fill(1000, 3)
    kinds = words_of(messages_of(board, n))[::16]
    d, s, t, others = board_emulator.count_words(board.buffer, board.spans[:n])
    assert (d, s, t, others) == (kinds.count(b"D"), kinds.count(b"S"), kinds.count(b"T"), 0)
    assert s > 90
    cut = np.frombuffer(b"D" + bytes(5) + b"\2\0" + b"X" * 31 + b"D", np.uint8)
    assert board_emulator.count_words(cut, np.array([(0, 40), (0, 39), (0, 7)], schema.SPAN)) == (0, 0, 0, 3)
    with pytest.raises(ValueError, match=r"message 0: span .* outside of the buffer of 40 bytes"):
        board_emulator.count_words(cut, np.array([(1, 40)], schema.SPAN))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 9},
        {"rate": float("nan")},
        {"io_channels": 0},
        {"chips": 241},
        {"odd": 1.1},
        {"tick": 1 << 40},
        {"words": 0},
    ],
)
def test_invalid_boards(wrong):
    with pytest.raises(ValueError, match="PacmanBoard: "):
        board_emulator.PacmanBoard(schema.Asic.V2, **{"rate": 1000, **wrong})
    with pytest.raises(ValueError, match="the buffer holds 10"):
        board_emulator.PacmanBoard(schema.Asic.V2, rate=1000, words=10).fill(11)


def test_pace():
    pace = Pace(1000, max_delay=1.0)
    assert pace.due(50.0) == 0
    assert pace.due(50.5) == 500
    pace.add_made(400)
    assert pace.due(50.5) == 100
    assert pace.time_of(200) == pytest.approx(50.6)
    pace.pause(50.6)
    assert pace.due(60.6) == 200
    assert pace.due(100.0) == 1000, "no burst after a stall"
    pace.add_made(1000)
    assert pace.due(100.1) == pytest.approx(100, abs=1)


# --- the process


@pytest.mark.parametrize("per_message", ["auto", "1", "1000"])
def test_every_counted_word_arrives(per_message):
    """Two lossless boards: each subscriber gets every word that the emulator has counted."""
    n = 30_500
    args = ["--io-groups", "2", "--rate", "300000", "--count", str(n), "--lossless", "--words-per-message", per_message]
    with emulator(*args) as board, context() as ctx:
        sockets = [subscriber(ctx, board.ready[g]["data"]) for g in ("1", "2")]
        got = [drain(socket, lambda got: sum(map(len, got)) - 8 * len(got) >= 16 * n) for socket in sockets]
        sent = board.finish()
        for messages, said in zip(got, (sent["sent"]["1"], sent["sent"]["2"]), strict=True):
            kinds = words_of(messages)[::16]
            assert said == {
                "words": n,
                "D": kinds.count(b"D"),
                "S": kinds.count(b"S"),
                "T": kinds.count(b"T"),
                "messages": len(messages),
            }
            assert len(kinds) == n
            assert all(len(message) == 8 + 16 * struct.unpack_from("<H", message, 6)[0] for message in messages)
        if per_message != "auto":
            assert len(got[0]) == -(-n // int(per_message))
        assert words_of(got[0]) != words_of(got[1])


def test_the_number_of_chips_in_the_options():
    args = ["--io-channels", "3", "--chips-per-io-channel", "2", "--count", "5000", "--rate", "max", "--lossless"]
    with emulator(*args) as board, context() as ctx:
        socket = subscriber(ctx, board.ready["1"]["data"])
        got = drain(socket, lambda got: sum(map(len, got)) - 8 * len(got) >= 16 * 5000)
        board.finish()
    words = np.frombuffer(words_of(got), np.uint64).reshape(-1, 2)
    data = words[(words[:, 0] & np.uint64(0xFF)) == ord("D")]
    chips = zip(
        (data[:, 0] >> np.uint64(8)) & np.uint64(0xFF), (data[:, 1] >> np.uint64(2)) & np.uint64(0xFF), strict=True
    )
    assert sorted({(int(io_channel), int(chip)) for io_channel, chip in chips}) == [
        (io_channel, chip) for io_channel in (1, 2, 3) for chip in (11, 12)
    ]


def test_it_begins_with_go_and_a_subscriber_and_ends_by_a_signal():
    with emulator("--wait-for-go", "--wait-for-subscriber", "--rate", "max", "--lossless") as board, context() as ctx:
        other = subscriber(ctx, board.ready["1"]["data"], b"Z")  # matches no data
        assert not other.poll(100)
        board.go()
        assert not other.poll(100)
        socket = subscriber(ctx, board.ready["1"]["data"], b"D")
        got = drain(socket, lambda got: len(got) > 100)
        board.stop(signal.SIGINT)
        # words on their way arrive before the emulator ends
        sent = board.line()["sent"]["1"]
        got += drain(socket, lambda more: len(got) + len(more) >= sent["messages"])
        board.process.wait(LIMIT)
        assert board.process.returncode == 0
        assert len(got) == sent["messages"]
        assert len(words_of(got)) == 16 * sent["words"]


def test_a_lossless_board_waits_for_subscribers():
    with emulator("--rate", "100000", "--lossless") as board, context() as ctx:
        socket = subscriber(ctx, board.ready["1"]["data"])
        before = drain(socket, len)
        socket.unsubscribe(b"")
        socket.close()
        socket = subscriber(ctx, board.ready["1"]["data"])
        after = drain(socket, len)
        # the board's clock stood still meanwhile: no words were made
        assert before
        assert after
        board.stop()
        board.finish()


def test_end_of_input_before_go():
    with emulator("--wait-for-go") as board:
        board.process.stdin.write(b"gone\nlet's go\n")
        board.process.stdin.close()
        board.process.stdin = None
        assert board.finish()["sent"]["1"]["words"] == 0


def test_option_stay():
    with emulator("--rate", "max", "--count", "100", "--stay") as board, context() as ctx:
        assert board.line()["sent"]["1"]["words"] == 100
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
        command.send(b"?\0\0\0\0\0\1\0P" + bytes(15))
        assert command.poll(LIMIT * 1000)
        board.stop()
        board.process.wait(LIMIT)
        assert board.process.returncode == 0


def test_replay_is_byte_for_byte():
    path = shared_data("pacman_2020_messages.bin")
    data, at, recorded = path.read_bytes(), 0, []
    while at < len(data):
        (n,) = struct.unpack_from("<I", data, at)
        recorded.append(data[at + 4 : at + 4 + n])
        at += 4 + n
    with emulator("--replay", str(path), "--lossless", "--rate", "50000") as board, context() as ctx:
        got = drain(subscriber(ctx, board.ready["1"]["data"]), lambda got: len(got) >= len(recorded))
        assert got == recorded
        sent = board.finish()["sent"]["1"]
        assert sent["messages"] == 1200
        assert sent["words"] == sent["D"] + sent["S"] + sent["T"] == len(words_of(recorded)) // 16


@pytest.mark.parametrize("rate", [20_000, 500_000])
def test_the_rate_is_kept(rate):
    """Never too fast: the words of one second take a second. The benchmarks measure how close the rate is."""
    with emulator("--rate", str(rate), "--count", str(rate)) as board:
        assert board.finish()["seconds"] > 0.98


# --- wrong use


def refused(capsys, *args):
    status = emulators.main(["pacman", *args])
    return status, capsys.readouterr().err


def test_a_busy_port_gives_one_line(capsys):
    with context() as ctx:
        socket = ctx.socket(zmq.REP)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        status, text = refused(capsys, "--data-port", "0", "--command-port", str(port))
    assert status == 1
    assert text.count("\n") == 1
    assert f"io_group 1: cannot bind its command port tcp://127.0.0.1:{port}: Address already in use" in text


def test_invalid_message_logs(capsys, tmp_path):
    path = tmp_path / "log.bin"
    status, text = refused(capsys, "--replay", str(path))
    assert (status, text.count("\n")) == (1, 1)
    assert "No such file" in text
    for content in (b"", b"\x08\0\0\0D\0\0\0\0\0\0\0junk"):
        path.write_bytes(content)
        status, text = refused(capsys, "--replay", str(path))
        assert (status, text.count("\n")) == (1, 1)
        assert f"{path}: expected a raw file, a packet file, or a message log" in text


@pytest.mark.parametrize(
    "args",
    [
        ["--rate", "1"],
        ["--rate", "fast"],
        ["--words-per-message", "65536"],
        ["--words-per-message", "0"],
        ["--count", "0"],
        ["--io-groups", "256"],
        ["--data-port", "1", "2"],
        ["--data-port", "65530", "--io-groups", "2"],
        ["--data-port", "65536"],
        ["--replay", "x", "--count", "3"],
        ["--odd", "2"],
        ["--asic", "9"],
        ["--io-channels", "256"],
        ["--chips-per-io-channel", "241"],
    ],
)
def test_wrong_options(args, capsys):
    try:
        status = emulators.main(["pacman", *args])
    except SystemExit as end:  # by the parser
        status = end.code
    assert status == 2
    assert args[0] in capsys.readouterr().err


# --- the command channel


def request(*words, count=None):
    return struct.pack("<cIxH", b"?", 0, len(words) if count is None else count) + b"".join(words)


def register(kind, address, value=0):
    return struct.pack("<c3xI4xI", kind, address, value)


def commands_of(revision="5", **options):
    made = BoardRegisters(REVISIONS[revision], **options)
    made.clock = lambda: 12345
    return CommandServer(made)


def test_the_reply_to_each_word():
    commands = commands_of()
    tx = b"D\1" + bytes(6) + bytes.fromhex("2f00000000000000")
    reply = commands.answer(
        request(
            b"P" + bytes(15),
            register(b"W", 0x1010, 3),
            register(b"R", 0x1010),
            tx,
            register(b"W", 0x1004, 7),
            register(b"R", 0x1004),
            register(b"R", 0x24220),
        )
    )
    kind, _, count = struct.unpack_from("<cIxH", reply)
    words = [reply[at : at + 16] for at in range(8, len(reply), 16)]
    assert (kind, count) == (b"!", 7)
    assert words.pop(3) == tx
    assert words.pop(0)[:1] == b"P"
    assert [struct.unpack("<c3xI4xI", each) for each in words] == [
        (b"W", 0x1010, 3),
        (b"R", 0x1010, 3),
        (b"W", 0x1004, 7),
        (b"R", 0x1004, 12345),
        (b"R", 0x24220, 5),
    ]
    assert reply[5], "padding is garbage, as on a board"
    assert all(any(each[1:4]) and any(each[8:12]) for each in words)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", b"no header"),
        (b"D" + bytes(7), b"not a request"),
        (request(register(b"R", 0), count=2), b"wrong length"),
    ],
)
def test_errors_are_answered(message, text):
    assert commands_of().answer(message)[8:] == struct.pack("<cB14s", b"E", 1, text)


@settings(max_examples=examples(200))
@given(
    st.sampled_from(sorted(REVISIONS)),
    st.one_of(st.binary(max_size=60), st.lists(st.binary(min_size=16, max_size=16)).map(lambda w: request(*w))),
)
def test_any_bytes_get_a_whole_reply_or_crash_the_server(revision, message):
    try:
        reply = commands_of(revision).answer(message)
    except ServerCrashError:
        return
    assert reply[:1] == b"!"
    assert len(reply) == 8 + 16 * struct.unpack_from("<H", reply, 6)[0]


CONTROL = """
import json, sys, zmq
from larpix.io import PACMAN_IO
from larpix import Packet_v2
io = PACMAN_IO(config_filepath=sys.argv[1], raw_directory=sys.argv[2], timeout=10000)
try:
    packet = Packet_v2()
    packet.io_group = packet.io_channel = packet.chip_id = 1
    packet.packet_type = 3
    packet.assign_parity()
    before = io.get_reg(0x2018, io_group=1)
    io.set_reg(0x2018, 5, io_group=1)
    io.start_listening()
    io.send([packet])
    found = []
    while len(found) < 100:
        assert io.poller.poll(10000)
        found += io.empty_queue()[0]
    print(json.dumps([io.ping(io_group=1), before, io.get_reg(0x2018, io_group=1), io.get_vddd(io_group=1),
                      all(p.io_group == 1 for p in found)]))
finally:
    io.cleanup()
    io.join()
"""


def test_larpix_control_sends_commands(tmp_path):
    """The ports of larpix-control are fixed, so the board gets its own loopback address."""
    config = tmp_path / "io.json"
    for last in range(2, 12):
        address = f"127.0.77.{last}"
        options = ["--address", address, "--rate", "1000", "--revision", "2"]
        command = [sys.executable, "-m", "larpixdaq.emulators", "pacman", *options]
        board = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if board.stdout.readline():
            break
        board.communicate(timeout=LIMIT)
    else:
        pytest.fail("no loopback address with ports 5555 and 5556 free")
    try:
        config.write_text(json.dumps({"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, address]]}))
        done = subprocess.run(
            [sys.executable, "-c", CONTROL, str(config), str(tmp_path)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [True, 10_000_000, 5, [1800, 255.0], True]
        board.send_signal(signal.SIGTERM)
        board.wait(LIMIT)
        assert board.returncode == 0
    finally:
        board.kill()
        board.communicate(timeout=LIMIT)
