"""Measure the maximum rate of the line for different message sizes and numbers of boards, as a table and a picture.

    python bench/throughput.py [--boards N,...] [--words W,...] [--seconds S] [--plot FILE.png] [--json]

Measures each message size with the largest number of boards, then each number of boards with messages of 1000 words.
Each point is a run as in saturated.py. The picture needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import argument_parser, machine, temporary_system
from saturated import measure

WORDS = 1000


def measure_point(boards: int, words: int, seconds: float) -> dict[str, Any]:
    with temporary_system() as line:
        result = measure(line, boards, str(words), seconds, "512MiB")
    return {"boards": boards, "words": words, **result}


def plot(sizes: list[dict[str, Any]], numbers: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    left.loglog([point["words"] for point in sizes], [point["rate"] / 1e6 for point in sizes], "o-", color="tab:blue")
    left.set_xlabel("words a message")
    left.set_ylabel("million packets/s stored, 0 lost")
    left.set_title(f"{sizes[0]['boards']} boards", fontsize=10)
    right.plot(
        [point["boards"] for point in numbers], [point["rate"] / 1e6 for point in numbers], "s-", color="tab:orange"
    )
    right.set_xlabel("boards")
    right.set_title(f"{WORDS} words a message", fontsize=10)
    for axes in (left, right):
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--boards", default="1,2,4,8", metavar="N,...", help="numbers of boards (default %(default)s)")
    parser.add_argument(
        "--words", default="1,10,100,1000,4000", metavar="W,...", help="words per message (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="time of sending, s (default %(default)g)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the picture to this file")
    options = parser.parse_args()
    boards, words = (sorted(map(int, text.split(","))) for text in (options.boards, options.words))
    points = list(dict.fromkeys([(boards[-1], size) for size in words] + [(number, WORDS) for number in boards]))
    results = {}
    for number, size in points:
        result = results[number, size] = measure_point(number, size, options.seconds)
        if not options.json:
            print(
                f"{number} boards, {size:>5} words: {result['rate'] / 1e6:6.2f} M/s, {result['lost']} lost", flush=True
            )
    if options.plot:
        numbers = [result for (_, size), result in sorted(results.items()) if size == WORDS]
        plot([results[boards[-1], size] for size in words], numbers, options.plot)
    if options.json:
        print(json.dumps(list(results.values())))
    return 1 if any(result["lost"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
