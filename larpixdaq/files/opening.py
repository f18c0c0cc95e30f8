"""The beginning of a file: what is known of its run, and what it says about itself before any row comes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from larpixdaq import schema
from larpixdaq.blocks import Source
from larpixdaq.files import layout
from larpixdaq.files.tables import Tables


class RunInfo(NamedTuple):
    """What is known of a run when its file is opened."""

    run: int
    kind: str
    comment: str
    operator: str
    started_ns: int  # unix ns
    layout: schema.Layout
    asic_version: str
    storage: str = ""  # the storage's name, empty for the first or only one
    versions: Mapping[str, str] = {}
    required_producers: tuple[str, ...] = ()


def describe(file: Any, tables: Tables, info: RunInfo, part: int, known: Mapping[Source, int]) -> None:
    """Fill in what a new file knows; `known` is where the run's sources stand after the parts before.

    /run/info comes last, when the rest is written: a file whose row of it is still empty has taken no block.
    """
    places: list[tuple[int, ...]] = []
    for source, place in known.items():
        tables.add_producer(source.producer)
        places.append((tables.producers[source.producer], source.epoch, place, place))
    tables.text("layout", info.layout.name)
    tell(tables, info)
    file.flush()
    tables.set_positions(places)
    row = np.zeros(1, layout.INFO)
    row["run"], row["part"], row["layout"] = info.run, part, info.layout.code
    row["condition"] = layout.RUNNING
    row["started_ns"], row["opened_ns"] = info.started_ns, time.time_ns()
    file.flush()
    file["run/info"][:] = row
    file.flush()


def tell(tables: Tables, info: RunInfo) -> None:
    """What people want to know of the run, into /run/texts."""
    for name in ("kind", "comment", "operator", "storage", "asic_version"):
        tables.text(name, getattr(info, name))
    for name, version in info.versions.items():
        tables.text(f"version {name}", version)
    for name in info.required_producers:
        tables.text("required producer", name)
