"""Configurations of chips as a file has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.blocks import Block, Source
from larpixdaq.configurations import SENT, unpack
from larpixdaq.errors import FileError
from larpixdaq.files import layout, names
from larpixdaq.files.journal import records
from larpixdaq.files.reader import DataFile

#: Registers of a chip, of those generations of which larpix-control has configurations in files.
REGISTERS_OF: Final = {"2": 237, "2b": 256, "lightpix-1": 239}
#: Columns that say which chip a row is of.
CHIP: Final = ["producer", "asic", "io_group", "io_channel", "chip_id"]


class Carried(NamedTuple):
    """What is known of the chips where a part ends: rows of its /run/configs, one a chip, and its /run/producers."""

    rows: NDArray[Any]
    producers: list[str]

    def of(self, sources: Iterable[Source]) -> Carried:
        """Those that these sources have told."""
        known = [(source.producer, source.epoch) for source in sources]
        told = [(self.producers[index], epoch) in known for index, epoch in self.rows[["producer", "epoch"]].tolist()]
        return self._replace(rows=self.rows[np.array(told, bool)])


NOTHING: Final = Carried(np.zeros(0, layout.CONFIGS), [])


def rows(block: Block, producer: int) -> NDArray[Any]:
    """The rows of /run/configs that a block with configurations brings; ProtocolError when it has none."""
    assert block.configs is not None
    found = unpack(block.configs)
    made = np.zeros(len(found.chips), layout.CONFIGS)
    made["producer"], made["epoch"], made["sequence"] = producer, block.epoch, block.sequence
    made["time_ns"], made["asic"] = block.first_ns, found.asic.encode("utf-8", "replace")
    made["io_group"], made["io_channel"], made["chip_id"] = found.chips.T
    made["sent"], made["read"], made["known"] = found.sent, found.read, found.known
    made["different"] = found.different.sum(axis=1)
    return made


def newest(table: NDArray[Any]) -> NDArray[Any]:
    """Of each chip the last row, in the order in which these came."""
    _, last = np.unique(table[CHIP][::-1], return_index=True)
    return table[np.sort(len(table) - 1 - last)]


def fitting(table: NDArray[Any], asic: str) -> NDArray[np.bool_]:
    """Which rows of /run/configs have one in /configs: chips of the generation `asic`, the only one that it can have,
    all of whose registers are known. Shape (N,)."""
    known = table["known"][:, : REGISTERS_OF.get(asic, 0)]
    fits: NDArray[np.bool_] = (table["asic"] == asic.encode()) & (asic in REGISTERS_OF) & (known != 0).all(axis=1)
    return fits


def as_larpix_control(table: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows of /configs for such of /run/configs. What a register was told counts, as in larpix-control's own files, or
    what it said when it was not told."""
    made = np.zeros(len(table), dtype)
    made["timestamp"] = table["time_ns"] // 10**9
    for name in ("io_group", "io_channel", "chip_id"):
        made[name] = table[name]
    registers = np.where(table["known"] & SENT != 0, table["sent"], table["read"])
    made["registers"] = registers[:, : dtype["registers"].shape[0]]
    return made


def of_part(path: Path) -> Carried:
    """Of a part, closed or not, and its journal; FileError when it cannot be read."""
    with DataFile(path) as file:
        producers, tables = file.producers(), [file.table("run/configs")]
    name = names.parse(path.name)
    assert name is not None
    journal = path.with_name(path.name.removesuffix(name.ending) + names.JOURNAL)
    for record in records(journal) if journal.exists() else ():
        if isinstance(record.frame, Block) and record.frame.configs is not None:
            if record.frame.producer not in producers:
                producers.append(record.frame.producer)
            tables.append(rows(record.frame, producers.index(record.frame.producer)))
    table = np.concatenate(tables)
    if len(table) and int(table["producer"].max()) >= len(producers):
        raise FileError(f"{path}: /run/configs names producer {table['producer'].max()} of {len(producers)}")
    return Carried(newest(table), producers)
