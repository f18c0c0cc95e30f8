"""Several files checked together: what one part of a run cannot say alone, its other parts may."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from larpixdaq import states
from larpixdaq.errors import FileError
from larpixdaq.files import layout, names, runs
from larpixdaq.files.reader import DataFile
from larpixdaq.files.runs import RunReport
from larpixdaq.files.verify import Report, verify

_GOOD = (states.COMPLETE, states.SUSPECT, states.ABORTED, layout.CONTINUED)


class Outcome(NamedTuple):
    files: list[Report]
    runs: list[RunReport]

    @property
    def ok(self) -> bool:
        return all(file.ok for file in self.files) and all(is_good(run) for run in self.runs)


def is_good(run: RunReport) -> bool:
    """COMPLETE, or as good as that: what the producers suspect, and that a run was aborted, is no fault of the files;
    and a run that goes on in parts that nobody asked for is good as far as it goes."""
    return run.condition in _GOOD


def verify_all(paths: Iterable[Path]) -> Outcome:
    """Check files, and all files of runs in directories. Of a run in a directory no part may be missing; of files, it
    is judged as far as they go. Directories are judged together: a storage may have lost its name to another one, which
    went on elsewhere. FileError when a directory cannot be read."""
    reports: dict[Path, Report] = {}
    given: dict[Path, bool] = {}  # whether it was found in a directory
    for path in map(Path, paths):
        if path.is_dir():
            found = [one for _, ending, one in names.run_files(path) if ending != names.JOURNAL]
            if not found:
                nothing = f"{path} is not a file, and holds no file of a run"
                reports[path] = Report(path, False, "", 0, 0, [nothing], [], [], None)
            given |= {one: True for one in found if one not in given}
        else:
            given[path] = False
    reports |= {path: verify(path) for path in given}
    groups: dict[tuple[int, str], list[Path]] = {}
    for path in given:
        if (whose := reports[path].run or _by_name(path)) is not None:
            groups.setdefault(whose, []).append(path)
    judged = []
    for (run, _), members in groups.items():
        whole = all(given[path] for path in members)
        if len(members) == 1 and not whole:
            judged.append(_alone(run, reports[members[0]]))
            continue
        judged.append(runs.judge(run, members, whole=whole))
        for path in members:
            reports[path] = _without_open(reports[path])
    return Outcome(list(reports.values()), judged)


def _by_name(path: Path) -> tuple[int, str] | None:
    """Of a file that cannot be read, what its name says."""
    name = names.parse(path.name)
    return None if name is None else (name.run, name.storage)


def _without_open(report: Report) -> Report:
    findings = [line for line in report.findings if line not in report.open]
    return report._replace(findings=findings, ok=not findings)


def _alone(run: int, report: Report) -> RunReport:
    try:
        with DataFile(report.path) as file:
            reasons = file.texts().get("reason", [])
    except FileError as error:
        reasons = [str(error)]
    condition = report.condition or layout.INTERRUPTED
    return RunReport(run, [report.path], condition, report.rows, [], reasons, [], [])
