"""Measure the line with its storage and monitor on another host: with keys and with --insecure, packed and unpacked.

    python bench/hosts.py [--boards N] [--words W] [--seconds S] [--rate R] [--rounds R] [--json]

The hosts are network namespaces, joined by a pair of the kernel's virtual Ethernet devices. Without --rate, emulated
PACMANs send as fast as the producer receives their words (`--when-full wait`); with it they send R packets/s in all.
The kinds of lines take turns; in an "unpacked" one the consumers do not ask for packed rows. The figures are those of
saturated.py; "ns a packet" is its "ns". Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import argument_parser, machine
from network import PREFIX, Network, missing_rights
from null_line import OFFERED
from saturated import measure
from two_hosts import NAMES, two_hosts

#: Kind of line -> whether it uses no keys, and whether rows are packed. The last one is the measure of the others.
KINDS = {
    "keys": (False, True),
    "insecure": (True, True),
    "keys, unpacked": (False, False),
    "insecure, unpacked": (True, False),
}
#: Makes consumers neither read rings nor ask for packed rows. Python runs it at the start of each process.
UNPACKED = """\
from larpixdaq.stream import subscriber
subscriber.ProducerConnection._map_or_pack = lambda connection, welcome: ""
"""
#: Label of the storage in the names of its files.
LABEL = NAMES["offline_storage"].replace(" ", "-")


class Cable(Network):
    """Two hosts that are joined by a cable without faults, which is as fast as the machine."""

    def __init__(self, one: str, two: str) -> None:
        self.hosts = (one, two)
        self._names = [f"{PREFIX}-{os.getpid()}-cable-{host}" for host in self.hosts]
        for name in self._names:
            _ip("netns", "add", name)
        ends = [["name", "eth0", "netns", name] for name in self._names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, name in zip(self.hosts, self._names, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def close(self) -> None:
        for name in self._names:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def once(kind: str, options: Any) -> dict[str, Any]:
    insecure, packed = KINDS[kind]
    with (
        contextlib.closing(Cable("one", "two")) as net,
        tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        env = {}
        if not packed:
            (Path(folder) / "sitecustomize.py").write_text(UNPACKED)
            env["PYTHONPATH"] = os.pathsep.join([folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        line = stack.enter_context(two_hosts(Path(folder), net, insecure=insecure, env=env))
        rate = options.rate or OFFERED
        return measure(line, options.boards, options.words, options.seconds, "64MiB", rate=rate, label=LABEL)


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--boards", type=int, default=4, metavar="N", help="number of boards (default %(default)d)")
    add("--words", default="1000", metavar="W", help="words per message, or auto (default %(default)s)")
    add("--seconds", type=float, default=10.0, metavar="S", help="time of sending, s (default %(default)g)")
    add("--rate", type=float, default=0.0, metavar="R", help="packets/s of all boards (default: as many as possible)")
    add("--rounds", type=int, default=3, metavar="R", help="measurements of each kind (default %(default)d)")
    add("--kinds", default=";".join(KINDS), metavar="K;K", help="kinds of lines (default %(default)s)")
    options = parser.parse_args()
    if not set(options.kinds.split(";")) <= set(KINDS):
        parser.error(f"--kinds: expected some of {'; '.join(KINDS)}, found {options.kinds}")
    if reason := missing_rights():
        raise SystemExit(reason)
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.kinds.split(";")}
    for _ in range(options.rounds):
        for kind, found in results.items():
            found.append(once(kind, options))
            if not options.json:
                result = found[-1]
                cores = ", ".join(f"{key} {value:.2f}" for key, value in result["cores"].items())
                print(
                    f"{kind:>18}: {result['rate'] / 1e6:.3f} M/s, {result['sent']:,} sent, {result['lost']} lost, "
                    f"{result['condition']}, {result['ns']:.0f} ns a packet; cores: {cores}",
                    flush=True,
                )
    middle = {
        kind: {name: statistics.median(result[name] for result in found) for name in ("rate", "ns")}
        for kind, found in results.items()
    }
    last = list(middle)[-1]
    ratios = {kind: {name: middle[kind][name] / middle[last][name] for name in ("rate", "ns")} for kind in middle}
    if options.json:
        print(json.dumps({**results, "median": middle, "ratios": ratios, "machine": machine()}))
    else:
        for kind, ratio in ratios.items():
            print(
                f"{kind}: median {middle[kind]['rate'] / 1e6:.2f} M/s, {middle[kind]['ns']:.0f} ns a packet; "
                f"to {last}: rate {ratio['rate']:.2f}, time per packet {ratio['ns']:.2f}"
            )
        print(machine())
    good = all(r["condition"] == "COMPLETE" and not r["lost"] for found in results.values() for r in found)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
