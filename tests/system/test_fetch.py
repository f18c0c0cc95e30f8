"""Late analysis of a past run: `larpixdaq fetch` writes its files from the streams at real brokers, with no core."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import Brokers, brokers
from file_builder import Feed
from stream_log import StreamLog, blocks
from system import rows_of

from larpixdaq import schema
from larpixdaq.hdf5.verify import verify
from larpixdaq.runtime.launcher import command

PRODUCERS = ("LArPix board", "board/2")


@pytest.fixture(scope="module")
def made() -> Iterator[Brokers]:
    """Brokers with run 41, complete, of two producers, and run 42, which one of them has not ended."""
    with brokers(1) as one:
        for epoch, name in enumerate(PRODUCERS, 7):
            log = StreamLog(one, name)
            for run in (41, 42):
                feed = Feed(run, name, epoch)
                log.publish(feed, [feed.info("Beginning run")])
                log.publish(feed, *([block] for block in blocks(feed, 3, 500, schema.CHUNK_ROWS, 100, seed=run)))
                if (run, name) != (42, PRODUCERS[1]):
                    log.publish(feed, [feed.info("Ending run"), feed.end()])
        yield one


def fetch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("cli", "fetch", *map(str, arguments)), capture_output=True, text=True, timeout=60, check=False
    )


def facts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_past_run_is_written_whole_and_only_once(made: Brokers, tmp_path: Path) -> None:
    done = fetch(41, "--stream", made.urls, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    run = facts(done)
    assert (run["condition"], sorted(run["producers"])) == ("COMPLETE", sorted(PRODUCERS))
    (path,) = map(Path, run["files"])
    report = verify(path)
    assert report.ok, report.findings
    kinds = rows_of(path)["packet_type"]
    assert len(kinds) == run["rows"] == 2 * (3 + 500 + schema.CHUNK_ROWS + 100 + 2)
    assert np.count_nonzero(kinds == 5) == 4
    again = fetch(41, "--stream", made.urls, "-o", tmp_path, "--json")
    assert again.returncode == 0, again.stderr
    assert facts(again) == run  # no further file


def test_a_run_that_has_not_ended_says_so(made: Brokers, tmp_path: Path) -> None:
    done = fetch(42, "--stream", made.urls, "-o", tmp_path)
    assert done.returncode == 1
    assert "run 42: INTERRUPTED" in done.stdout
    assert PRODUCERS[1] in done.stdout


def test_bad_input_is_one_clear_line(made: Brokers, tmp_path: Path) -> None:
    for arguments, words in (
        ((43, "--stream", made.urls, "-o", tmp_path), "run 43: the brokers have no messages of it"),
        ((41, "-o", tmp_path), "expected --stream"),
        ((41, "--stream", "nats://127.0.0.1:1", "-o", tmp_path), "no broker: 127.0.0.1:1"),
        ((41, "--stream", "http://a", "-o", tmp_path), "expected nats://"),
        ((41, "--stream", made.urls, "-o", tmp_path / "none"), "no such directory"),
        (("x", "--stream", made.urls), "RUN"),
    ):
        done = fetch(*arguments)
        assert done.returncode != 0, arguments
        assert words in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("*.h5*"))
