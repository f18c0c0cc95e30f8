"""IO classes in the style of larpix-control, which the process of an IO class imports by name."""

import os
import time
from pathlib import Path

from bidict import bidict
from larpix.io import IO
from larpix.packet import MessagePacket, Packet_v2, SyncPacket, TimestampPacket, TriggerPacket

BEGAN = 1_700_000_000
COUNT = 1_500  # more packets than fit into one message


def data_packet(number, io_group, io_channel=3):
    packet = Packet_v2()
    packet.packet_type, packet.chip_id, packet.channel_id, packet.timestamp = 0, 11, number % 64, number
    packet.assign_parity()
    packet.io_group, packet.io_channel, packet.receipt_timestamp = io_group, io_channel, 10 * number
    return packet


class Echo(IO):
    """Returns packets of all kinds, then all packets sent to it. Its process ends when the file `last` exists."""

    def __init__(self, last="", count=COUNT):
        super().__init__()
        assert isinstance(count, int)
        self._io_group_table = bidict({2: "here", 7: "there"})
        self._last = Path(last or "/nothing")
        self._packets = []
        for io_group in (2, 7):
            began = TimestampPacket(BEGAN)
            began.io_group = io_group
            self._packets += [began, *(data_packet(number, io_group) for number in range(count))]
        self._packets += [
            SyncPacket(b"H", 1, 500, io_group=2),
            TriggerPacket(b"\x02", 600, io_group=7),
            data_packet(1, 9),  # of an unknown io_group
            MessagePacket("none of a chip's", 0),
        ]

    def send(self, packets):
        if packets[0].chip_id == 99:
            raise RuntimeError("no such chip\nhere")
        for packet in packets:
            packet.receipt_timestamp = 1 << 40 if packet.chip_id == 98 else 7
        self._packets += packets

    def empty_queue(self):
        if self._last.exists():
            os._exit(5)
        packets, self._packets = self._packets, []
        return packets, b""


class Plain:
    """Has only the methods that an IO class needs; send() hangs."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def start_listening(self):
        pass

    def send(self, packets):
        time.sleep(60)

    def empty_queue(self):
        return [], b""


class Slow(Plain):
    """Returns three packets, one each 0.1 s."""

    left = 3

    def empty_queue(self):
        if not self.left:
            return [], b""
        time.sleep(0.1)
        self.left -= 1
        return [data_packet(self.left, None)], b""


class Broken(Echo):
    def start_listening(self):
        raise OSError(19, "no such board", "here")
