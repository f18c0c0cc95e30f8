"""The fault table: what happens in the middle of a run, hundreds of times, and what becomes of the packets.

    python bench/faults.py [--trials N] [--rows NAME,...] [--seed S] [--rate R] [--jobs J] [--report FILE.json]
                           [--update docs/reliability.md] [--findings docs/reliability.md]

Each trial is a whole system of real processes with emulated PACMANs at 500,000 packets/s, if the row says nothing else;
the fault comes at a random moment, is healed, and the run is ended. "sent" is the boards' own count of words, "stored"
the rows of them in all parts of the run, "counted" what the ledger says was lost, "unaccounted" the rest, "doubled"
blocks that are in the files twice. A trial fails when a row's promise is not kept; what it leaves behind is kept in
--keep, and the exit status is 1. The rows are functions in tests/faults/*_faults.py. --findings counts how often each
kind
of evidence for a loss at the board's side was given although nothing was lost.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/faults"))

from marks import machine, update
from trial_processes import ROWS, Outcome, impossible, late, trials

from larpixdaq.sources.data_quality import FINDINGS

MARK = "fault table"
FINDINGS_MARK = "findings"
#: Undisturbed runs are taken so many times as often for the findings, since wrong ones are rare.
UNDISTURBED = 10
#: What the connection to a board says.
PRESENCE = (
    "board disconnected",
    "board never connected",
    "board connected but silent, without any heartbeat",
)


def span(values: Iterable[float | None]) -> str:
    """The smallest and largest of these seconds."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    low, high = min(there), max(there)
    return f"{low:.2f} s" if len(there) == 1 else f"{low:.2f} to {high:.2f} s"


def table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown, a line a row of the fault table."""
    lines = [
        "| fault | must | trials | failed | sent | stored | counted lost | unaccounted | doubled | read | condition |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in ROWS.values():
        mine = [one for one in outcomes if one.row == row.name]
        if not mine:
            continue
        numbers = [sum(getattr(one, name) for one in mine) for name in ("sent", "stored", "counted", "unaccounted")]
        lost, stuck = span(one.lost_after for one in mine), span(one.stuck_after for one in mine)
        read = [f"{what} after {seconds}" for what, seconds in (("lost", lost), ("stuck", stuck)) if seconds]
        conditions = sorted({one.condition for one in mine if one.condition})
        failed = sum(not one.ok for one in mine)
        cells = [row.fault, row.must, str(len(mine)), str(failed), *(f"{n:,}" for n in numbers)]
        cells += [str(sum(one.doubled for one in mine)), "; ".join(read), "; ".join(conditions)]
        lines.append(f"| {' | '.join(cells)} |")
    total = [sum(getattr(one, name) for one in outcomes) for name in ("sent", "stored", "counted", "unaccounted")]
    failed = sum(not one.ok for one in outcomes)
    cells = ["all", "", str(len(outcomes)), str(failed), *(f"{n:,}" for n in total)]
    lines.append(f"| {' | '.join([*cells, str(sum(one.doubled for one in outcomes)), '', ''])} |")
    return "\n".join(lines)


def finding_kinds() -> dict[str, re.Pattern[str]]:
    """The sentences in /ledger/verdicts, by what they say."""
    kinds = {
        re.sub(r"\{\w+\}", "N", finding.text): re.compile(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(finding.text)))
        for finding in FINDINGS.values()
    }
    return {text: re.compile(text) for text in PRESENCE} | kinds


def findings_table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown, a line a kind of finding: in how many trials that lost nothing it was given."""
    whole = [one for one in outcomes if one.condition and not one.unaccounted and not one.counted]
    quiet = [one for one in whole if one.row == "undisturbed"]
    faults = [one for one in whole if one.row != "undisturbed"]
    lines = [
        f"| finding | of {len(quiet)} undisturbed runs | of {len(faults)} runs with a fault and no loss | which |",
        "| --- | ---: | ---: | --- |",
    ]
    for text, pattern in finding_kinds().items():
        found = [sum(any(pattern.search(gap) for gap in one.gaps) for one in some) for some in (quiet, faults)]
        rows = dict.fromkeys(ROWS[one.row].fault for one in faults if any(pattern.search(gap) for gap in one.gaps))
        lines.append(f"| {text} | {found[0]} | {found[1]} | {'; '.join(rows)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, rows: Sequence[str], report: dict[str, Any]) -> list[Outcome]:
    setup: dict[str, Any] = {"rate": options.rate, "longest": options.seconds}
    outcomes: list[Outcome] = []
    with trials(setup, options.keep, options.jobs) as made:
        # Round after round through all rows: a run that is cut short has something of each.
        more = {"undisturbed": (UNDISTURBED - 1) * options.trials} if options.findings else {}
        asked = [(row, n) for n in range(options.trials) for row in rows]
        asked += [(row, options.trials + n) for row in rows for n in range(more.get(row, 0))]
        waiting = [made.submit(row, options.seed + n) for row, n in asked]
        for number, future in enumerate(as_completed(waiting), 1):
            outcome = future.result()
            if options.jobs == 1 and (slow := late(outcome)):  # several at a time say nothing about times
                outcome.ok = False
                outcome.failures += slow
            outcomes.append(outcome)
            print(f"{number}/{len(waiting)} {line(outcome)}", file=sys.stderr, flush=True)
            if options.report:
                report["trials"] = [vars(one) for one in outcomes]
                options.report.write_text(json.dumps(report, indent=1))
    return outcomes


def line(one: Outcome) -> str:
    first = f"{one.row}, seed {one.seed}, {one.seconds:.0f} s: sent {one.sent}, unaccounted {one.unaccounted}"
    if one.ok:
        return f"{first}: as promised"
    return "\n    ".join([f"{first}: FAILED", *one.failures, *one.reasons, *one.events, f"kept in {one.kept}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--trials", type=int, default=10, metavar="N", help="of each row (default %(default)d)")
    add("--rows", metavar="NAME,...", help=f"only these of: {', '.join(ROWS)}")
    add("--seed", type=int, default=1, metavar="S", help="the first trial's; each further one has the next")
    add("--rate", type=float, default=500_000.0, metavar="R", help="packets/s (default %(default)g)")
    add(
        "--seconds", type=float, default=10.0, metavar="S", help="longest time that a fault lasts (default %(default)g)"
    )
    add("--jobs", type=int, default=1, metavar="J", help="trials at a time (default 1; times are judged only then)")
    add("--report", type=Path, metavar="FILE", help="write everything about every trial there, as JSON")
    add("--update", type=Path, metavar="FILE", help=f"put the table between the marks '{MARK}' in this document")
    add("--findings", type=Path, metavar="FILE", help=f"put the table of findings between the marks '{FINDINGS_MARK}'")
    add(
        "--keep",
        type=Path,
        default=Path("failed-trials"),
        metavar="DIR",
        help="for failed trials (default %(default)s)",
    )
    options = parser.parse_args()
    rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: no such row: {', '.join(unknown)}")
    if cannot := [f"{row}: {impossible(row)}" for row in rows if impossible(row)]:
        parser.error("; ".join(cannot))
    options.keep = options.keep.absolute()
    command = f"python bench/faults.py --trials {options.trials} --seed {options.seed} --rate {options.rate:g}"
    command += f" --seconds {options.seconds:g} --jobs {options.jobs}" + (
        f" --rows {options.rows}" if options.rows else ""
    )
    report: dict[str, Any] = {"command": command, "machine": machine(), "began": time.time()}
    outcomes = run(options, rows, report)
    text = f"{table(outcomes)}\n\n`{command}`, {time.strftime('%Y-%m-%d', time.gmtime())}, {machine()}."
    print(text)
    if options.update:
        update(options.update, MARK, text)
    if options.findings:
        told = f"{findings_table(outcomes)}\n\n`{command}`, {time.strftime('%Y-%m-%d', time.gmtime())}, {machine()}."
        print(told)
        update(options.findings, FINDINGS_MARK, told)
    return 0 if all(one.ok for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
