"""Metadata for the file catalogues of the field: attributes of /meta, and the entry of a file in MetaCat's form.

Scripts of larpix-control's users read `run`, `subrun`, `data_stream`, `created` and `modified` from the group /meta of
a file, and make of them the JSON that the catalogue takes. What only a laboratory knows (namespace, type of run,
retention) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from larpixdaq.version import VERSION

#: Subruns of a run in catalogues of near detectors: a subrun is 10,000 times the run, plus its number from 1.
_SUBRUNS: Final = 10_000
#: Data tiers: board messages, and rows.
RAW_TIER: Final = "raw"
PACKET_TIER: Final = "decoded-raw"


def subrun(run: int, part: int) -> int | None:
    """Return the subrun of a part: 10,000 times the run, plus the number of the part from 1.

    None after 9,999 parts, because the number would be that of the next run.
    """
    return _SUBRUNS * run + part + 1 if part + 1 < _SUBRUNS else None


def attributes(run: int, part: int, kind: str) -> dict[str, Any]:
    """Return run, subrun and data_stream (the kind of the run) as attributes of /meta; unknown ones are left out."""
    found = {"run": run, "subrun": subrun(run, part), "data_stream": kind}
    return {name: value for name, value in found.items() if value}


def entry(info: Mapping[str, Any], kind: str, tier: str) -> dict[str, Any]:
    """Return the catalogue's metadata of a file. `info`: the row of /run/info of its part; `kind`: that of the run."""
    number = subrun(info["run"], info["part"])
    found = {
        "core.application.family": "larpix",
        "core.application.name": "larpix-daq",
        "core.application.version": VERSION,
        "core.data_tier": tier,
        "core.data_stream": kind,
        "core.file_format": "hdf5",
        "core.start_time": info["opened_ns"] / 1e9,
        "core.end_time": info["closed_ns"] / 1e9,
        "core.runs": [info["run"]],
        "core.runs_subruns": [] if number is None else [number],
    }
    return {name: value for name, value in found.items() if value}
