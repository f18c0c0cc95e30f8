"""A run with chips that are set up over the command port while the producer records: every word is in the file."""

from __future__ import annotations

import platform

import numpy as np
import zmq
from emulated_board import READ, WRITE, board_register, context, emulator, power_registers, reply_to, request, word
from processes import LIMIT, until
from system import rows_of, system

from larpixdaq.hdf5.reader import DataFile

ID, DOWN, MASK, THRESHOLD = 122, 125, 131, 64


def test_packets_of_chips_are_recorded(tmp_path):
    options = ("--chips", "4", "--asic", "2b", "--lossless")
    with system(tmp_path) as daq, emulator(*options) as board, context() as ctx:
        ports = board.ready["1"]
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{ports['command']}")
        reply_to(command, board_register(b"W", 0x1010, 0))  # no heartbeats
        operator = daq.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--asic", "2b")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        for register, value in power_registers(1):
            reply_to(command, board_register(b"W", register, value))
        setup = [word(WRITE, 1, ID, 11), word(WRITE, 11, DOWN, 15), word(WRITE, 11, THRESHOLD, 80)]
        setup += [word(WRITE, 11, MASK + byte, 0) for byte in range(8)]
        reads = [word(READ, 11, address) for address in range(256)]
        reply_to(command, request([(1, packet) for packet in setup + reads]))

        until(lambda: daq.status_of(operator, "producer").get("packets", 0) > 2000, "noise")
        # the producer asks the board for its firmware as soon as the data show that the board knows this request
        until(lambda: daq.status_of(operator, "producer").get("firmware"), "the firmware")
        reply_to(command, board_register(b"W", 0x10, 0))
        board.stop()
        sent = board.finish()["sent"]["1"]
        ended = operator.end_run().result(60)
        rows = np.concatenate([rows_of(path) for path in ended["files"]])
        entry = operator.run_info().result(LIMIT)
    with DataFile(ended["files"][0]) as file:
        boards, info = file.connected(), file.run_info()
    expected = ("PACMAN", f"tcp://127.0.0.1:{ports['data']}", platform.node(), "0x0 0x0 0x0 0x0")
    assert [(board.kind, board.address, board.host, board.firmware) for board in boards] == [expected]
    assert (entry["kind"], entry["connected"][0]["firmware"]) == ("physics", expected[-1])
    assert (info["begun_ns"], info["ended_ns"]) == (entry["begun_ns"], entry["stopped_ns"])
    assert info["live_ns"] == info["ended_ns"] - info["begun_ns"] > 0
    words = rows[(rows["direction"] == 1) & (rows["packet_type"] < 4)]
    assert len(words) == sent["D"] == sent["words"]
    assert np.count_nonzero(words["packet_type"] == READ) == 256
    hits = words[words["packet_type"] == 0]
    assert set(hits["chip_id"].tolist()) == {11}
    assert set(hits["io_channel"].tolist()) == {1}
    assert set(hits["channel_id"].tolist()) <= set(range(64))
    assert words["valid_parity"].all()
