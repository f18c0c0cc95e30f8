"""The beginning of a file: what is known of its run, and what it says about itself before any row comes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np

from larpixdaq import schema
from larpixdaq.blocks import ConnectedBoard, Source
from larpixdaq.errors import FileError
from larpixdaq.files import layout
from larpixdaq.files.configs import NOTHING, Carried
from larpixdaq.files.reader import DataFile
from larpixdaq.files.tables import Tables

_VERSION: Final = "version "
#: Of the software that writes files.
VERSIONS: Final = {"h5py": h5py.version.version, "HDF5": h5py.version.hdf5_version}


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
    connected: tuple[ConnectedBoard, ...] = ()
    begun_ns: int = 0  # when RUN began, unix ns by the core's clock; 0: not yet


def describe(
    file: Any,
    tables: Tables,
    info: RunInfo,
    part: int,
    known: Mapping[Source, int],
    configurations: Carried = NOTHING,
) -> None:
    """Fill in what a new file knows; `known` is where the run's sources stand after the parts before, `configurations`
    what these have said of the chips.

    /run/info comes last, when the rest is written: a file whose row of it is still empty has taken no block.
    """
    places: list[tuple[int, ...]] = []
    for source, place in known.items():
        tables.add_producer(source.producer)
        places.append((tables.producers[source.producer], source.epoch, place, place))
    tables.text("layout", info.layout.name)
    tell(tables, info)
    tables.carry(configurations.of(known))
    file.flush()
    tables.set_positions(places)
    row = np.zeros(1, layout.INFO)
    row["run"], row["part"], row["layout"] = info.run, part, info.layout.code
    row["condition"] = layout.RUNNING
    row["started_ns"], row["begun_ns"], row["opened_ns"] = info.started_ns, info.begun_ns, time.time_ns()
    file.flush()
    file["run/info"][:] = row
    file.flush()


def tell(tables: Tables, info: RunInfo) -> None:
    """What people want to know of the run, into /run/texts."""
    for name in ("kind", "comment", "operator", "storage", "asic_version"):
        tables.text(name, getattr(info, name))
    for name, version in info.versions.items():
        tables.text(_VERSION + name, version)
    for name in info.required_producers:
        tables.text("required producer", name)
    tables.sources(info.connected)


def info_of(path: Path) -> RunInfo:
    """What a part says of its run; FileError when it cannot be read."""
    with DataFile(path) as file:
        try:
            return told(file.run_info(), file.texts())._replace(connected=tuple(file.connected()))
        except ValueError as error:
            raise FileError(f"{path}: /run/info: {error}") from None


def told(row: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> RunInfo:
    """What a part says of its run in its row of /run/info, and in /run/texts."""

    def newest(name: str) -> str:
        return texts.get(name, [""])[-1]

    return RunInfo(
        run=row["run"],
        kind=newest("kind"),
        comment=newest("comment"),
        operator=newest("operator"),
        started_ns=row["started_ns"],
        layout=schema.layout(row["layout"]),
        asic_version=newest("asic_version"),
        storage=newest("storage"),
        versions={name.removeprefix(_VERSION): found[-1] for name, found in texts.items() if name.startswith(_VERSION)},
        required_producers=tuple(dict.fromkeys(texts.get("required producer", []))),
        begun_ns=row["begun_ns"],
    )
