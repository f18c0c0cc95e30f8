"""One closed part of a run, by its small tables alone: no row is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq.blocks import Source
from larpixdaq.errors import FileError
from larpixdaq.files.reader import DataFile, plain

#: The name of the text that a part gets whose storage lost its name to another one (superseded.py).
SUPERSEDED: Final = "superseded from"


class Part(NamedTuple):
    """What the tables of one part say."""

    path: Path
    number: int
    opened_ns: int  # unix ns
    superseded: bool  # another storage of its name went on, in another directory
    condition: str
    rows: int
    required: list[str]
    positions: dict[Source, tuple[int, int]]  # first, next
    ends: dict[Source, tuple[int, str]]  # next, how
    counts: dict[tuple[Source, int], dict[str, Any]]
    missing: list[tuple[Source, int, int]]
    doubts: list[str]
    damaged: list[str]


def read(path: Path) -> Part:
    """FileError when it cannot be read, or is none of ours."""
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        info, texts, producers = file.run_info(), file.texts(), file.producers()
        run = int(info["run"])

        def rows(name: str) -> Iterable[tuple[Source, dict[str, Any]]]:
            return ((file.source(row, producers, run), plain(row)) for row in file.table(name))

        return Part(
            path=path,
            number=info["part"],
            opened_ns=info["opened_ns"],
            superseded=SUPERSEDED in texts,
            condition=info["condition"],
            rows=info["rows"],
            required=texts.get("required producer", []),
            positions={source: (row["first"], row["next"]) for source, row in rows("run/positions")},
            ends={source: (row["next"], row["how"]) for source, row in rows("run/ends")},
            counts={(source, row["io_group"]): row for source, row in rows("ledger/counts")},
            missing=[(source, row["first"], row["next"]) for source, row in rows("run/missing")],
            doubts=[
                f"{describe(source)}, io_group {row['io_group']}: {row['verdict']}: {row['why']}"
                for source, row in rows("ledger/verdicts")
                if row["verdict"] != "complete"
            ],
            damaged=[f"{path.name}: {line}" for line in texts.get("damaged", [])],
        )


def describe(source: Source) -> str:
    return f"producer {source.producer!r}, epoch {source.epoch:x}"
