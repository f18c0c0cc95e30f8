"""Rows as text: the lines have the values of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import schema
from larpixdaq.monitor import packet_text


def line(layout: str, **columns: Any) -> str:
    dtype = next(known.dtype for known in schema.LAYOUTS if known.name == layout)
    rows = np.zeros(1, dtype)
    for name, value in columns.items():
        rows[name] = value
    (shown,) = packet_text.lines(rows)
    return shown


def words(shown: str) -> str:
    return " ".join(shown.split())


PACKET = {
    "io_group": 1,
    "io_channel": 17,
    "chip_id": 20,
    "direction": 1,
    "valid_parity": 1,
    "receipt_timestamp": 5925346,
}


@pytest.mark.parametrize("layout", ["2.4", "2.4-clock64"])
def test_v2_packets(layout: str) -> None:
    data = {**PACKET, "channel_id": 1, "timestamp": 5922492, "dataword": 35}
    assert words(line(layout, **data)) == "1 17 20 in data 5922492 5925346 channel 1 adc 35"
    shown = line(layout, **{**data, "valid_parity": 0}, trigger_type=3, first_packet=1, local_fifo=3, shared_fifo=1)
    assert shown.endswith("adc   35  periodic trigger  first  local fifo full  shared fifo half full  BAD PARITY")
    shown = line(layout, **data, fifo_diagnostics_enabled=1, local_fifo_events=2, shared_fifo_events=2748)
    assert shown.endswith("local events 2  shared events 2748")
    config = {**PACKET, "register_address": 64, "register_data": 25, "timestamp": 99, "channel_id": 5}
    assert words(line(layout, packet_type=3, **config)) == "1 17 20 in config read 5925346 register 64 = 25 (0x19)"
    sent = {**config, "direction": 0, "receipt_timestamp": 0, "valid_parity": 0}
    assert words(line(layout, packet_type=2, **sent)) == "1 17 20 out config write register 64 = 25 (0x19) BAD PARITY"
    assert words(line(layout, packet_type=1, **PACKET)) == "1 17 20 in test 5925346"


@pytest.mark.parametrize("layout", ["2.4", "2.4-clock64", "3.0"])
def test_words_of_boards(layout: str) -> None:
    board = {"io_group": 2, "direction": 1}
    assert words(line(layout, io_group=2, packet_type=4, timestamp=1678848323)) == "2 timestamp 2023-03-15T02:45:23Z"
    assert words(line(layout, packet_type=4, timestamp=2**64 - 1)) == "0 timestamp 1.84467e+19 s"
    assert words(line(layout, packet_type=5, counter=3)) == "0 message number 3"
    sync = {**board, "packet_type": 6, "timestamp": 10_000_000}
    assert words(line(layout, **sync, trigger_type=83)) == "2 sync 10000000 S counter reset or rolled over"
    assert words(line(layout, **sync, trigger_type=72, counter=16)) == "2 sync 10000000 H heartbeat status 0x10"
    assert words(line(layout, **sync, trigger_type=67, dataword=1)) == "2 sync 10000000 C clock source is now 1"
    assert words(line(layout, **sync, trigger_type=7)) == "2 sync 10000000 0x07 unknown"
    trigger = {**board, "packet_type": 7, "timestamp": 5925400, "trigger_type": 2}
    assert words(line(layout, **trigger)) == "2 trigger 5925400 bits 0b00000010"
    assert words(line(layout, **trigger, dataword=4)) == "2 trigger 5925400 bits 0b00000010 source 4"
    assert words(line(layout, **board, packet_type=88)) == "2 type 88"


def test_v3_sends_data_as_type_1() -> None:
    data = {**PACKET, "packet_type": 1, "channel_id": 63, "dataword": 1023, "timestamp": 7}
    assert words(line("3.0", **data)) == "1 17 20 in data 7 5925346 channel 63 adc 1023"
    assert line("3.0", **data, cds_flag=1, reset_sample_flag=1).endswith("adc 1023  CDS  reset sample")
    assert words(line("3.0", **PACKET)) == "1 17 20 in type 0 5925346"


def test_v1_packets() -> None:
    packet = {"chip_key": b"1-2-246", "chipid": 246, "direction": 1, "valid_parity": 1}
    shown = line("1.0", **packet, type=0, channel=7, timestamp=13857914, adc_counts=170, fifo_half=1)
    assert words(shown) == "1 2 246 in data 13857914 channel 7 adc 170 fifo half full"
    assert words(line("1.0", **packet, type=1, counter=32838)) == "1 2 246 in test counter 32838"
    shown = line("1.0", **{**packet, "direction": 0, "valid_parity": 0}, type=2, register=10, value=20)
    assert words(shown) == "1 2 246 out config write register 10 = 20 (0x14) BAD PARITY"
    assert words(line("1.0", chip_key=b"3-0-0", type=4, timestamp=0)) == "3 timestamp 1970-01-01T00:00:00Z"
    assert words(line("1.0", chip_key=b"3-0-0", type=6, register=72, direction=1)) == "3 sync 0 H heartbeat"
    assert words(line("1.0", chip_key=b"3-0-0", type=7, register=2, direction=1)) == "3 trigger 0 bits 0b00000010"
    assert words(line("1.0", type=5, counter=1)) == "message number 1"
    assert line("1.0", chip_key=b"\xff\n\x1b[2J", type=0).isprintable()


@pytest.mark.parametrize("layout", schema.LAYOUTS, ids=lambda layout: layout.name)
@settings(max_examples=examples(30))
@given(data=st.data())
def test_rows_of_any_bytes_become_printable_lines(layout: schema.RowLayout, data: st.DataObject) -> None:
    size = layout.dtype.itemsize
    raw = data.draw(st.binary(max_size=5 * size))
    rows = np.frombuffer(raw[: len(raw) // size * size], layout.dtype)
    shown = packet_text.text(rows).split("\n")
    assert len(shown) == 1 + len(rows)
    assert all(one.isprintable() for one in shown)


def test_columns_are_aligned_with_their_names() -> None:
    head = packet_text.HEADER
    rows = np.zeros(2, schema.PACKETS_2_4)
    for name, value in PACKET.items():
        rows[name] = value
    rows["packet_type"] = [0, 3]
    rows["timestamp"] = 2**31 - 1
    for shown in packet_text.lines(rows):
        for name, value in (("group", "1"), ("channel", "17"), ("chip", "20"), ("receipt", "5925346")):
            end = head.index(name) + len(name)
            assert shown[end - len(value) : end] == value
            assert shown[end] == " "
        assert shown[head.index("way") :].startswith("in ")
        assert shown[head.index("what") :].startswith(("data ", "config read "))
        assert shown[head.index("content") :].startswith(("channel ", "register "))
