"""Boards that are missing or differ from the producer's options, in status, prepare_run and end_run."""

import re

import h5py
import pytest
import zmq
from decoder_harness import legacy, message_1_0, odd_parity, word_1_0
from emulated_board import context, emulator
from processes import LIMIT, free_port, until

from larpixdaq.control.display import status_lines
from larpixdaq.errors import RequestError
from larpixdaq.hdf5.verify import verify

HIT = odd_parity(0x1234_5678 << 16 | 20 << 2)


def publish(ctx):
    out = ctx.socket(zmq.XPUB)
    return out, out.bind_to_random_port("tcp://127.0.0.1")


def status(operator, text):
    """Wait for lines of `status` with this text, and return them."""
    found = []

    def there():
        found[:] = [line for line in status_lines(operator.status().result(LIMIT)) if text in line]
        return found

    until(there, text)
    return found


def test_disconnected_boards_and_firmware_with_another_clock(line):
    """A board that is off and an unknown host name do not keep the producer from reading other boards."""
    wide = b"D\x05" + (0x1234_5678_9ABC_DEF0).to_bytes(8, "little")[2:] + HIT.to_bytes(8, "little")
    with context() as ctx:
        out, port = publish(ctx)
        off = f"2=127.0.0.1:{free_port()}"
        operator = line.start("--pacman", f"1=127.0.0.1:{port}", off, "3=no.such.host.invalid:5556")
        assert out.poll(LIMIT * 1000)
        assert out.recv() == b"\1"
        status(operator, "no.such.host.invalid")
        until(lambda: "cannot find host" in status(operator, "NOT CONNECTED since")[-1], "the reason")
        assert len(status(operator, "PACMAN io_group 2 at")) == 2  # an alarm, and among the producer's facts
        out.send(legacy([wide]))
        status(operator, "start the producer with --clock64")
        prepared = operator.prepare_run().result(LIMIT)
        (warning,) = prepared["warnings"]
        assert warning.count("is not connected") == 2
        assert "--clock64" in warning
        operator.begin_run().result(LIMIT)
        out.send(legacy([wide]))
        until(lambda: line.status_of(operator, "producer")["packets"] == 1, "the packet")
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE, suspect"
        assert any("--clock64" in reason for reason in ended["reasons"])


def test_a_board_with_a_wrong_clock(line):
    """A clock is wrong by seven hours, as in a wrong time zone: the data are complete, and several texts report it."""
    with emulator("--rate", "500", "--jump", "0:-25200", "--stay") as board:
        operator = line.start("--pacman", *board.addresses)
        status(operator, "clock -25")
        (warning,) = operator.prepare_run().result(LIMIT)["warnings"]
        off = r"PACMAN io_group 1 at \S+: clock -2(5200|5199|5201)[.\d]* ± [.\d]+ s from the host's"
        assert re.search(off, warning), warning
        operator.begin_run().result(LIMIT)
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        assert re.search(off, "; ".join(ended["reasons"])), ended["reasons"]
        (path,) = ended["files"]
        with h5py.File(path) as file:
            (line,) = file["ledger/verdicts"]
            assert line["verdict"] == b"complete"
            assert line["why"].startswith(b"clock -25")
        assert verify(path).ok


def test_format_1_0_without_its_option_prevents_a_run(line):
    with context() as ctx:
        out, port = publish(ctx)
        operator = line.start("--pacman", f"127.0.0.1:{port}")
        assert out.poll(LIMIT * 1000)
        assert out.recv() == b"\1"
        out.send(message_1_0([word_1_0(HIT, receipt=2**33)]))
        status(operator, "--pacman-format 1.0")
        with pytest.raises(
            RequestError, match=r"sends PACMAN format 1\.0, .*: start the producer with --pacman-format"
        ):
            operator.prepare_run().result(LIMIT)
        assert operator.state().result(LIMIT) == "STOP"
