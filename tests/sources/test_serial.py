"""Serial boards on real pseudo-terminals: garbage between frames, silence, and busy or disconnected devices."""

import os
import time
import tty

import numpy as np
import pytest
from larpix.io import SerialPort
from larpix.packet import Packet_v2
from source_driver import assert_same_rows, close_sources, open_driver

from larpixdaq._native import word_codec
from larpixdaq._native.decoders import encode_serial
from larpixdaq.errors import ConfigError
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources import serial as module
from larpixdaq.sources.serial import SerialSource

__all__ = ["close_sources"]  # a fixture


class Line:
    """Pseudo-terminal with a path of its own, which can be unplugged and plugged like a device."""

    def __init__(self, path):
        self.path = path
        self.plug()

    def plug(self):
        self.board, self.host = os.openpty()
        tty.setraw(self.host)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(os.ttyname(self.host))

    def unplug(self):
        os.close(self.host)
        os.close(self.board)
        self.path.unlink()

    def send(self, data):
        assert os.write(self.board, data) == len(data)


@pytest.fixture
def line(tmp_path):
    line = Line(tmp_path / "ttyUSB0")
    yield line
    if line.path.is_symlink():
        line.unplug()


def drive(line, **options):
    return open_driver(SerialSource(str(line.path), **({"asic": Asic.V2} | options)))


def words(seed, count, odd=True):
    made = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64, endpoint=False)
    return word_codec.parity(made, asic=int(Asic.V2)) ^ np.uint64(0 if odd else 1 << 63)


def expected(made, io_group=1):
    rows = np.zeros(len(made), layout_of(Asic.V2).dtype)
    word_codec.decode(made, rows, asic=int(Asic.V2), io_group=io_group, io_channel=1)
    return rows


def test_frames_between_garbage(line):
    driven = drive(line, io_group=9)
    made = words(1, 3000)
    random = np.random.default_rng(2)
    before = time.time()
    at = garbage = 0
    while at < len(made):
        count = int(random.integers(1, 60))
        noise = bytes(random.integers(0, 0x70, random.integers(0, 9), np.uint8))
        line.send(encode_serial(made[at : at + count]) + noise)
        at += count
        garbage += len(noise)
        driven.until(lambda at=at: driven.count("words_in") >= min(at, len(made)), "the frames sent")
    rows = driven.rows
    assert_same_rows(rows[rows["packet_type"] < 4], expected(made, 9))
    times = rows[rows["packet_type"] == 4]
    assert set(times["io_group"]) == {9}
    assert (np.diff(times["timestamp"].astype(np.int64)) >= 1).all(), "a time row whenever the second changes"
    assert int(before) <= times["timestamp"][0] <= times["timestamp"][-1] <= time.time()
    assert driven.count("resync_bytes", 9) + driven.count("pending_after", 9) == garbage
    assert driven.problems == []
    assert driven.source.io_groups == (9,)


def test_frames_of_larpix_control_are_read(line):
    sent = []
    for i in range(40):
        packet = Packet_v2()
        packet.packet_type, packet.chip_id, packet.channel_id, packet.dataword = 0, i, i % 64, 3 * i
        packet.assign_parity()
        sent.append(packet)
    driven = drive(line, rule="larpix-control")
    for stream in SerialPort.format_bytestream(SerialPort.encode(sent)):
        line.send(stream)
    driven.until(lambda: driven.count("words_in") == 40, "40 frames")
    rows = driven.rows[driven.rows["packet_type"] == 0]
    assert word_codec.encode(rows, asic=int(Asic.V2)).tobytes() == b"".join(packet.bytes() for packet in sent)


def test_a_last_word_of_even_parity_comes_after_the_silence(line):
    driven = drive(line)
    line.send(encode_serial(words(3, 1, odd=False)))
    started = time.monotonic()
    driven.until(lambda: driven.count("words_in") == 1, "the last word")
    assert time.monotonic() - started >= module.SILENCE * 0.9
    assert driven.count("bad_parity") == 1
    assert driven.source.due() is None


def test_an_unfinished_frame_continues_in_the_next_run(line):
    driven = drive(line)
    frame = encode_serial(words(4, 1))
    line.send(frame[:4])
    driven.until(lambda: driven.count("pending_after") == 4, "four bytes")
    counts = np.zeros_like(driven.counts)
    driven.counts, driven.parts = counts, []
    driven.source.start(counts)
    line.send(frame[4:])
    driven.until(lambda: driven.count("words_in") == 1, "the frame")
    assert driven.count("pending_before") == 4
    assert_same_rows(driven.rows[driven.rows["packet_type"] < 4], expected(words(4, 1)))


def test_a_device_that_is_unplugged_and_plugged_again(line, monkeypatch):
    monkeypatch.setattr(module, "RETRY", 0.1)
    driven = drive(line)
    first, second = words(5, 20), words(6, 20)
    line.send(encode_serial(first))
    driven.until(lambda: driven.count("words_in") == 20, "the first frames")
    line.unplug()
    driven.until(lambda: driven.problems, "word that it is gone")
    assert driven.problems[0].startswith(f"serial device {line.path}, io_group 1: disconnected (")
    assert driven.source.sockets == ()
    before = driven.source.due()
    assert before is not None
    driven.until(lambda: driven.source.due() > before, "another attempt")
    assert len(driven.problems) == 1, "said once"
    line.plug()
    driven.until(lambda: driven.source.sockets != (), "the device")
    line.send(encode_serial(second))
    driven.until(lambda: driven.count("words_in") == 40, "the second frames")
    assert "connected again after" in driven.problems[1]
    rows = driven.rows
    assert_same_rows(rows[rows["packet_type"] < 4], expected(np.concatenate((first, second))))


def test_bytes_sent_just_before_the_end_are_not_lost(line):
    driven = drive(line)
    line.send(encode_serial(words(7, 10)))
    line.unplug()
    driven.until(lambda: driven.source.sockets == (), "the disconnection")
    assert driven.count("words_in") in (0, 10), (
        "the kernel may drop all bytes of the line, but the source none that it got"
    )


def test_devices_that_cannot_be_used_are_named_in_errors(line, tmp_path):
    first = drive(line)
    with pytest.raises(ConfigError, match=f"serial device {line.path}: in use by another program"):
        drive(line)
    first.source.close()
    drive(line).source.close()
    absent = tmp_path / "ttyUSB7"
    with pytest.raises(ConfigError, match=f"serial device {absent}: no such device"):
        SerialSource(str(absent), asic=Asic.V2).open()
    plain = tmp_path / "file"
    plain.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"serial device {plain}: not a serial device"):
        SerialSource(str(plain), asic=Asic.V2).open()
    with pytest.raises(ConfigError, match="serial device /dev/null: not a serial device"):
        SerialSource("/dev/null", asic=Asic.V2).open()
    with pytest.raises(ConfigError, match="serial device /: "):
        SerialSource("/", asic=Asic.V2).open()


def test_a_device_without_permission_is_named_in_the_error(line, monkeypatch):
    def forbidden(*args, **kwargs):
        raise module.serial.SerialException(13, "could not open port: Permission denied")

    monkeypatch.setattr(module.serial, "Serial", forbidden)
    with pytest.raises(ConfigError, match="no permission"):
        SerialSource(str(line.path), asic=Asic.V2).open()
