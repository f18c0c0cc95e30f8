"""The wires between the hosts of network.py: passes, loses or delays IP packets between TUN devices.

    python packet_forwarder.py SEED CAPTURE NAMESPACE=DESCRIPTOR ...

Every packet that is passed is also appended to the file CAPTURE, unless that is "".
Host k has the address that ends in k + 1. A line of JSON on stdin sets the fault between two hosts, such as
{"between": [0, 1], "drop": 0.05, "delay": 0.2, "cut": false}. The answer is a line with the numbers of packets passed
and lost so far. When stdin ends, also because the parent process was killed, the namespaces are removed.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import select
import subprocess
import sys
import time
from typing import BinaryIO

#: Maximum packets read from one device in a turn.
BATCH = 64


class Forwarder:
    def __init__(self, seed: int, capture: BinaryIO | None, devices: list[int]) -> None:
        self._random = random.Random(seed)
        self._capture = capture
        self._devices = devices
        self._faults: dict[frozenset[int], dict[str, float]] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self.passed = 0
        self.lost = 0

    def run(self) -> None:
        poller = select.poll()
        for descriptor in (0, *self._devices):
            poller.register(descriptor, select.POLLIN)
        text = b""
        while True:
            timeout = None
            if self._waiting:
                timeout = max(0.0, self._waiting[0][0] - time.monotonic()) * 1000
            ready = {descriptor for descriptor, _ in poller.poll(timeout)}
            if 0 in ready:
                more = os.read(0, 65_536)
                if not more:
                    return
                *lines, text = (text + more).split(b"\n")
                for line in lines:
                    self._order(json.loads(line))
            for host, descriptor in enumerate(self._devices):
                if descriptor in ready:
                    self._take(host, descriptor)
            self._deliver()

    def _order(self, order: dict[str, object]) -> None:
        between = order.pop("between")
        self._faults[frozenset(between)] = order  # type: ignore[arg-type, assignment]
        print(json.dumps({"passed": self.passed, "lost": self.lost}), flush=True)

    def _take(self, host: int, descriptor: int) -> None:
        for _ in range(BATCH):
            try:
                packet = os.read(descriptor, 65_536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue  # IPv6 messages of the kernel
            to = packet[19] - 1
            if not 0 <= to < len(self._devices):
                continue
            fault = self._faults.get(frozenset((host, to)), {})
            if fault.get("cut") or self._random.random() < fault.get("drop", 0.0):
                self.lost += 1
                continue
            self.passed += 1
            if self._capture is not None:
                self._capture.write(packet)
            if delay := fault.get("delay", 0.0):
                self._number += 1
                heapq.heappush(self._waiting, (time.monotonic() + delay, self._number, to, packet))
            else:
                self._send(to, packet)

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(self._waiting)
            self._send(to, packet)

    def _send(self, to: int, packet: bytes) -> None:
        try:
            os.write(self._devices[to], packet)
        except OSError:
            self.lost += 1  # the queue of the device is full


def main() -> None:
    names, _, descriptors = zip(*(argument.partition("=") for argument in sys.argv[3:]), strict=True)
    try:
        with contextlib.ExitStack() as stack:
            capture = stack.enter_context(open(sys.argv[2], "wb")) if sys.argv[2] else None
            Forwarder(int(sys.argv[1]), capture, [int(descriptor) for descriptor in descriptors]).run()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
