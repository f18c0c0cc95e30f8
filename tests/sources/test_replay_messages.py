"""INFO texts of recorded files: replayed where they stood, and rows again only in the new file."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info
from source_driver import Driver, closing, same

from larpixdaq.hdf5 import recordings
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import text_pieces
from larpixdaq.schema import Asic
from larpixdaq.sources.replay import ReplaySource

__all__ = ["closing"]  # a fixture

#: Of one piece, of several, with characters that do not end where a piece would, empty, and twice the same.
TEXTS = ["Beginning run", "long " * 40, "\u00e9" * 100, "", "same", "same", "Ending run"]


def own_file(folder: Path) -> tuple[Path, np.ndarray, list[tuple[int, str]]]:
    """A file of ours with TEXTS; its rows without theirs, and each with the number of those before it."""
    rng = np.random.default_rng(5)
    feed = Feed()
    file = RunFile(folder, run_info())
    parts, told = [], []
    for text in TEXTS:
        rows = np.zeros(len(text_pieces(text, 64)), feed.layout.dtype)
        rows["packet_type"], rows["timestamp"] = 5, 1_795_331_571
        file.add(*feed.block(rows, text))
        told.append((sum(map(len, parts)), text))
        if text != "same":
            parts.append(random_rows(rng, 50))
            file.add(*feed.block(parts[-1]))
    file.end(feed.end())
    return file.close().path, np.concatenate(parts), told


@pytest.mark.parametrize("piece", [7, 64, 65_536])
def test_texts_of_our_own_file_come_in_order(tmp_path, monkeypatch, piece):
    """However the file is read in pieces."""
    path, rows, told = own_file(tmp_path)
    monkeypatch.setattr(recordings, "_PIECE_ROWS", piece)
    driven = Driver(ReplaySource([(1, path)], asic=Asic.V2, speed=math.inf))
    same(driven.to_the_end(), rows)
    assert driven.texts == told
    assert set(driven.text_times) == {1_795_331_571}
    assert driven.source.problems() == []


def test_texts_come_again_at_recorded_speed(tmp_path):
    path, rows, told = own_file(tmp_path)
    driven = Driver(ReplaySource([(1, path)], asic=Asic.V2, speed=1e12))
    driven.until(lambda: driven.source.finished, "the end of the file")
    same(driven.rows, rows)
    assert driven.texts == told


def test_texts_that_are_not_there_are_counted(tmp_path):
    path, rows, told = own_file(tmp_path)
    with h5py.File(path, "r+") as file:
        lines = file["messages"][:5]
        del file["messages"]
        file["messages"] = lines
    driven = Driver(ReplaySource([(1, path)], asic=Asic.V2, speed=math.inf))
    same(driven.to_the_end(), rows)
    assert [at for at, _ in driven.texts] == [at for at, _ in told]
    assert driven.texts[:2] == told[:2]
    (problem,) = driven.source.problems()
    assert problem.startswith(f"{path}: ")
    assert problem.endswith("INFO rows without a text in /messages")
