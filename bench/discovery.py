"""Measure how long the discovery and configuration of the networks of an emulated detector take.

    python bench/discovery.py [--boards 8] [--tiles 8] [--dead 0.05] [--broken 0.05] [--asic 2b]

The boards are one emulator process; a core and a producer do the work, as an Operator asks for it. Chips and links are
chosen at random. Prints two JSON objects: about discover_network and configure_network. The numbers of chips found and
of chips that links working both ways reach must be equal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import argument_parser, processor_seconds, temporary_system
from emulated_board import Emulator

from larpixdaq.emulators.network import TILE_CHIPS, Wiring, tile_wiring

#: Maximum seconds of an action.
LIMIT = 1800.0


def reachable(boards: dict[int, Wiring], planted: dict[str, list[str]]) -> int:
    """Return the number of chips that links reach from the boards, without the planted faults."""
    dead, cut = set(planted.get("dead_chips", ())), set[frozenset[str]]()
    for name in ("broken_links", "one_way_links"):
        cut |= {frozenset(link.split("/")) for link in planted.get(name, ())}
    total = 0
    for io_group, wiring in boards.items():
        keys = [f"{io_group}-{channel}-{chip_id}" for channel, chip_id in wiring.keys]
        links: dict[int, list[int]] = {chip: [] for chip in range(len(keys))}
        for a, _, b, _ in wiring.wires:
            if not {keys[a], keys[b]} & dead and frozenset((keys[a], keys[b])) not in cut:
                links[a].append(b)
        found = {root for _, root, _ in wiring.entries if keys[root] not in dead}
        queue = list(found)
        while queue:
            new = set(links[queue.pop()]) - found
            found |= new
            queue += new
        total += len(found)
    return total


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--boards", type=int, default=8, help="number of boards (default %(default)d)")
    parser.add_argument("--tiles", type=int, default=8, help="tiles of 100 chips per board (default %(default)d)")
    parser.add_argument("--dead", type=float, default=0.05, help="fraction of dead chips (default %(default)g)")
    parser.add_argument(
        "--broken",
        type=float,
        default=0.05,
        help="fraction of links that are broken in one direction (default %(default)g)",
    )
    parser.add_argument("--asic", default="2b", help="generation of the chips (default %(default)s)")
    parser.add_argument("--progress", action="store_true", help="print progress to stderr")
    args = parser.parse_args()
    chips = args.tiles * TILE_CHIPS
    wirings = {board: tile_wiring(chips, asic=args.asic) for board in range(1, args.boards + 1)}
    faults = {
        "--dead-chips": int(args.dead * args.boards * chips),
        "--one-way-links": int(args.broken * sum(len(wiring.links()) for wiring in wirings.values())),
    }
    options = [text for name, number in faults.items() if number for text in (name, str(number))]
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder, temporary_system() as line:
        os.chdir(folder)
        board = Emulator(
            "--io-groups", str(args.boards), "--chips", str(chips), "--asic", args.asic, "--power-on", *options
        )
        try:
            operator = line.start("--pacman", *board.addresses, "--asic", args.asic)
            producer = line.processes["producer"].popen.pid
            began = time.monotonic()
            request = operator.discover_network(str(Path(folder) / "found.json"))
            for response in request:
                if response.kind == "progress" and args.progress:
                    print(f"{time.monotonic() - began:6.1f} s: {response.text}", file=sys.stderr, flush=True)
            found = request.result(LIMIT)
            discovered = time.monotonic()
            result = {
                "tiles": args.boards * args.tiles,
                "chips": args.boards * chips,
                "reachable": reachable(wirings, board.planted),
                "found": found["chips"],
                "faults": len(found["faults"]),
                "state": found["state"],
                "discover_s": round(discovered - began, 1),
                "discover_processor_s": {
                    "emulator": round(processor_seconds(board.process.pid), 1),
                    "producer": round(processor_seconds(producer), 1),
                    "its child": round(sum(map(processor_seconds, children(producer))), 1),
                },
            }
            print(json.dumps(result), flush=True)
            configured = operator.configure_network().result(LIMIT)
            print(json.dumps({"configured": configured["ok"], "configure_s": round(time.monotonic() - discovered, 1)}))
            if not configured["ok"] or result["found"] != result["reachable"]:
                raise SystemExit("the found network is not the true one")
        finally:
            os.chdir("/")
            board.close()


if __name__ == "__main__":
    main()
