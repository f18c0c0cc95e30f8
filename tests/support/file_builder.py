"""Rows, blocks and end records with a correct ledger, as a producer sends them, for tests of files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq._native import hdf5_chunks, word_codec
from larpixdaq.buffer.block_builder import info_rows
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.packed_rows import PackedRows, new_tally
from larpixdaq.runtime.record_file import crc32

V1, V2, CLOCK64, V3 = schema.LAYOUTS
ASIC = {V1: schema.Asic.V1, V2: schema.Asic.V2, CLOCK64: schema.Asic.V2, V3: schema.Asic.V3}
NS = 1_795_331_571_000_000_000


def words_to_rows(
    words: NDArray[np.uint64], layout: schema.RowLayout, io_group: int, direction: int = 1
) -> NDArray[Any]:
    rows = np.zeros(len(words), layout.dtype)
    made = word_codec.decode(
        words, rows, asic=ASIC[layout], io_group=io_group, io_channel=17, receipt=12345, direction=direction
    )
    return rows[:made]


def packed_rows(rows: NDArray[Any], layout: schema.RowLayout = V2) -> PackedRows:
    """Pack rows like a chunk, by zlib, so that the packed rows are known from those of the writer."""
    counts = new_tally()
    hdf5_chunks.tally(rows.view(np.uint8), layout.code, counts)
    data = zlib.compress(rows.view(np.uint8).reshape(len(rows), -1).T.tobytes(), 1)
    return PackedRows(memoryview(data), zlib.crc32(data), zlib.crc32(rows.view(np.uint8)), counts)


def random_rows(rng: np.random.Generator, n: int, layout: schema.RowLayout = V2) -> NDArray[Any]:
    """Return rows of all types except 5 (messages): io_groups 1 and 2, received and sent, right and wrong parity."""
    words = rng.integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, n, dtype=np.uint64)
    if layout is V3:
        words |= np.uint64(1)
    elif layout is V1:
        words &= np.uint64((1 << 54) - 1)
    right = word_codec.parity(words, asic=ASIC[layout])
    words = np.where(rng.random(n) < 0.9, right, words)
    groups = rng.integers(1, 3, n)
    sent = rng.random(n) < 0.05
    rows = np.zeros(n, layout.dtype)
    for group in (1, 2):
        for direction in (0, 1):
            mine = (groups == group) & (sent == (direction == 0))
            rows[mine] = words_to_rows(words[mine], layout, group, direction)
    kinds = rng.random(n)
    for kind, low, high in ((4, 0.9, 0.95), (6, 0.95, 0.97), (7, 0.97, 1.0)):
        if layout is V1 and kind != 4:
            continue
        for i in np.flatnonzero((kinds >= low) & (kinds < high)):
            rows[i] = np.zeros((), layout.dtype)
            rows[i]["type" if layout is V1 else "packet_type"] = kind
            rows[i]["timestamp"] = 1_795_331_571
            if layout is V1:
                rows[i]["chip_key"] = f"{groups[i]}-0-0".encode()
            else:
                rows[i]["io_group"] = groups[i]
                rows[i]["trigger_type"] = 83 if kind == 6 else 2 if kind == 7 else 0
                rows[i]["direction"] = kind > 5
    return rows


def count(rows: NDArray[Any]) -> dict[int, dict[str, int]]:
    """Count rows as the ledger does, with numpy only: io_group -> name -> number."""
    if "chip_key" in rows.dtype.names:
        groups = np.array([int(key.split(b"-")[0] or 0) for key in rows["chip_key"]], int)
        kinds = rows["type"]
    else:
        groups, kinds = rows["io_group"].astype(int), rows["packet_type"]
    received = (kinds <= 3) & (rows["direction"] == 1)
    masks = {
        "word_rows": received | (kinds == 6) | (kinds == 7),
        "packets": received,
        "bad_parity": received & (rows["valid_parity"] == 0),
        "time_rows": kinds == 4,
        "info_rows": kinds == 5,
        "sent_rows": (kinds <= 3) & (rows["direction"] != 1),
        "other_rows": kinds > 7,
    }
    return {
        int(group): {name: int(np.count_nonzero(mask & (groups == group))) for name, mask in masks.items()}
        for group in np.unique(groups)
    }


class Feed:
    """Makes the blocks of one origin in order, and its end record with the right totals."""

    def __init__(self, run: int = 42, producer: str = "LArPix board", epoch: int = 7, layout: schema.RowLayout = V2):
        self.origin = stream.BlockOrigin(run, producer, epoch)
        self.layout = layout
        self.sequence = 0
        self.first_packet = 0
        self.rows: list[NDArray[Any]] = []

    def block(self, rows: NDArray[Any], text: str | None = None, **changes: Any) -> tuple[stream.Block, NDArray[Any]]:
        block = stream.Block(
            run=self.origin.run,
            producer=self.origin.producer,
            epoch=self.origin.epoch,
            sequence=self.sequence,
            first_packet=self.first_packet,
            rows=len(rows),
            layout=self.layout.code,
            flags=0,
            first_ns=NS + self.sequence,
            last_ns=NS + self.sequence + 1,
            crc32=crc32(rows.view(np.uint8)),
            totals=[],
            gaps=changes.pop("gaps", []),
            text=text,
        )
        self.sequence += 1
        self.first_packet += len(rows)
        self.rows.append(rows)
        return block, rows

    def info(self, text: str) -> tuple[stream.Block, NDArray[Any]]:
        return self.block(info_rows(text, self.layout, 1_795_331_571), text)

    def end(self, how: str = "closed", **changes: Any) -> stream.End:
        rows = np.concatenate([*self.rows, np.zeros(0, self.layout.dtype)])
        counts = []
        for group, numbers in count(rows).items():
            c = dict.fromkeys(constants.COUNTS, 0)
            c.update({name: n for name, n in numbers.items() if name in c})
            c["messages"], c["header_bytes"] = c["time_rows"], 8 * c["time_rows"]
            c["words_in"], c["word_bytes"] = c["word_rows"], 16 * c["word_rows"]
            c["bytes_in"] = c["header_bytes"] + c["word_bytes"]
            c.update(changes.get("counts", {}).get(group, {}))
            counts.append([group, *c.values()])
        return stream.End(
            run=self.origin.run,
            producer=self.origin.producer,
            epoch=self.origin.epoch,
            next=self.sequence,
            how=how,
            first_ns=NS,
            last_ns=NS + 10**9,
            counts=counts,
            gaps=changes.get("gaps", []),
            unknown=changes.get("unknown", []),
            outside=changes.get("outside", []),
            verdicts=changes.get("verdicts", []),
        )


def run_info(layout: schema.RowLayout = V2, run: int = 42, **changes: Any) -> RunInfo:
    asic = {V1: "1", V3: "3"}.get(layout, "2")
    info = RunInfo(run, "test", "cosmics", "somebody", NS, layout, asic, versions={"larpixdaq": "0.3.0"})
    return info._replace(**changes)


def write(directory: Path, feed: Feed, sizes: list[int], seed: int = 1, **closing: Any) -> tuple[Any, NDArray[Any]]:
    """Write and close a file with blocks of these sizes between two INFO messages. Returns its report and all rows."""
    rng = np.random.default_rng(seed)
    file = RunFile(directory, run_info(feed.layout, feed.origin.run))
    file.add(*feed.info("Beginning run"))
    for size in sizes:
        file.add(*feed.block(random_rows(rng, size, feed.layout)))
    file.add(*feed.info("Ending run"))
    file.end(feed.end())
    return file.close(**closing), np.concatenate(feed.rows)


def timed(block, rows, first_s, last_s):
    """Set the times of a block, in seconds after NS."""
    return msgspec.structs.replace(block, first_ns=NS + round(first_s * 1e9), last_ns=NS + round(last_s * 1e9)), rows


def data_rows(n, first_s, last_s, *, io_group=1, chips=(11, 12), seed=0, layout=V2, offset=0):
    """Return data packets that a board receives evenly in this time; `offset`: ticks by which its clock is ahead."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, layout.dtype)
    rows["io_group"], rows["io_channel"], rows["direction"], rows["valid_parity"] = io_group, 3, 1, 1
    rows["chip_id"], rows["channel_id"] = rng.choice(chips, n), rng.integers(0, 64, n)
    rows["dataword"] = rng.integers(20, 40, n)
    rows["packet_type"] = layout is V3
    seconds = first_s + (last_s - first_s) * (np.arange(n) + 0.5) / n
    rows["receipt_timestamp"] = (np.rint(seconds * 10_000_000).astype(np.int64) + offset) % (1 << 32)
    rows["timestamp"] = rows["receipt_timestamp"]
    return rows


def board(file, feeds, seconds, rate, *, first_s=0.0, pieces=50, **how):
    """Let each feed, a board of its own io_group, send data packets at a rate for some seconds."""
    for piece in range(round(seconds * pieces)):
        begin = first_s + piece / pieces
        for io_group, feed in feeds.items():
            rows = data_rows(
                round(rate * io_group / pieces), begin, begin + 1 / pieces, io_group=io_group, seed=piece, **how
            )
            file.add(*timed(*feed.block(rows), begin, begin + 1 / pieces))


def two_boards():
    return {group: Feed(producer=f"board {group}", epoch=group) for group in (1, 2)}
