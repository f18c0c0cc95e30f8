"""The soak of a cluster: a run over three real brokers, in which processes and brokers are killed by a seed.

    python bench/cluster_soak.py [--minutes M] [--rate R] [--seed S] [--json]

Eight emulated boards, two producers, three storages, each with a directory of its own, and a monitor. Storages,
uplinks, producers, the monitor and brokers, one broker at a time, are killed (SIGKILL) and started again. At the end
the files of each storage are counted with plain h5py against the boards' own count. The exit status is 1 when a row
that a producer had made is missing in the files of a storage, a block is there twice, or the run is not complete.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from common import argument_parser, update, with_source
from kill_cluster import KINDS, Result, cluster
from trial import keep

MARK = "cluster soak"


def text(result: Result) -> str:
    """Return the result in Markdown."""
    kills = ", ".join(f"{number} of {kind}" for kind, number in sorted(result.kills.items()))
    lines = [
        f"Run {result.run}: {result.condition}, {result.seconds / 60:.1f} minutes, {sum(result.kills.values())} kills: "
        f"{kills}.",
        "",
        "| sent by the boards | stored, by each storage | lost | doubled | before the ring | longest pause |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {result.sent:,} | {result.stored:,} | {result.lost:,} | {result.doubled:,} | {result.before_ring:,} "
        f"| {result.longest_pause:.1f} s |",
    ]
    return "\n".join([*lines, "", *(f"- {failure}" for failure in result.failures or ["No failures."])])


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, metavar="M", help="length of the run (default %(default)g)")
    add("--rate", type=float, default=100_000, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--every", type=float, default=2.0, metavar="S", help="mean time between two kills (default %(default)g)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed (default: all)")
    add("--seed", type=int, default=1, metavar="S", help="of the random numbers (default %(default)d)")
    add("--fsync", action="store_true", help="brokers sync each message")
    add("--update", type=Path, metavar="FILE", help=f"write the result into this document, at the marks '{MARK}'")
    add("--keep", type=Path, default=Path("failed-trials"), metavar="DIR", help="for the files of a failed run")
    options = parser.parse_args()
    result, notes = soak(options)
    if options.json:
        print(json.dumps({**asdict(result), "notes": notes}))
    else:
        shown = with_source(
            text(result),
            f"python bench/cluster_soak.py --minutes {options.minutes:g} --rate {options.rate:g} --seed {options.seed}",
        )
        print(shown)
        if options.update:
            update(options.update, MARK, shown)
    return 1 if result.failures else 0


def soak(options: argparse.Namespace) -> tuple[Result, list[str]]:
    with tempfile.TemporaryDirectory(prefix="larpixdaq-soak-", ignore_cleanup_errors=True) as above:
        folder = Path(above) / "soak"
        folder.mkdir()
        with cluster(folder, options.seed, rate=options.rate, fsync=options.fsync) as made:
            try:
                made.begin()
                made.kill_for(options.minutes * 60, options.kinds, options.every)
                result = made.end()
            except BaseException:
                print(*made.notes, sep="\n", file=sys.stderr)
                raise
        if result.failures:
            print(f"kept in {keep(folder, options.keep.absolute(), 'cluster')}", file=sys.stderr)
    return result, made.notes


if __name__ == "__main__":
    sys.exit(main())
