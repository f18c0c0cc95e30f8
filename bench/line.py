"""The whole line with real processes and sockets: packets/s without loss, and what they cost.

    python bench/line.py [--seconds S] [--json]

Each row is one `larpixdaq demo`: emulated PACMANs, producer, storage, monitor and core in processes of their own.
"sent" is the emulated boards' own count, "lost" its difference to the rows of the verified file, "cpu s" processor time
of all processes, the emulated boards' and the start-up too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

from larpixdaq.runtime import launcher

#: packets/s of all boards, boards, words a message
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each run (default %(default)g)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    if not options.json:
        print(f"{'asked/s':>10} {'boards':>6} {'words':>6} {'reached/s':>10} {'sent':>11} {'lost':>5} {'cpu s':>7}")
    for case in CASES:
        one = measure(*case, options.seconds)
        results.append(one)
        if not options.json:
            print(
                f"{one['asked']:>10} {one['boards']:>6} {one['words']:>6} {one['reached']:>10} {one['sent']:>11} "
                f"{one['lost']:>5} {one['cpu_s']:>7}{'' if one['ok'] else '  NOT OK'}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    return 0 if all(one["ok"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
