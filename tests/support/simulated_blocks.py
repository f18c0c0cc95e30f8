"""A producer's blocks with correct totals, and the monitor's clock, in place of a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq.protocol.stream import Block, End, Gap, Totals

START_NS = 1_700_000_000_000_000_000


class Producer:
    """Makes headers with correct running totals for rows."""

    def __init__(
        self, run: int = 7, name: str = "LArPix board", epoch: int = 1, layout: schema.RowLayout = schema.LAYOUTS[1]
    ) -> None:
        self.run, self.name, self.epoch, self.layout = run, name, epoch, layout
        self.sequence = self.rows = 0
        self.counts: dict[int, dict[str, int]] = {}
        self.last_ns = START_NS

    def block(
        self, rows: NDArray[Any], first: float, last: float, text: str | None = None
    ) -> tuple[Block, NDArray[Any]]:
        """Return a block whose rows arrived from `first` to `last` seconds after the start."""
        for io_group in np.unique(rows["io_group"]).tolist() if self.layout.code != 1 else [1]:
            group_rows = rows[rows["io_group"] == io_group] if self.layout.code != 1 else rows
            counts = self.counts.setdefault(io_group, dict.fromkeys(constants.COUNTS, 0))
            if text is not None:
                counts["info_rows"] += len(group_rows)
                continue
            counts["word_rows"] += len(group_rows)
            counts["packets"] += len(group_rows)
            counts["bad_parity"] += int((group_rows["valid_parity"] == 0).sum())
        totals = [
            Totals(g, c["packets"], c["word_rows"] + c["info_rows"], c["bad_parity"], c["unknown_words"], c["dropped"])
            for g, c in self.counts.items()
        ]
        self.last_ns = START_NS + round(last * 1e9)
        header = Block(
            run=self.run,
            producer=self.name,
            epoch=self.epoch,
            sequence=self.sequence,
            first_packet=self.rows,
            rows=len(rows),
            layout=self.layout.code,
            flags=0,
            first_ns=START_NS + round(first * 1e9),
            last_ns=self.last_ns,
            crc32=0,
            totals=totals,
            gaps=[],
            text=text,
        )
        self.sequence += 1
        self.rows += len(rows)
        return header, rows

    def info(self, words: str, at: float, recorded: int | None = None) -> tuple[Block, NDArray[Any]]:
        """Return an INFO message. `recorded`: its recorded time (unix seconds), in a replay."""
        rows = np.zeros(1, self.layout.dtype)
        rows["timestamp"] = int(START_NS / 1e9 + at) if recorded is None else recorded
        rows["type" if self.layout.code == 1 else "packet_type"] = 5
        return self.block(rows, at, at, words)

    def end(self, how: str = "closed") -> End:
        counts = [[g, *c.values()] for g, c in self.counts.items()]
        gaps = [Gap(1, 0, 0, 0)]
        return End(self.run, self.name, self.epoch, self.sequence, how, START_NS, self.last_ns, counts, gaps, [])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
