"""Measure the page in a browser: what an update of the map of 409,600 channels costs, and its memory over many updates.

    python bench/page.py [--chips 6400] [--updates 50] [--long 100000] [--write]

The map is tried as the page's own canvas and as an image of Bokeh. Each update has other values in all channels. For
both: ms of the page's main thread per update (script, layout and painting, as the browser counts it), and processor
time of all of the browser's processes. Without a graphics card, as here in a headless browser, the processor also puts
the picture together. For the memory, the whole page with the tab Monitor gets made-up frames as fast as it takes them,
in place of two a second: the heap of its scripts after a garbage collection. --write: into docs/monitor.md.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import argument_parser, processor_seconds, update, with_source
from processes import until
from web_browser import make_driver, missing

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "larpixdaq" / "web" / "static"
DOCUMENT = ROOT / "docs" / "monitor.md"
PAUSE = 0.1  # seconds between two updates

#: Makes `window.show(which)` and `window.step()`; resolves when the first picture is there.
SET_UP = """
const [which, chips, done] = arguments;
const sets = Array.from({ length: 4 }, () => Uint8Array.from({ length: chips * 64 }, () => Math.random() * 200));
let turn = 0;
const next = () => sets[(turn += 1) % sets.length];
const box = document.createElement("div");
box.style.width = "1180px";
document.body.replaceChildren(box);
(async () => {
  if (which === "canvas") {
    const { PixelMap } = await import("/static/pixel_map.js");
    const map = new PixelMap();
    box.append(map.node);
    const chip = (at) => [1 + Math.floor(at / (chips / 8)), 1 + (Math.floor(at / 25) % 32), 11 + (at % 100)];
    map.setChips(Array.from({ length: chips }, (_, at) => chip(at)));
    const header = { quantity: "rate", run: 1, time: 0, scale: { low: 0.01, high: 1e5 }, shape: [chips, 64] };
    window.step = () => map.setValues(header, next());
  } else {
    const { bokeh, heatColours } = await import("/static/charts.js");
    const Bokeh = await bokeh();
    const [columns, rows] = [chips / 8, 8 * 64];
    const hex = (part) => part.toString(16).padStart(2, "0");
    const palette = heatColours().map((colour) => "#" + colour.map(hex).join(""));
    const shape = { dtype: "float32", shape: [rows, columns] };
    const image = () => Bokeh.require("core/util/ndarray").ndarray(Float32Array.from(next()), shape);
    const source = new Bokeh.ColumnDataSource({ data: { image: [image()] } });
    const figure = Bokeh.Plotting.figure({ width: 1180, height: 560, tools: "pan,wheel_zoom,hover,reset" });
    const mapper = new Bokeh.LinearColorMapper({ palette, low: 0, high: 255 });
    figure.image(mapper, { field: "image" }, 0, 0, columns, rows, { source });
    await Bokeh.Plotting.show(figure, box);
    window.step = () => { source.data = { image: [image()] }; };
  }
  window.step();
  setTimeout(done, 500);
})().catch((error) => done(String(error)));
"""
#: A WebSocket that makes up a detector, and sends frames as fast as the page takes them: `window.updates`.
STAND_IN = """
window.updates = 0;
window.WebSocket = class {
  static OPEN = 1;
  constructor() {
    this.readyState = 1;
    this.sequence = 1;
    setTimeout(() => this.begin(), 0);
  }
  send() {}
  close() {}
  say(message) { this.onmessage({ data: JSON.stringify(message) }); }
  state(n) {
    const groups = [1, 2, 3, 4, 5, 6, 7, 8];
    const channel = (at) => ({ io_group: 1, io_channel: 1, chip_id: 11 + at, channel_id: n % 64, rate: 1000 + n % 97 });
    const row = (group) => ({ io_group: group, rate: 1e5 + n % 1000, mean_rate: 1e5, packets: n * 1e5, rows: n * 1e5,
      bad_parity: 0, unknown: 0, dropped: 0, seen: 1, seen_packets: n, seen_data: n, seen_local_half: 0,
      seen_local_full: 0, seen_shared_half: 0, seen_shared_full: 0 });
    const rows = Array.from({ length: 50 }, (_, at) => ({ packet_type: 0, io_group: 1, io_channel: 1, chip_id: 11,
      channel_id: at, timestamp: n * 1000 + at, dataword: at, valid_parity: 1 }));
    return {
      status: { state: "RUN", run: { run: 7, kind: "physics", comment: "", prepared: 1e9, begun: 1e9, ended: null,
        missing: [], files: [] }, components: groups.map((at) => ({ name: "component " + at, kind: "producer",
        alive: true, stuck: false, heard_s: 0.1, queued: 0, run: 7, status: { packets: n }, info: {}, actions: [] })) },
      monitor: { run: 7, kind: "physics", layout: "2.4", time: 1e9 + n, rate: 8e5, mean_rate: 8e5, packets: n,
        seen: 0.5, io_groups: groups.map(row),
        channel_rates: { edges: [1, 10, 100, 1000], channels: [n % 50, 20, 3], silent: 5 },
        hottest: Array.from({ length: 20 }, (_, at) => channel(at)), dead: [], dead_channels: 0, messages: 1,
        rows_by_type: { data: n }, late_blocks: 0,
        sync: groups.map((group) => ({ io_group: group, rows: n, kind: "reset", ticks: 1e7, seconds: 1, min_ticks: 1e7,
          max_ticks: 1e7 })),
        spread: groups.map((group) => ({ io_group: group, ticks: n % 9, seconds: n % 9 / 1e7, how: "resets" })) },
      histogram: { of: { io_group: null, io_channel: null, chip: null, channel: null }, problem: "",
        entries: 1000, mean: 20, std: 5, seen: 0.5, run: 7,
        counts: Array.from({ length: 256 }, (_, at) => (at * n) % 97) },
      packets: { of: {}, problem: "", rows },
    };
  }
  begin() {
    const chips = Array.from({ length: 6400 }, (_, at) => [1 + (at >> 10), 1 + ((at >> 5) & 31), 11 + (at & 31)]);
    this.say({ type: "snapshot", sequence: 1, time: 1e9, viewer: { name: "bench", role: "operator" }, state: {
      core: { connected: true, heard_s: 0, address: "" }, alarms: [], log: [], chips, layout: null, actions: {},
      monitor_problem: "", history: { times: [], total: [], io_groups: {} }, ledger: { producers: {}, storages: {} },
      ...this.state(0) } });
    this.pixels = new Uint8Array(6400 * 64);
    const head = JSON.stringify({ name: "pixels", quantity: "rate", run: 7, time: 0, seen: 1, coding: "raw",
      scale: { low: 0.1, high: 1e6 }, shape: [6400, 64] });
    const frame = new Uint8Array(4 + head.length + this.pixels.length);
    new DataView(frame.buffer).setUint32(0, head.length, true);
    frame.set(new TextEncoder().encode(head), 4);
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      const n = (window.updates += 1);
      const rates = Object.fromEntries([1, 2, 3, 4, 5, 6, 7, 8].map((group) => [group, 1e5 + (n * group) % 997]));
      this.say({ type: "delta", sequence: (this.sequence += 1), time: 1e9 + n, set: this.state(n), append: {
        history: [{ time: 1e9 + n, rates, total: 8e5 }], log: [{ time: 1e9 + n, level: "INFO", component: "core",
        text: "record " + n }] } });
      if (n % 20 === 0) {
        frame.fill(n & 255, 4 + head.length);
        this.onmessage({ data: frame.slice().buffer });
      }
      if (n < window.most) channel.port2.postMessage(0);
    };
    window.go = (most) => { window.most = most; channel.port2.postMessage(0); };
  }
};
"""
STYLE = "<!doctype html><link rel=stylesheet href=/static/style.css><title>map</title><body>"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        name = path.partition("?")[0]
        spec = importlib.util.find_spec("bokeh")
        if spec is None or spec.origin is None:
            raise SystemExit('bokeh is not installed: pip install "larpix-daq[web]"')
        folder = Path(spec.origin).parent / "server" / "static" / "js" if name.startswith("/bokeh/") else STATIC
        return str(folder / Path(name).name)

    def do_GET(self) -> None:
        if self.path in ("/", "/page"):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(STYLE.encode() if self.path == "/" else (STATIC / "index.html").read_bytes())
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(STATIC)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def browser_pids(parent: int) -> list[int]:
    """Return a process and all below it."""
    found = [parent]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def measure(driver: Any, which: str, chips: int, updates: int) -> dict[str, float]:
    problem = driver.execute_async_script(SET_UP, which, chips)
    if problem:
        raise SystemExit(problem)

    def tasks() -> float:
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    pids = browser_pids(driver.service.process.pid)
    began, processors, clock = tasks(), sum(map(processor_seconds, pids)), time.monotonic()
    driver.execute_async_script(
        """
        const [updates, pause, done] = arguments;
        let left = updates;
        const timer = setInterval(() => {
          window.step();
          left -= 1;
          if (left) return;
          clearInterval(timer);
          setTimeout(done, 300);
        }, pause);
        """,
        updates,
        PAUSE * 1000,
    )
    seconds = time.monotonic() - clock
    return {
        "main_thread_ms": (tasks() - began) / updates * 1000,
        "processor_ms": (sum(map(processor_seconds, pids)) - processors) / updates * 1000,
        "seconds": seconds,
    }


def memory(driver: Any, address: str, updates: int) -> list[tuple[int, float]]:
    """Return the heap (MB) of the page's scripts after these numbers of updates, from a tenth of them on."""
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STAND_IN})
    driver.get(f"{address}page#monitor")
    found = []
    for tenth in range(1, 11):
        most = updates * tenth // 10
        until(lambda: driver.execute_script("return Boolean(window.go)"), "the page")
        driver.execute_script("window.go(arguments[0])", most)
        until(lambda most=most: driver.execute_script("return window.updates") >= most, f"{most} updates", 3600)
        driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        used = next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize")
        found.append((most, used / 1e6))
    return found


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--chips", type=int, default=6400, help="chips of 64 channels (default %(default)d)")
    parser.add_argument("--updates", type=int, default=50, help="updates of each map (default %(default)d)")
    parser.add_argument("--long", type=int, default=100_000, help="updates for the memory (default %(default)d)")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/monitor.md")
    args = parser.parse_args()
    if problem := missing():
        raise SystemExit(problem)
    with tempfile.TemporaryDirectory() as folder, served() as address:
        driver = make_driver(1280, 900, Path(folder))
        try:
            driver.set_script_timeout(600)
            driver.execute_cdp_cmd("Performance.enable", {})
            found = {}
            for which in ("canvas", "bokeh"):
                driver.get(address)
                found[which] = measure(driver, which, args.chips, args.updates)
            heap = memory(driver, address, args.long)
        finally:
            driver.quit()
    lines = [
        f"| {name} | {one['main_thread_ms']:.0f} ms | {one['processor_ms']:.0f} ms |"
        for name, one in (("canvas of the page", found["canvas"]), ("image of Bokeh", found["bokeh"]))
    ]
    head = f"| {args.chips * 64:,} channels | main thread, per update | processor, per update |\n| --- | --- | --- |"
    text = "\n".join([head, *lines])
    (early, before), (late, after) = heap[0], heap[-1]
    text += f"\n\nThe heap of the page: {before:.1f} MB after {early:,} updates, {after:.1f} MB after {late:,}."
    print(text)
    if args.write:
        update(DOCUMENT, "pixel map", with_source(text, "python bench/page.py"))


if __name__ == "__main__":
    main()
