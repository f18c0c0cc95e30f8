"""Recorded data of real boards, which are not in the repository (tests/support/recorded_data.py)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_harness import GROUP, new_counts, nonzero_counts, run_messages
from larpix_control import packets_v2, pacman_msg_format, rows_2_4
from recorded_data import shared_data
from source_driver import check_ledger

from larpixdaq import schema
from larpixdaq._native import decoders, word_codec
from larpixdaq.schema import Asic


def vectors(key: str) -> Any:
    return json.loads(shared_data("vectors.json").read_text())[key]


def test_pacman_messages_of_2020(tmp_path: Path) -> None:
    """All columns but direction are those of larpix-control, and encoding gives the same bytes again."""
    log = shared_data("pacman_2020_messages.bin").read_bytes()
    spans, used = decoders.split_log(log)
    assert (used, len(spans)) == (len(log), 1200)
    decoder = decoders.PacmanDecoder(GROUP, Asic.V2)
    counts = new_counts()
    decoder.start(counts)
    decoder.feed(log, spans)
    rows = np.zeros(4096, schema.PACKETS_2_4)
    rows = rows[: decoder.decode(rows)]
    check_ledger(counts, len(rows))
    messages = [log[start : start + length] for start, length in spans.tolist()]
    theirs = rows_2_4(
        tmp_path / "theirs.h5",
        [packet for message in messages for packet in pacman_msg_format.parse(message, io_group=GROUP)],
    )
    assert (rows["direction"] == (rows["packet_type"] != 4)).all()
    theirs["direction"] = rows["direction"]
    assert (rows == theirs).all()
    assert nonzero_counts(counts)["time_rows"] == 1200
    assert not {"wrong_counts", "unknown_words", "rejected_words", "trailing_bytes"} & nonzero_counts(counts).keys()
    assert nonzero_counts(counts)["bad_parity"] == np.count_nonzero(
        (rows["packet_type"] < 4) & (rows["valid_parity"] == 0)
    )
    buffer, made = decoders.encode_pacman(rows, asic=Asic.V2)
    assert [bytes(buffer[start : start + length]) for start, length in made.tolist()] == messages


def test_heartbeats_of_2020_are_10_seconds_apart() -> None:
    log = shared_data("pacman_2020_messages.bin").read_bytes()
    spans, _ = decoders.split_log(log)
    rows, _ = run_messages(
        decoders.PacmanDecoder(GROUP, Asic.V2), [log[s : s + n] for s, n in spans.tolist()], schema.PACKETS_2_4
    )
    beats = rows[(rows["packet_type"] == 6) & (rows["trigger_type"] == ord("H"))]["timestamp"].astype(np.int64)
    assert set(np.diff(beats) % 2**32) <= {100_000_000}


def test_configuration_words_of_2020(tmp_path: Path) -> None:
    words = np.frombuffer(shared_data("config_words_2020.u8le").read_bytes(), "<u8")
    rows = np.zeros(len(words), schema.PACKETS_2_4)
    assert word_codec.decode(words, rows, asic=Asic.V2, direction=0) == len(words) == 40_000
    assert set(rows["packet_type"].tolist()) <= {2, 3}
    assert (word_codec.encode(rows, asic=Asic.V2) == words).all()
    some = slice(None, None, 40)
    assert (rows[some] == rows_2_4(tmp_path / "theirs.h5", packets_v2(words[some]))).all()


def test_hits_of_v1_chips() -> None:
    """The data are decoded values, which become words by the bit positions of the data sheet."""
    hits = json.loads(shared_data("v1_hits_2018.json").read_text())
    channel, chip, adc, ticks = (np.array([hit[i] for hit in hits], np.uint64) for i in (0, 1, 5, 6))
    low = chip << np.uint64(2) | channel << np.uint64(10) | ticks << np.uint64(17) | adc << np.uint64(41)
    words = word_codec.parity(low, asic=Asic.V1)
    rows = np.zeros(len(words), schema.PACKETS_1_0)
    assert word_codec.decode(words, rows, asic=Asic.V1, io_group=1, io_channel=1) == len(hits)
    assert (rows["channel"] == channel).all()
    assert (rows["chipid"] == chip).all()
    assert (rows["adc_counts"] == adc).all()
    assert (rows["timestamp"] == ticks).all()
    assert rows["valid_parity"].all()
    assert (word_codec.encode(rows, asic=Asic.V1) == words).all()


def test_module_run_of_2023() -> None:
    """20 messages of two io_groups, and their published rows."""
    recorded = vectors("tpc12_2023_03_15")
    rows = []
    for group, message in zip(recorded["io_groups"], recorded["msgs"], strict=True):
        decoder = decoders.PacmanDecoder(group, Asic.V2)
        rows.append(run_messages(decoder, [bytes.fromhex(message)], schema.PACKETS_2_4)[0])
        assert rows[-1]["packet_type"][0] == 4
    found = np.concatenate([made[1:] for made in rows])
    wanted = np.array([tuple(row) for row in recorded["rows"]], [(name, "i8") for name in recorded["rows_fields"]])
    for name in recorded["rows_fields"]:
        assert found[name].tolist() == wanted[name].tolist(), name


def test_message_of_lbrulibs() -> None:
    recorded = vectors("lbrulibs_message")
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    rows, _ = run_messages(decoder, [bytes.fromhex(recorded["msg"])], schema.PACKETS_2_4)
    assert rows["timestamp"][0] == recorded["expect"]["unix_ts"]
    fields = vectors("tpc12_2023_03_15")["rows_fields"]
    assert {name: int(rows[1][name]) for name in fields} == dict(zip(fields, recorded["row"], strict=True))


@pytest.mark.parametrize("key", ["tutorial_packet", "v1_bytes"])
def test_single_packets(key: str) -> None:
    recorded = vectors(key)
    asic = Asic.V1 if key == "v1_bytes" else Asic.V2
    rows = np.zeros(1, schema.layout_of(asic).dtype)
    word_codec.decode(np.frombuffer(bytes.fromhex(recorded["packet"]).ljust(8, b"\0"), "<u8"), rows, asic=asic)
    expected = {{"packet_type": "type"}.get(k, k) if asic == Asic.V1 else k: v for k, v in recorded["expect"].items()}
    assert {name: rows[0][name] for name in expected} == expected


def test_v3_configuration_words() -> None:
    for recorded in vectors("v3_config")["packets"]:
        rows = np.zeros(1, schema.PACKETS_3_0)
        word_codec.decode(np.array([int(recorded["word"], 16)], np.uint64), rows, asic=Asic.V3)
        names = {
            "type": "packet_type", "chip": "chip_id", "addr": "register_address", "value": "register_data",
            "downstream": "downstream_marker", "parity": "parity", "odd": "valid_parity",
        }  # fmt: skip
        assert {name: rows[0][column] for name, column in names.items()} == {name: recorded[name] for name in names}


def test_frames_of_the_v1_test_bench() -> None:
    """3 frames to the chips, and 6 commands to the board, which are no frames."""
    stream = bytes.fromhex(vectors("vhdl_v1_tb")["bytes"])
    for asic in (Asic.V1, Asic.V2):
        decoder = decoders.SerialDecoder(GROUP, asic, rule="larpix-control")
        counts = new_counts()
        decoder.start(counts)
        decoder.feed(stream, 1)
        rows = np.zeros(20, schema.layout_of(asic).dtype)
        assert decoder.decode(rows) == 4
        check_ledger(counts, 4, serial=True)
        assert nonzero_counts(counts)["resync_bytes"] == 60
        sent = [int.from_bytes(stream[i + 1 : i + 9], "little") for i in range(0, 90, 10) if stream[i] == 0x73]
        mask = (1 << 54) - 1 if asic == Asic.V1 else (1 << 64) - 1
        assert word_codec.encode(rows[:4], asic=asic).tolist() == [word & mask for word in sent]


def test_data_words_of_pacman_util() -> None:
    body = bytes.fromhex(vectors("pacman_util_test")["body"])
    message = b"D" + bytes(5) + b"\x03\x00" + body
    rows, _ = run_messages(decoders.PacmanDecoder(1, Asic.V2), [message], schema.PACKETS_2_4)
    assert rows["packet_type"].tolist() == [4, 0, 6, 7]
    assert rows["receipt_timestamp"][1] == rows["timestamp"][2] == rows["timestamp"][3] == 12345678
    assert word_codec.encode(rows, asic=Asic.V2).tolist() == [0x1020304050607080]
    assert (rows["trigger_type"][2:] == (83, 1)).all()


def test_bern_message() -> None:
    recorded = vectors("bern_data")
    rows, _ = run_messages(decoders.BernDecoder(1, Asic.V1), [bytes.fromhex(recorded["msg"])], schema.PACKETS_1_0)
    assert rows["chip_key"].tolist() == [b"1-1-1"]
    word = int.from_bytes(bytes.fromhex(recorded["expect"]["packet"]), "little")
    assert word_codec.encode(rows, asic=Asic.V1).tolist() == [word]
