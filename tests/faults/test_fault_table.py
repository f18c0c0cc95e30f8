"""One short trial of each row of the fault table, and a short soak, with `pytest -m faults`.

The long versions are bench/faults.py and bench/soak.py.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from trial_processes import LIMIT, ROWS, Outcome, obstacle, trials

from larpixdaq.sources.data_quality import FINDINGS

pytestmark = pytest.mark.faults

SEED = 3
#: Short faults at a low rate. Trials mostly wait, so that several can run at the same time on a small machine.
SHORT = {"rate": 50_000.0, "longest": 2.0, "before": 0.5, "after": 0.5, "ring": "128MiB"}
JOBS = max(4, (os.cpu_count() or 1) + 1)


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Trials of all selected rows, some at a time in the background."""
    selected = [item.callspec.params["row"] for item in request.session.items if item.name.startswith("test_fault[")]
    kept: Path = tmp_path_factory.mktemp("failed-trials")
    with trials(SHORT, kept, JOBS) as made:
        yield {row: made.submit(row, SEED) for row in selected if not obstacle(row)}


SOAK = "--minutes 0.25 --run 8 --rate 1e5 --boards 2 --words auto --ring 128MiB --rotate 3s --seconds 1 --every 0.5"


@pytest.mark.timeout(LIMIT)
def test_soak(outcomes: object, tmp_path: Path) -> None:
    """A short soak, while the trials run in the background."""
    script = Path(__file__).parents[2] / "bench" / "soak.py"
    command = [
        sys.executable,
        str(script),
        *SOAK.split(),
        "--keep",
        str(tmp_path),
        "--report",
        str(tmp_path / "report"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report").read_text())
    assert len(report["runs"]) >= 2
    assert sum(report["faults"].values()) >= 2
    assert {"core", "producer", "offline_storage", "run_data", "log"} <= report["memory"].keys()


def test_every_finding_is_counted_as_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of findings of bench/faults.py recognizes each finding by its text, whatever its numbers are."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    kinds = importlib.import_module("faults").finding_kinds()
    for finding in FINDINGS.values():
        text = finding.text.format(events=12, amount=345, seconds=6.789)
        assert len([kind for kind, pattern in kinds.items() if pattern.fullmatch(text)]) == 1, text


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("row", ROWS)
def test_fault(row: str, outcomes: dict[str, Future[Outcome]]) -> None:
    if reason := obstacle(row):
        pytest.skip(reason)
    outcome = outcomes[row].result()
    report = "\n".join([*outcome.failures, *outcome.reasons, *outcome.gaps, *outcome.events, f"kept in {outcome.kept}"])
    assert outcome.ok, report
