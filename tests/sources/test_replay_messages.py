"""INFO texts of recorded files: replayed at their places between the rows."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info
from source_driver import assert_same_rows, close_sources, open_driver

from larpixdaq.hdf5 import recordings
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import text_pieces
from larpixdaq.schema import Asic
from larpixdaq.sources.replay import ReplaySource

__all__ = ["close_sources"]  # a fixture

#: Texts of one piece and of several, with characters across two pieces, an empty one, and the same one twice.
TEXTS = ["Beginning run", "long " * 40, "\u00e9" * 100, "", "same", "same", "Ending run"]


def own_file(folder: Path) -> tuple[Path, np.ndarray, list[tuple[int, str]]]:
    """Write a file with TEXTS. Returns its path, its rows without INFO rows, and (number of rows before it, text)."""
    rng = np.random.default_rng(5)
    feed = Feed()
    file = RunFile(folder, run_info())
    parts, placed = [], []
    for text in TEXTS:
        rows = np.zeros(len(text_pieces(text, 64)), feed.layout.dtype)
        rows["packet_type"], rows["timestamp"] = 5, 1_795_331_571
        file.add(*feed.block(rows, text))
        placed.append((sum(map(len, parts)), text))
        if text != "same":
            parts.append(random_rows(rng, 50))
            file.add(*feed.block(parts[-1]))
    file.end(feed.end())
    return file.close().path, np.concatenate(parts), placed


@pytest.mark.parametrize("piece", [7, 64, 65_536])
def test_texts_are_replayed_in_order(tmp_path, monkeypatch, piece):
    """The result does not depend on the pieces in which the file is read."""
    path, rows, placed = own_file(tmp_path)
    monkeypatch.setattr(recordings, "_PIECE_ROWS", piece)
    driven = open_driver(ReplaySource([(1, path)], asic=Asic.V2, speed=math.inf))
    assert_same_rows(driven.run_to_end(), rows)
    assert driven.texts == placed
    assert set(driven.text_times) == {1_795_331_571}
    assert driven.source.problems() == []


def test_texts_at_recorded_speed(tmp_path):
    path, rows, placed = own_file(tmp_path)
    driven = open_driver(ReplaySource([(1, path)], asic=Asic.V2, speed=1e12))
    driven.until(lambda: driven.source.finished, "the end of the file")
    assert_same_rows(driven.rows, rows)
    assert driven.texts == placed


def test_missing_texts_are_counted(tmp_path):
    path, rows, placed = own_file(tmp_path)
    with h5py.File(path, "r+") as file:
        lines = file["messages"][:5]
        del file["messages"]
        file["messages"] = lines
    driven = open_driver(ReplaySource([(1, path)], asic=Asic.V2, speed=math.inf))
    assert_same_rows(driven.run_to_end(), rows)
    assert [at for at, _ in driven.texts] == [at for at, _ in placed]
    assert driven.texts[:2] == placed[:2]
    (problem,) = driven.source.problems()
    assert problem.startswith(f"{path}: ")
    assert problem.endswith("INFO rows without a text in /messages")
