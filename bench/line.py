"""Measure the whole line with real processes and sockets: packets/s, losses, and processor time.

    python bench/line.py [--seconds S] [--json]

Each row is one `larpixdaq demo`: emulated PACMANs, producer, storage, monitor and core as processes. "sent" is the
count of the emulated boards, "lost" its difference to the rows of the verified file. "cpu s" is the processor time of
all processes, including emulated boards and start-up.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

from common import argument_parser

from larpixdaq.runtime import launcher

#: Packets/s of all boards, number of boards, words per message.
CASES = (
    (5_000, 1, "1"),
    (200_000, 2, "auto"),
    (500_000, 2, "1"),
    (1_000_000, 2, "auto"),
    (4_000_000, 2, "1000"),
    (8_000_000, 4, "1000"),
)


def measure(rate: int, boards: int, words: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [
            "demo", "--json", "--seconds", str(seconds), "--rate", str(rate), "--io-groups", str(boards),
            "--words-per-message", words, "-o", folder,
        ]  # fmt: skip
        done = subprocess.run(
            launcher.command("cli", *command), capture_output=True, timeout=20 * seconds + 120, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout:
        raise SystemExit(done.stderr.decode())
    outcome = json.loads(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "asked": rate,
        "boards": boards,
        "words": words,
        "reached": outcome["packets_per_second"],
        "sent": outcome["sent"],
        "stored": outcome["stored"],
        "lost": outcome["lost"],
        "ok": outcome["ok"],
        "cpu_s": round(cpu, 2),
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each run (default %(default)g)")
    options = parser.parse_args()
    results = []
    if not options.json:
        print(f"{'asked/s':>10} {'boards':>6} {'words':>6} {'reached/s':>10} {'sent':>11} {'lost':>5} {'cpu s':>7}")
    for case in CASES:
        result = measure(*case, options.seconds)
        results.append(result)
        if not options.json:
            print(
                f"{result['asked']:>10} {result['boards']:>6} {result['words']:>6} {result['reached']:>10} "
                f"{result['sent']:>11} {result['lost']:>5} {result['cpu_s']:>7}{'' if result['ok'] else '  NOT OK'}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
