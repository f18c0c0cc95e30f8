"""Measure the web server with real processes and raw websocket viewers: processor time, delays, slow viewers, memory.

    python bench/web.py [--seconds S] [--samples N] [--updates N] [--update] [--json]

A run of emulated PACMANs with 409,600 channels at 1 M packets/s, of which each viewer shows the pixel map. "cores" is
processor time by wall time. Delays are from the event to the frame on a viewer's socket: of a word from its board's
socket until the monitor's summary has counted it, of a killed component, of a board that is killed, and of an alarm
from the time at which the core has raised it. The updates are taken with the shortest intervals that the server can
do, in place of two a second.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import STEP, argument_parser, begin_run, processor_seconds, temporary_system, update, with_source
from emulated_board import Emulator
from latency import TIMED, TimedBoard, word
from processes import until
from system import System
from web_viewer import LivePage, Viewer, is_open, launch_web, link_of, patched_web
from websockets.exceptions import ConnectionClosed

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "web.md"
MARK = "web server"
RATE, BOARDS, IO_CHANNELS, CHIPS = 1e6, 4, 32, 50
#: Seconds for which the maps of a viewer are timed before another one comes that takes nothing.
SLOW = 30.0
#: Seconds until every channel has sent.
SETTLE = 8.0
#: The server with the shortest intervals, for many updates in short time.
FAST = {"live__CORE_INTERVAL": 0.001, "live__MONITOR_INTERVAL": 0.001, "live___HASTE": 0.001}


class Watcher(threading.Thread):
    """A viewer in a thread of its own, which counts bytes and frames and decodes nothing."""

    def __init__(self, viewer: Viewer, **watch: Any) -> None:
        super().__init__(daemon=True)
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(viewer.socket())
        self._socket.send(json.dumps({"type": "watch", **watch}))
        self.bytes = self.texts = self.arrays = 0
        self.array_times: list[float] = []
        self.start()

    def run(self) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            while True:
                frame = self._socket.recv(decode=False)
                self.bytes += len(frame)
                if frame[:1] == b"{":
                    self.texts += 1
                else:
                    self.arrays += 1
                    self.array_times.append(time.monotonic())

    def close(self) -> None:
        self._stack.close()
        self.join(5)


def resident(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def logged_in(process: Any) -> Viewer:
    viewer = Viewer(link_of(process))
    status, answer = viewer.log_in()
    if status != 200:
        raise SystemExit(f"log-in: {answer}")
    return viewer


def shares(line: System, keys: tuple[str, ...], seconds: float) -> dict[str, float]:
    """Return the cores that processes use, over some seconds."""
    pids = {key: line.processes[key].popen.pid for key in keys if key in line.processes}
    before, began = {key: processor_seconds(pid) for key, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return {key: round((processor_seconds(pid) - before[key]) / took, 4) for key, pid in pids.items()}


def viewers(line: System, seconds: float) -> list[dict[str, Any]]:
    """Measure the processor time with no web server, and with 0, 1 and 10 viewers of the pixel map."""
    options = ["--rate", str(RATE / BOARDS), "--io-groups", str(BOARDS), "--words-per-message", "1000", "--lossless"]
    options += ["--io-channels", str(IO_CHANNELS), "--chips-per-io-channel", str(CHIPS), "--wait-for-go"]
    results = []
    with contextlib.closing(Emulator(*options)) as board:
        operator = begin_run(line, "--pacman", *board.addresses)
        board.go()
        time.sleep(SETTLE)
        keys = ("web", "run_data", "core", "producer", "offline_storage")
        results.append({"viewers": "no web server", **shares(line, keys, seconds)})
        web = launch_web(line)
        people = [logged_in(web) for _ in range(10)]  # each has an Operator of its own
        viewer = people[0]
        for number in (0, 1, 10):
            with contextlib.ExitStack() as stack:
                watchers = [
                    stack.enter_context(contextlib.closing(Watcher(one, pixels="rate"))) for one in people[:number]
                ]
                if watchers:
                    until(lambda some=watchers: all(one.arrays > 1 for one in some), "the pixel maps", STEP)
                time.sleep(2)
                before = [(one.bytes, one.arrays) for one in watchers]
                result: dict[str, Any] = {"viewers": number, **shares(line, keys, seconds)}
                if watchers:
                    sent = [one.bytes - start[0] for one, start in zip(watchers, before, strict=True)]
                    maps = [one.arrays - start[1] for one, start in zip(watchers, before, strict=True)]
                    result["kB_s"] = round(max(sent) / seconds / 1000)
                    result["maps_s"] = round(min(maps) / seconds, 2)
            results.append(result)
        seen = operator.packet_rate(channels=False).result(STEP)["seen"]
        with viewer.live() as page:
            page.watch(pixels="rate")
            page.until(lambda: "pixels" in page.arrays, "a pixel map")
            results[-1]["pixels"] = int(page.arrays["pixels"][1].size)
            results[-1]["seen"] = round(seen, 3)
        slow(viewer, results)
        board.stop()
        board.finish()
        operator.end_run().result(STEP)
    return results


def slow(viewer: Viewer, results: list[dict[str, Any]]) -> None:
    """Measure how long another viewer waits between two maps while one takes nothing, and when that one is closed."""
    with contextlib.closing(Watcher(viewer, pixels="rate")) as good, socket.socket() as bad:
        time.sleep(SLOW)
        before = longest_gap(good.array_times)
        good.array_times.clear()
        bad.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bad.connect((viewer.host, viewer.port))
        bad.sendall(
            f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nOrigin: {viewer.origin}\r\nCookie: {viewer.cookie}"
            "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
        )
        bad.sendall(masked(json.dumps({"type": "watch", "pixels": "rate"})))
        began, port = time.monotonic(), bad.getsockname()[1]
        until(lambda: is_open(viewer.port, port), "the viewer who takes nothing", STEP)
        until(lambda: not is_open(viewer.port, port), "the end of the viewer who takes nothing", STEP)
        took = time.monotonic() - began
        gaps = {"gap_before": before, "longest_gap": longest_gap(good.array_times)}
        results.append({"slow_viewer": True, **gaps, "closed_after": round(took, 1)})


def longest_gap(times: list[float]) -> float:
    return round(max(later - earlier for earlier, later in pairwise(times[1:])), 2)


def masked(text: str) -> bytes:
    """Return a text frame of a websocket client, with a mask of zeros."""
    data = text.encode()
    return bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data


def delay(page: LivePage, event: Callable[[], object], condition: Callable[[], Any], what: str) -> float:
    """Return the seconds from an event to a frame on the socket that shows it."""
    while page.take(0.001):  # what waits
        pass
    began = time.monotonic()
    event()
    page.until(condition, what, STEP)
    return time.monotonic() - began


def delays(line: System, samples: int) -> dict[str, Any]:
    with contextlib.closing(Emulator("--rate", "5000", "--words-per-message", "auto")) as busy:
        timed = TimedBoard()
        data, command = (busy.ready["1"][name] for name in ("data", "command"))
        operator = begin_run(
            line, "--pacman", f"1=127.0.0.1:{data}:{command}", f"{TIMED}=127.0.0.1:{timed.port}:{command}"
        )
        timed.await_subscriber()
        viewer = logged_in(launch_web(line))
        chance = random.Random(1)
        with viewer.live() as page:

            def counted() -> int:
                groups = (page.state["monitor"] or {}).get("io_groups", [])
                return sum(int(group["packets"]) for group in groups if group["io_group"] == TIMED)

            times = []
            for _ in range(samples):
                time.sleep(chance.random())
                before = timed.sent

                def send() -> None:
                    timed.sent += 1
                    timed._socket.send(word(timed.sent))

                times.append(delay(page, send, lambda n=before: counted() > n, "a word"))
            times.sort()

            def alive(kind: str) -> bool:
                return any(one["alive"] for one in page.state["status"]["components"] if one["kind"] == kind)

            killed = []
            for _ in range(5):
                killed.append(delay(page, line.processes["run_data"].kill, lambda: not alive("run_data"), "the loss"))
                line.restart("run_data")
                page.until(lambda: alive("run_data"), "the monitor again", STEP)
                time.sleep(chance.random())

            def away() -> bool:
                producers = [one for one in page.state["status"]["components"] if one["kind"] == "producer"]
                return any(board["away_since"] for one in producers for board in one["status"]["boards"])

            unplugged = delay(page, lambda: busy.stop(signal.SIGKILL), away, "the loss of the board")

            def raised() -> list[float]:
                return [one["raised"] for one in page.state["alarms"] if one["condition"] == "board-disconnected"]

            page.until(raised, "the alarm", STEP)
            alarm = time.time() - max(raised())
        timed.close()
        operator.abort_run().result(STEP)
    cuts = statistics.quantiles(times, n=100)
    return {
        "word_p50": round(cuts[49], 2), "word_p99": round(cuts[98], 2), "word_max": round(times[-1], 2),
        "killed_max": round(max(killed), 2), "unplugged": round(unplugged, 2), "alarm": round(alarm, 2),
    }  # fmt: skip


def many_updates(line: System, updates: int) -> dict[str, Any]:
    """Take many updates with the shortest intervals; the server's memory after a fifth of them, and at the end."""
    operator = begin_run(line, "--fake", "20000")
    with patched_web(line, **FAST) as process:
        viewer = logged_in(process)
        with contextlib.closing(Watcher(viewer, pixels="rate", histogram={}, packets={"count": 100})) as watcher:
            began = time.monotonic()
            memory: list[int] = []
            while watcher.texts < updates:
                time.sleep(0.2)
                if len(memory) < 50 * watcher.texts // updates:
                    memory.append(resident(process.popen.pid))
            took = time.monotonic() - began
    operator.abort_run().result(STEP)
    return {
        "updates": watcher.texts, "seconds": round(took), "MiB_after_a_fifth": round(memory[10] / 1024, 1),
        "MiB_at_the_end": round(memory[-1] / 1024, 1),
    }  # fmt: skip


def text(results: dict[str, Any]) -> str:
    """Return the results as tables of a document."""
    lines = [
        "| viewers of the 409,600-pixel map | web server, cores | monitor, cores | core, cores | kB/s each | maps/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in results["viewers"]:
        if "viewers" in one:
            cells = [one.get(key, "") for key in ("viewers", "web", "run_data", "core", "kB_s", "maps_s")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    slow_one = next(one for one in results["viewers"] if "slow_viewer" in one)
    found, many = results["delays"], results["updates"]
    lines += [
        "",
        "| what | result |",
        "| --- | --- |",
        f"| from a board's word to the socket of a viewer | median {found['word_p50']} s, 99 % {found['word_p99']} s, "
        f"longest {found['word_max']} s |",
        f"| a killed monitor on the socket, longest of 5 | {found['killed_max']} s |",
        f"| a board that is killed | {found['unplugged']} s |",
        f"| an alarm, after the core has raised it | {found['alarm']} s |",
        f"| longest time between two maps of a viewer, alone, and while another one takes nothing | "
        f"{slow_one['gap_before']} s, {slow_one['longest_gap']} s |",
        f"| the viewer who takes nothing is cut off | after {slow_one['closed_after']} s |",
        f"| memory of the web server over {many['updates']:,} updates | {many['MiB_after_a_fifth']} MiB after a fifth, "
        f"{many['MiB_at_the_end']} MiB at the end |",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, metavar="S", help="length of each measurement (default %(default)g)")
    add("--samples", type=int, default=200, metavar="N", help="timed words (default %(default)d)")
    add("--updates", type=int, default=100_000, metavar="N", help="updates of one page (default %(default)d)")
    add("--update", action="store_true", help="put the tables into docs/web.md")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[System], Any]] = {
        "viewers": lambda line: viewers(line, options.seconds),
        "delays": lambda line: delays(line, options.samples),
        "updates": lambda line: many_updates(line, options.updates),
    }
    for name, measure in parts.items():
        with temporary_system() as line:
            line.launch_core()
            line.operator()  # waits for the core
            line.launch_log()
            results[name] = measure(line)
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
    shown = text(results)
    print(json.dumps(results) if options.json else shown)
    if options.update:
        command = (
            f"python bench/web.py --seconds {options.seconds:g} --samples {options.samples} --updates {options.updates}"
        )
        update(DOCUMENT, MARK, with_source(shown, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
