"""What a file holds, in short, without reading its rows."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from larpixdaq import schema
from larpixdaq.configurations import READ, SENT
from larpixdaq.errors import FileError
from larpixdaq.files import configs, ledger
from larpixdaq.files.reader import DataFile, plain, text


def info(path: Path | str) -> dict[str, Any]:
    """A summary that json can write; times are UTC in ISO 8601, with `_ns` in unix ns.

    FileError when the file cannot be read.
    """
    with DataFile(path) as file:
        found: dict[str, Any] = {
            "path": str(file.path),
            "bytes": file.path.stat().st_size,
            "version": file.version,
            "layout": file.layout.name if file.layout else None,
            "rows": file.rows,
            "row_bytes": file.dtype.itemsize,
            "stored_bytes": file.stored_bytes,
            "created": _time(float(file.attribute("_header", "created"))),
            "modified": _time(float(file.attribute("_header", "modified"))),
            "own": file.own,
        }
        if file.own:
            found |= _run(file)
        return found


def _run(file: DataFile) -> dict[str, Any]:
    row = file.run_info()
    texts = file.texts()
    number = int(row["run"])
    producers = file.producers()
    counts = []
    for line in file.table("ledger/counts"):
        counts.append(plain(line) | {"producer": file.source(line, producers, number).producer})
    total = {name: sum(int(line[name]) for line in counts) for name in (*schema.COUNTS, "owed")}
    verdicts = [
        plain(line) | {"producer": file.source(line, producers, number).producer}
        for line in file.table("ledger/verdicts")
    ]
    gaps = file.table("ledger/gaps")
    chips = configs.newest(file.table("run/configs"))
    return {
        "run": number,
        "part": row["part"],
        "condition": row["condition"],
        "reasons": texts.pop("reason", []),
        "required_producers": list(dict.fromkeys(texts.pop("required producer", []))),
        "started": _time(row["started_ns"] / 1e9),
        "opened": _time(row["opened_ns"] / 1e9),
        "closed": _time(row["closed_ns"] / 1e9) if row["closed_ns"] else None,
        "started_ns": row["started_ns"],
        "closed_ns": row["closed_ns"],
        "begun": _time(row["begun_ns"] / 1e9) if row["begun_ns"] else None,
        "begun_ns": row["begun_ns"],
        "ended": _time(row["ended_ns"] / 1e9) if row["ended_ns"] else None,
        "ended_ns": row["ended_ns"],
        "live_s": row["live_ns"] / 1e9,
        "connected": [msgspec.to_builtins(one) for one in file.connected()],
        "duplicate_blocks": row["duplicate_blocks"],
        "missing_blocks": row["missing_blocks"],
        "blocks": file.length("run/blocks"),
        "texts": {name: values[-1] for name, values in texts.items()},
        "producers": producers,
        "messages": [text(line["message"]) for line in file.table("messages", 0, 100)],
        "ledger": counts,
        "totals": total | {"made": ledger.made(total)},
        "verdicts": verdicts,
        "gaps": {"rows": int(gaps["rows"].sum()), "number": len(gaps)},
        "chips": {
            "number": len(chips),
            "sent": int(np.count_nonzero(chips["known"] & SENT)),
            "read": int(np.count_nonzero(chips["known"] & READ)),
            "different": int(chips["different"].sum()),
        },
        "unknown_words_kept": file.length("ledger/unknown"),
    }


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        raise FileError(f"not a time: {seconds} s since 1970") from None
