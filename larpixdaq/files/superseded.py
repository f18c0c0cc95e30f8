"""A run whose storage lost its name to another one, which went on in another directory.

The part of the first one says `superseded from`: what it holds, its successor may hold too, since it cannot know which
of its last acknowledgements counted. What both have counts once, in the successor's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from larpixdaq._native import chunks
from larpixdaq.blocks import Source
from larpixdaq.files import ledger
from larpixdaq.files.part import Part
from larpixdaq.files.reader import DataFile


def joined(parts: Sequence[Part]) -> list[Part]:
    """The parts of a run as if one storage had written them all, one behind the other; as they are when none was
    superseded, or when they stand in one directory. FileError when a part cannot be read."""
    left = {part.path.parent for part in parts if part.superseded}
    homes: dict[Path, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.number):
        homes.setdefault(part.path.parent, []).append(part)
    if not left or len(homes) == 1:
        return list(parts)
    order = sorted(homes, key=lambda home: (home not in left, homes[home][0].opened_ns))
    found: list[Part] = []
    for home in order:
        first = found[-1].number + 1 if found else 0
        found += [part._replace(number=first + part.number) for part in homes[home]]
    return _without_copies(found, left)


def _without_copies(parts: list[Part], left: set[Path]) -> list[Part]:
    """Blocks of parts in these directories that later parts have too are taken out, as if they had never come."""
    there: set[tuple[Source, int]] = set()
    found: list[Part] = []
    for part in reversed(parts):
        with DataFile(part.path) as file:
            blocks = list(_blocks(file))
            if part.path.parent in left:
                copies = [(key, row) for key, row in blocks if key in there]
                part = _without(part, file, copies) if copies else part
        there |= {key for key, _ in blocks}
        found.append(part)
    return sorted(found, key=lambda part: part.number)


def _blocks(file: DataFile) -> Iterator[tuple[tuple[Source, int], Any]]:
    producers, run = file.producers(), int(file.run_info()["run"])
    for row in file.table("run/blocks"):
        yield (file.source(row, producers, run), int(row["sequence"])), row


def _without(part: Part, file: DataFile, copies: list[tuple[tuple[Source, int], Any]]) -> Part:
    counts = {key: dict(line) for key, line in part.counts.items()}
    rows = 0
    for (source, _), block in copies:
        first, n = int(block["first_row"]), int(block["rows"])
        tally = ledger.new_tally()
        if file.layout is not None:
            chunks.tally(file.packets(first, first + n).view(np.uint8), file.layout.code, tally)
        stored = ledger.stored(tally)
        for group in np.flatnonzero(stored).tolist():
            if (source, group) in counts:
                counts[source, group]["stored"] -= int(stored[group])
        rows += n
    missing = [*part.missing, *_stretches(sorted(key for key, _ in copies))]
    return part._replace(rows=part.rows - rows, counts=counts, missing=missing)


def _stretches(keys: list[tuple[Source, int]]) -> Iterator[tuple[Source, int, int]]:
    """(source, first, behind the last) of sorted blocks."""
    first = keys[0]
    for before, after in pairwise([*keys, (keys[-1][0], -1)]):
        if after != (before[0], before[1] + 1):
            yield first[0], first[1], before[1] + 1
            first = after
