"""The fault table: cause faults in the middle of runs, hundreds of times, and count the packets that were lost.

    python bench/faults.py [--trials N] [--rows NAME,...] [--seed S] [--rate R] [--jobs J] [--report FILE.json]
                           [--update docs/reliability.md] [--findings docs/reliability.md]

Each trial is a whole system of real processes with emulated PACMANs, at 500,000 packets/s unless the row has another
rate. The fault comes at a random moment and is repaired, then the run is ended. "sent" is the boards' count of words,
"stored" the number of their rows in all parts of the run, "counted" the losses in the ledger, "unaccounted" the rest,
and "doubled" the number of blocks that are in the files twice. A trial fails when the promise of its row is broken;
then its files stay in --keep, and the exit status is 1. The rows are functions in tests/faults/*_faults.py. --findings
counts how often each kind of evidence for a loss before the producer was reported without any loss.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from common import argument_parser, machine, update, with_source
from trial_processes import ROWS, Outcome, obstacle, timing_failures, trials

from larpixdaq.sources.data_quality import FINDINGS

MARK = "fault table"
FINDINGS_MARK = "findings"
#: Number of undisturbed trials for the findings, in units of --trials, because wrong findings are rare.
UNDISTURBED = 10
#: A number in the text of a finding, such as {events} or {seconds:.2f}.
NUMBER = re.compile(r"\{\w+[^}]*\}")
#: Findings from the connection to a board.
PRESENCE = (
    "board disconnected",
    "board never connected",
    "board connected but silent, without any heartbeat",
)


def span(values: Iterable[float | None]) -> str:
    """Return the smallest and the largest time as text."""
    seconds = [value for value in values if value is not None]
    if not seconds:
        return ""
    low, high = min(seconds), max(seconds)
    return f"{low:.2f} s" if len(seconds) == 1 else f"{low:.2f} to {high:.2f} s"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the fault table in Markdown."""
    lines = [
        "| fault | must | trials | failed | sent | stored | counted lost | unaccounted | doubled | read | condition |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in ROWS.values():
        trials_ = [outcome for outcome in outcomes if outcome.row == row.name]
        if not trials_:
            continue
        numbers = [
            sum(getattr(trial, name) for trial in trials_) for name in ("sent", "stored", "counted", "unaccounted")
        ]
        lost, stuck = span(trial.lost_after for trial in trials_), span(trial.stuck_after for trial in trials_)
        read = [f"{what} after {seconds}" for what, seconds in (("lost", lost), ("stuck", stuck)) if seconds]
        conditions = sorted({trial.condition for trial in trials_ if trial.condition})
        failed = sum(not trial.ok for trial in trials_)
        cells = [row.fault, row.must, str(len(trials_)), str(failed), *(f"{n:,}" for n in numbers)]
        cells += [str(sum(trial.doubled for trial in trials_)), "; ".join(read), "; ".join(conditions)]
        lines.append(f"| {' | '.join(cells)} |")
    total = [
        sum(getattr(outcome, name) for outcome in outcomes) for name in ("sent", "stored", "counted", "unaccounted")
    ]
    failed = sum(not outcome.ok for outcome in outcomes)
    cells = ["all", "", str(len(outcomes)), str(failed), *(f"{n:,}" for n in total)]
    lines.append(f"| {' | '.join([*cells, str(sum(outcome.doubled for outcome in outcomes)), '', ''])} |")
    return "\n".join(lines)


def finding_kinds() -> dict[str, re.Pattern[str]]:
    """Return the patterns of the sentences in /ledger/verdicts, by their text."""
    kinds = {
        NUMBER.sub("N", finding.text): re.compile(r"[\d.]+".join(map(re.escape, NUMBER.split(finding.text))))
        for finding in FINDINGS.values()
    }
    return {text: re.compile(text) for text in PRESENCE} | kinds


def findings_table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table of the number of trials without losses in which each kind of finding was reported."""
    whole = [outcome for outcome in outcomes if outcome.condition and not outcome.unaccounted and not outcome.counted]
    quiet = [outcome for outcome in whole if outcome.row == "undisturbed"]
    faults = [outcome for outcome in whole if outcome.row != "undisturbed"]
    lines = [
        f"| finding | of {len(quiet)} undisturbed runs | of {len(faults)} runs with a fault and no loss | which |",
        "| --- | ---: | ---: | --- |",
    ]
    for text, pattern in finding_kinds().items():
        with_finding = [[trial for trial in part if any(map(pattern.search, trial.gaps))] for part in (quiet, faults)]
        rows = dict.fromkeys(ROWS[trial.row].fault for trial in with_finding[1])
        lines.append(f"| {text} | {len(with_finding[0])} | {len(with_finding[1])} | {'; '.join(rows)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, rows: Sequence[str], report: dict[str, Any]) -> list[Outcome]:
    setup: dict[str, Any] = {"rate": options.rate, "longest": options.seconds}
    outcomes: list[Outcome] = []
    with trials(setup, options.keep, options.jobs) as made:
        # The rows take turns, so that an interrupted run has trials of each.
        more = {"undisturbed": (UNDISTURBED - 1) * options.trials} if options.findings else {}
        order = [(row, n) for n in range(options.trials) for row in rows]
        order += [(row, options.trials + n) for row in rows for n in range(more.get(row, 0))]
        waiting = [made.submit(row, options.seed + n) for row, n in order]
        for number, future in enumerate(as_completed(waiting), 1):
            outcome = future.result()
            if options.jobs == 1 and (slow := timing_failures(outcome)):  # parallel trials disturb each other's times
                outcome.ok = False
                outcome.failures += slow
            outcomes.append(outcome)
            print(f"{number}/{len(waiting)} {line(outcome)}", file=sys.stderr, flush=True)
            if options.report:
                report["trials"] = [vars(outcome) for outcome in outcomes]
                options.report.write_text(json.dumps(report, indent=1))
    return outcomes


def line(trial: Outcome) -> str:
    first = f"{trial.row}, seed {trial.seed}, {trial.seconds:.0f} s: sent {trial.sent}, unaccounted {trial.unaccounted}"
    if trial.ok:
        return f"{first}: passed"
    return "\n    ".join([f"{first}: FAILED", *trial.failures, *trial.reasons, *trial.events, f"kept in {trial.kept}"])


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    add = parser.add_argument
    add("--trials", type=int, default=10, metavar="N", help="trials of each row (default %(default)d)")
    add("--rows", metavar="NAME,...", help=f"only these of: {', '.join(ROWS)}")
    add("--seed", type=int, default=1, metavar="S", help="of the first trial; each further trial has the next seed")
    add("--rate", type=float, default=500_000.0, metavar="R", help="packets/s (default %(default)g)")
    add("--seconds", type=float, default=10.0, metavar="S", help="maximum length of a fault (default %(default)g)")
    add("--jobs", type=int, default=1, metavar="J", help="parallel trials (default 1; times are checked only with 1)")
    add("--report", type=Path, metavar="FILE", help="write all results to this JSON file")
    add("--update", type=Path, metavar="FILE", help=f"write the table into this document, at the marks '{MARK}'")
    add("--findings", type=Path, metavar="FILE", help=f"write the table of findings at the marks '{FINDINGS_MARK}'")
    add(
        "--keep",
        type=Path,
        default=Path("failed-trials"),
        metavar="DIR",
        help="directory for the files of failed trials (default %(default)s)",
    )
    options = parser.parse_args()
    rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: no such row: {', '.join(unknown)}")
    if cannot := [f"{row}: {obstacle(row)}" for row in rows if obstacle(row)]:
        parser.error("; ".join(cannot))
    options.keep = options.keep.absolute()
    command = f"python bench/faults.py --trials {options.trials} --seed {options.seed} --rate {options.rate:g}"
    command += f" --seconds {options.seconds:g} --jobs {options.jobs}" + (
        f" --rows {options.rows}" if options.rows else ""
    )
    report: dict[str, Any] = {"command": command, "machine": machine(), "began": time.time()}
    outcomes = run(options, rows, report)
    text = with_source(table(outcomes), command)
    print(text)
    if options.update:
        update(options.update, MARK, text)
    if options.findings:
        findings = with_source(findings_table(outcomes), command)
        print(findings)
        update(options.findings, FINDINGS_MARK, findings)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
