"""open_run() on runs of the real storage: growing, rotated, and with a killed storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import LIMIT, until
from system import System, system

from larpixdaq import open_run


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def test_a_run_is_followed_through_its_parts_to_its_end(line: System) -> None:
    line.launch_core()
    line.launch_storage("--rotate", "3krows")
    operator = line.start("--fake", "3000")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: list(line.data.glob("*.part")), "the first part")
    found: list[np.ndarray] = []
    with open_run(line.data) as run:
        assert run.condition == "RUNNING"
        following = run.follow()
        while sum(map(len, found)) < 10_000:
            found.append(next(following))
        ended = operator.end_run().result(LIMIT)
        found += following
        assert (run.condition, run.is_growing, len(run.files)) == ("COMPLETE", False, len(ended["files"]))
        assert len(run.files) >= 3
        whole = np.concatenate([h5py.File(path)["packets"][:] for path in ended["files"]])
        assert np.array_equal(np.concatenate(found), whole)
        assert [line.text for line in run.messages()] == ["Beginning run", "Ending run"]
        (counted,) = [line for line in run.ledger if line.io_group == 1]
        assert counted.counts["packets"] == np.count_nonzero((whole["packet_type"] <= 3) & (whole["io_group"] == 1))
        assert [board.kind for board in run.sources] == ["fake"]


def test_all_acknowledged_rows_are_seen_after_the_death_of_the_storage(line: System) -> None:
    operator = line.start("--fake", "5000")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)

    def acknowledged() -> int:
        return int(line.status_of(operator, "storage").get("rows", 0))

    until(lambda: acknowledged() > 5000, "rows to be stored")
    with open_run(1, directory=line.data) as run:
        until(lambda: run.refresh() or run.rows > 5000, "rows to be seen")
        line.processes["offline_storage"].kill()
        run.refresh()
        assert not run.is_growing
        seen = run.read()
        assert len(seen) > 5000
        (part,) = line.data.glob("*.part")
        with h5py.File(part, swmr=True) as plain:
            assert plain["packets"].shape[0] < len(seen)  # the others are in the journal
        line.restart("offline_storage")
        until(lambda: run.refresh() or (len(run.files) > 1 and run.rows > len(seen)), "the next part")
        ended = operator.end_run().result(LIMIT)
        until(lambda: run.refresh() or (not run.is_growing and not list(line.data.glob("*.part"))), "all files")
        run.refresh()
        whole = np.concatenate([h5py.File(path)["packets"][:] for path in sorted(line.data.glob("*.h5"))])
        assert np.array_equal(run.read(), whole)
        assert np.array_equal(whole[: len(seen)], seen)
        assert run.condition == ended["condition"] == "COMPLETE"
