"""Recorded files of every kind as boards: the bytes that the boards sent, and faults by seed, counted exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from decoder_harness import data_word, legacy, message_1_0, odd_parity, word_1_0
from emulated_board import context, drain, emulator, subscriber
from file_builder import CLOCK64, V1, V2, V3, Feed, run_info, write
from larpix.format import rawhdf5format

from larpixdaq import emulators
from larpixdaq._native.decoders import PacmanDecoder, encode_pacman
from larpixdaq.emulators.recording import SIZES_1_0, Recording, count_1_0, words_of
from larpixdaq.errors import FileError
from larpixdaq.hdf5.raw_file import make_raw
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.schema import types_of


def board_messages(count, seed=1):
    rng = random.Random(seed)
    return [
        legacy(
            [data_word(odd_parity(rng.randrange(1 << 60) << 2)) for _ in range(rng.choice((0, 1, 3, 40)))],
            1_700_000_000 + n,
        )
        for n in range(count)
    ]


def raw_file(path, messages, groups):
    given = [groups[n % len(groups)] for n in range(len(messages))]
    rawhdf5format.to_rawfile(
        str(path), msgs=messages, version="0.0", msg_headers={"io_groups": given}, io_version="0.0"
    )
    return given


def play(recording, words=50):
    found = []
    while recording.left:
        count = recording.fill(words, 0, 200)
        assert count == len(recording.spans) > 0
        found += [recording.buffer[start : start + length].tobytes() for start, length in recording.spans.tolist()]
    return found


def test_a_raw_file_over_the_wire(tmp_path):
    """Two boards send the messages of their io_groups, byte for byte."""
    messages = board_messages(1500)
    groups = raw_file(tmp_path / "raw.h5", messages, (1, 2))
    with (
        emulator("--replay", str(tmp_path / "raw.h5"), "--lossless", "--rate", "1e6", "--io-groups", "2") as board,
        context() as ctx,
    ):
        sockets = {group: subscriber(ctx, board.ready[str(group)]["data"]) for group in (1, 2)}
        for group, socket in sockets.items():
            expected = [message for message, each in zip(messages, groups, strict=True) if each == group]
            assert drain(socket, lambda got, expected=expected: len(got) >= len(expected)) == expected
        sent = board.finish()["sent"]
        assert sum(sent[group]["words"] for group in "12") == sum((len(each) - 8) // 16 for each in messages)


def test_messages_of_other_boards_are_counted(tmp_path):
    messages = board_messages(90)
    raw_file(tmp_path / "raw.h5", messages, (1, 2, 7))
    recording = Recording(tmp_path / "raw.h5", 2, (1, 2))
    assert play(recording) == messages[1::3]
    assert recording.left_out == 30
    with pytest.raises(FileError, match="has no messages of io_group 4"):
        Recording(tmp_path / "raw.h5", 4, (4,))


@pytest.mark.parametrize("layout", [V1, V2, CLOCK64, V3], ids=lambda layout: layout.name)
def test_rows_become_messages_again(tmp_path, layout):
    """The messages of a packet file are those of its raw file, and decode to its rows."""
    rng = np.random.default_rng(3)
    asic = {V1: 1, V3: 4}.get(layout, 2)
    feed = Feed(layout=layout)
    file = RunFile(tmp_path, run_info(layout))
    file.add(*feed.info("Beginning run"))
    seconds = 1_700_000_000
    for _ in range(40):
        count = int(rng.integers(0, 50))
        words = [data_word(odd_parity(int(word) << 2 | (layout is V3))) for word in rng.integers(0, 1 << 60, count)]
        if layout is V1:
            words = [data_word(odd_parity(int(word) & ((1 << 52) - 1), 54)) for word in rng.integers(0, 1 << 60, count)]
        decoder = PacmanDecoder(1, asic, format="legacy", clock64=layout in (CLOCK64, V3))
        decoder.start(np.zeros(22, np.uint64))
        message = legacy(words, seconds)
        decoder.feed(message, np.array([(0, len(message))], [("start", "<u4"), ("length", "<u4")]))
        rows = np.zeros(count + 2, layout.dtype)
        made = decoder.decode(rows)
        file.add(*feed.block(rows[:made]))
        seconds += 1
    file.end(feed.end())
    path = file.close().path
    found = play(Recording(path))
    assert len(found) == 40
    assert found == play(Recording(make_raw(path).path))


def test_format_1_0(tmp_path):
    """Its header counts bytes, and its words have 24 bytes; faults and counts fit."""
    messages = [
        message_1_0([word_1_0(odd_parity(k << 2)) for k in range(n % 4)], 10**18 + n * 10**9) for n in range(400)
    ]
    raw_file(tmp_path / "raw.h5", messages, (1,))
    recording = Recording(tmp_path / "raw.h5")
    assert recording.sizes == SIZES_1_0
    assert play(recording) == messages
    recording = Recording(tmp_path / "raw.h5")
    recording.fill(10**6, 0, 0)
    d, *others = count_1_0(recording.buffer, recording.spans)
    assert (d, others) == (int(words_of(recording.spans, SIZES_1_0).sum()), [0, 0, 0])
    with (
        emulator("--replay", str(tmp_path / "raw.h5"), "--lie", "0.3", "--seed", "5", "--lossless") as board,
        context() as ctx,
    ):
        got = drain(subscriber(ctx, board.ready["1"]["data"]), lambda got: len(got) >= len(messages))
        sent = board.finish()["sent"]["1"]
    changed = [(old, new) for old, new in zip(messages, got, strict=True) if old != new]
    assert len(changed) == sent["lied_messages"] > 50
    excess = sum(int.from_bytes(new[4:8], "little") - int.from_bytes(old[4:8], "little") for old, new in changed)
    assert excess == 24 * sent["lied"]


def test_faults_by_seed(tmp_path):
    """The same seed gives the same faults, and another one others."""
    messages = board_messages(600)
    raw_file(tmp_path / "raw.h5", messages, (1,))
    outcomes = []
    for seed in ("3", "3", "4"):
        options = ("--skip", "0.1", "--double", "0.1", "--lie", "0.05", "--seed", seed, "--lossless", "--rate", "1e6")
        with emulator("--replay", str(tmp_path / "raw.h5"), *options) as board, context() as ctx:
            socket = subscriber(ctx, board.ready["1"]["data"])
            sent = board.finish()["sent"]["1"]
            got = drain(socket, lambda got, sent=sent: len(got) >= sent["messages"])
        outcomes.append((got, sent))
        assert sent["messages"] == 600 - sent["skipped_messages"] + sent["doubled_messages"]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != outcomes[2][0]


def test_damaged_and_other_files(tmp_path, capsys):
    report, _ = write(tmp_path, Feed(), [16_384] * 2)
    data = report.path.read_bytes()
    for content, text in (
        (data[:5000], "cannot be opened"),
        (b"", "expected a raw file"),
        (b"junk" * 99, "expected a raw file"),
    ):
        (tmp_path / "x.h5").write_bytes(content)
        assert emulators.main(["pacman", "--replay", str(tmp_path / "x.h5")]) == 1
        found = capsys.readouterr().err
        assert text in found
        assert found.count("\n") == 1


def test_encoded_rows_are_those_of_the_wire():
    """A check of this test's own means: rows of type 4 begin messages."""
    message = legacy([data_word(odd_parity(4))], 1_700_000_000)
    decoder = PacmanDecoder(1, 2)
    decoder.start(np.zeros(22, np.uint64))
    decoder.feed(message, np.array([(0, len(message))], [("start", "<u4"), ("length", "<u4")]))
    rows = np.zeros(9, V2.dtype)
    rows = rows[: decoder.decode(rows)]
    assert types_of(rows).tolist() == [4, 0]
    assert bytes(encode_pacman(rows, asic=2)[0]) == message
