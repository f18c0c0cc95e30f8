"""The soak: consecutive runs in one system, at half the maximum rate, with random faults all the time.

    python bench/soak.py [--minutes M] [--rate R] [--seed S] [--report FILE.json] [--update docs/reliability.md]

The faults are the rows of the fault table that lose no data and can be repeated. Files are rotated. The files of each
run are counted as in a trial and then removed, unless --keep-files is given. The report has the words sent, stored,
counted as lost and unaccounted for (0), the faults by kind, and memory and descriptors of all processes, which must not
grow. The exit status is 1 when words were unaccounted for or a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import argument_parser, machine, update, with_source
from loss_accounting import Tally, parts_of, tally
from memory_usage import Memory
from processes import until
from trial import STEP, Setup, Trial, keep, trial
from trial_processes import ROWS

MARK = "soak"
PROCESSES = ("core", "log", "offline_storage", "run_data", "producer")
#: Maximum seconds to store pending blocks after a run: a full spool of 8 GiB, on a disk that is read and written.
DELIVERY = 300.0
#: Minimum seconds of samples to judge growth, because all processes grow in the first minutes, and its limits.
LONG_ENOUGH = 600
MOST_MIB, MOST_DESCRIPTORS = 16, 3


@dataclass
class Run:
    number: int
    seconds: float
    sent: int = 0
    stored: int = 0
    counted: int = 0
    unaccounted: int = 0
    doubled: int = 0
    parts: int = 0
    condition: str = ""
    late: bool = False  # blocks that were pending at the end of the run were stored later
    faults: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Soak:
    def __init__(self, made: Trial, options: argparse.Namespace) -> None:
        self._trial = made
        self._options = options
        self._dice = made.faults.random
        self._rows = [row for row in ROWS.values() if row.repeatable]
        self.faults: Counter[str] = Counter()

    def run(self, number: int, seconds: float) -> Run:
        """Take a run, and count the rows in its files."""
        made, began = self._trial, time.monotonic()
        made.sent, made.failures, made.exact_monitor = {}, [], False
        if number > 1:
            made.board = made.make_board(self._options.seed + number, ports=made.board)
        made.begin()
        faults: Counter[str] = Counter()
        while time.monotonic() - began < seconds:
            made.faults.random_pause(2 * self._options.every)
            row = self._dice.choice(self._rows)
            row.act(made)
            faults[row.name] += 1
        self.faults += faults
        run = Run(number, 0.0, faults=dict(faults))
        ended = made.end()
        run.seconds = round(time.monotonic() - began, 1)
        run.late = ended["condition"] == "INTERRUPTED"
        if run.late:  # the storage had many pending blocks at the end of the run
            until(
                lambda: self._delivered(ended["run"]), "the blocks pending at the end of the run to be stored", DELIVERY
            )
            ended |= made.operator.run_info(run=ended["run"]).result(STEP)
        run.condition = ended["condition"]
        parts = parts_of([made.line.data], ended["run"])
        # In other processes, because reading needs memory and the interpreter, while the system continues.
        self._judge(run, tally(parts, os.cpu_count() or 1))
        if not (run.failures or self._options.keep_files):
            for path in made.line.data.glob(f"run{ended['run']:07d}_*"):
                path.unlink()
        return run

    def _delivered(self, number: int) -> bool:
        made = self._trial
        if made.status("producer").get("owed_blocks", 1) or list(made.line.data.glob(f"run{number:07d}_*.part")):
            return False
        return str(made.operator.run_info(run=number).result(STEP)["condition"]) != "INTERRUPTED"

    def _judge(self, run: Run, totals: Tally) -> None:
        sent = {group: counts["words"] for group, counts in self._trial.sent.items()}
        run.sent, run.stored, run.counted = (sum(n.values()) for n in (sent, totals.stored, totals.counted))
        run.unaccounted, run.doubled = sum(totals.unaccounted(sent).values()), totals.doubled
        run.parts = totals.parts
        run.failures += totals.problems + self._trial.failures
        # "suspect": times may jump between runs, because the clocks of boards that waited are late, and those of new
        # boards are not. INCOMPLETE: rows without room in ring and spool were counted as lost.
        good = ("COMPLETE", "COMPLETE, suspect", *(("INCOMPLETE",) if run.counted else ()))
        if run.condition not in good:
            run.failures.append(run.condition)
        if any(totals.unaccounted(sent).values()):
            run.failures.append(f"unaccounted for, by io_group: {totals.unaccounted(sent)}")
        if totals.doubled:
            run.failures.append(f"{totals.doubled} blocks are in the files twice")


def growth(memory: dict[str, dict[str, float]]) -> list[str]:
    """Return the processes whose memory or descriptors grew from the second to the last quarter of the time."""
    failures = []
    for key, use in memory.items():
        if use["samples"] < LONG_ENOUGH:
            continue
        if use["mib_growth"] > max(MOST_MIB, 0.1 * use["mib_median"]):
            failures.append(f"{key} grew by {use['mib_growth']:.0f} MiB")
        if use["fds_growth"] > MOST_DESCRIPTORS:
            failures.append(f"{key} has {use['fds_growth']:.0f} descriptors more")
    return failures


def text(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    runs: list[dict[str, Any]] = report["runs"]
    total = {name: sum(run[name] for run in runs) for name in ("sent", "stored", "counted", "unaccounted", "doubled")}
    seconds = sum(run["seconds"] for run in runs)
    lines = [
        f"{len(runs)} runs, {seconds / 60:.1f} minutes, {sum(run['parts'] for run in runs)} parts, "
        f"{sum(report['faults'].values())} faults, {total['sent'] / max(seconds, 1):,.0f} packets/s on average.",
        "",
        f"{sum(run.get('late', False) for run in runs)} of the runs ended with so many pending blocks that these were "
        "stored after the end of the run; their files were read then.",
        "",
        "| sent | stored | counted lost | unaccounted | doubled |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {' | '.join(f'{n:,}' for n in total.values())} |",
        "",
        "| fault | times |",
        "| --- | ---: |",
        *(f"| {ROWS[name].fault} | {n} |" for name, n in sorted(report["faults"].items())),
        "",
        "| process | memory, MiB: min / median / max | slope, MiB/h | descriptors: min / median / max | 1/h |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for key, use in report["memory"].items():
        memory, descriptors = (
            " / ".join(f"{use[f'{name}_{what}']:.0f}" for what in ("min", "median", "max")) for name in ("mib", "fds")
        )
        lines.append(f"| {key} | {memory} | {use['mib_slope']:+.1f} | {descriptors} | {use['fds_slope']:+.1f} |")
    failures = [f"- run {run['number']}: {failure}" for run in runs for failure in run["failures"]]
    failures += [f"- {failure}" for failure in growth(report["memory"])]
    lines += ["", *(["Failures:", "", *failures] if failures else ["No failures."])]
    return "\n".join(lines)


def soak(options: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    setup = Setup(
        rate=options.rate, boards=options.boards, words=options.words, longest=options.seconds, ring=options.ring,
        storage=("--rotate", options.rotate), disk=True, clock=True,
    )  # fmt: skip
    with trial(setup, options.seed, folder) as made, closing(Memory(made.line, PROCESSES)) as memory:
        soak_ = Soak(made, options)
        left, number = options.minutes * 60, 0
        while left > 0:
            number += 1
            try:
                run = soak_.run(number, min(left, options.run))
            except Exception as error:  # the soak ends, and its results are reported
                failure = "".join(traceback.format_exception(error, limit=-6)).strip()
                report["runs"].append(asdict(Run(number, 0.0, failures=[failure, *made.failures])))
                break
            finally:
                report["faults"] = dict(soak_.faults)
                report["memory"] = {key: use.summary() for key, use in memory.uses.items() if use.times}
            left -= run.seconds
            report["runs"].append(asdict(run))
            print(f"run {number}: {run}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, metavar="M", help="total length of the runs (default %(default)g)")
    add("--run", type=float, default=120.0, metavar="S", help="maximum seconds of a run (default %(default)g)")
    add("--rate", type=float, default=4e6, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--boards", type=int, default=4, metavar="N", help="number of boards (default %(default)d)")
    add("--words", default="1000", metavar="W", help="words per message, or auto (default %(default)s)")
    add("--ring", default="1GiB", metavar="SIZE", help="ring of the producer (default %(default)s)")
    add("--rotate", default="30s", metavar="LIMIT", help="option of the storage (default %(default)s)")
    add("--seconds", type=float, default=3.0, metavar="S", help="maximum length of a fault (default %(default)g)")
    add("--every", type=float, default=5.0, metavar="S", help="mean time between two faults (default %(default)g)")
    add("--seed", type=int, default=1, metavar="S", help="of the random numbers (default %(default)d)")
    add("--report", type=Path, metavar="FILE", help="write all results to this JSON file")
    add("--update", type=Path, metavar="FILE", help=f"write the report into this document, at the marks '{MARK}'")
    add("--directory", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    add(
        "--keep",
        type=Path,
        default=Path("failed-trials"),
        metavar="DIR",
        help="directory for the files of a failed soak (default %(default)s)",
    )
    add("--keep-files", action="store_true", help="do not remove the files of good runs")
    options = parser.parse_args()
    command = f"python bench/soak.py --minutes {options.minutes:g} --rate {options.rate:g} --seed {options.seed}"
    report: dict[str, Any] = {"command": command, "machine": machine(), "runs": [], "faults": {}, "memory": {}}
    with tempfile.TemporaryDirectory(prefix="larpixdaq-soak-", dir=options.directory) as above:
        folder = Path(above) / "soak"
        folder.mkdir()
        soak(options, folder, report)
        ok = bool(report["runs"]) and not any(run["failures"] for run in report["runs"])
        ok = ok and not growth(report["memory"])
        if not ok:
            print(f"kept in {keep(folder, options.keep.absolute(), 'soak')}", file=sys.stderr)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1))
    shown = with_source(text(report), command)
    print(shown)
    if options.update:
        update(options.update, MARK, shown)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
