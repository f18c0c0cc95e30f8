"""larpix-control as a second implementation, to compare packets, rows and files with."""

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings have invalid escape sequences, reported at the first import
    from larpix import Packet_v1, Packet_v2, SyncPacket, TimestampPacket, TriggerPacket
    from larpix.format import hdf5format, message_format, pacman_msg_format
    from larpix.io.serialport import SerialPort

__all__ = [
    "Packet_v1",
    "Packet_v2",
    "SerialPort",
    "SyncPacket",
    "TimestampPacket",
    "TriggerPacket",
    "hdf5format",
    "message_format",
    "packets_v2",
    "pacman_msg_format",
    "read_back",
    "rows_2_4",
]


def packets_v2(words: np.ndarray, *, diagnostics: bool = False) -> list[Any]:
    packets = []
    for word in words.tolist():
        packet = Packet_v2(word.to_bytes(8, "little"))
        packet.fifo_diagnostics_enabled = diagnostics
        packets.append(packet)
    return packets


def rows_2_4(path: Path, packets: list[Any]) -> np.ndarray:
    """Return the rows that larpix-control writes for these packets."""
    hdf5format.to_file(str(path), packets, version="2.4", workers=1)
    with h5py.File(path) as file:
        return file["packets"][:]


def read_back(path: Path, rows: np.ndarray, version: str) -> list[Any]:
    """Return the packets that larpix-control reads from a file with these rows."""
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": version, "created": 0.0, "modified": 0.0})
        file.create_dataset("packets", data=rows)
        file.create_dataset("messages", shape=(0,), dtype=[("message", "S64"), ("timestamp", "u8"), ("index", "u4")])
    return hdf5format.from_file(str(path))["packets"]
