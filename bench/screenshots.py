"""Make the pictures of docs/monitor.md: each tab of the page, dark and light, 1280 and 1920 wide.

    python bench/screenshots.py [--output docs/pictures] [--boards 8] [--chips 800]

An emulated detector of 8 boards with 800 chips each is configured, and takes two runs. Takes about two minutes. Needs
the extra `test`, and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import STEP, argument_parser, temporary_system, update
from emulated_board import Emulator
from PIL import Image
from system import System
from web_browser import Browser, browsers, missing
from web_viewer import launch_web, link_of

from larpixdaq.errors import NoCore
from larpixdaq.operator import Operator, Request

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "monitor.md"
TABS = ("run", "monitor", "configuration", "routines", "runs")
SIZES = ((1280, 900), (1920, 1080))
#: The pictures that show also what lies below the screen.
WHOLE = "dark", SIZES[0][0]
#: Colours of a picture, so that all of them together stay small: the most frequent ones, and others between them.
FREQUENT, OTHERS = 16, 16
#: Clock ticks between the periodic triggers of a chip: as slow as its register allows.
SLOWEST = (1 << 24) - 1
THRESHOLD = 96  # at which hot channels alone trigger themselves


def layout_of(network: dict[str, Any]) -> str:
    """Return a pixel layout (YAML) of tiles of 10 x 10 chips with 8 x 8 pixels, two tiles beside each other."""
    tiles: dict[int, dict[int, int]] = {}  # io_channel of each chip, by 100 * io_group + tile of the board
    for group, lines in network.items():
        if not group.isdecimal():
            continue
        for channel, line in lines.items():
            if isinstance(line, dict):
                chips = tiles.setdefault(100 * int(group) + (int(channel) - 1) // 4, {})
                chips |= {node["chip_id"]: int(channel) for node in line["nodes"] if isinstance(node["chip_id"], int)}
    layout = ["pixel_pitch: 4.0", "multitile_layout_version: emulated", "chip_channel_to_position:"]
    for number, chip in enumerate(sorted({chip for chips in tiles.values() for chip in chips})):
        for channel in range(64):
            x, y = number % 10 * 8 + channel % 8, number // 10 * 8 + channel // 8
            layout.append(f"  {1000 * chip + channel}: [{x}, {y}]")
    layout.append("tile_chip_to_io:")
    for tile, chips in tiles.items():
        layout.append(f"  {tile}:")
        layout += [f"    {chip}: {tile // 100 * 1000 + channel}" for chip, channel in chips.items()]
    layout.append("tile_positions:")
    for tile in tiles:
        group, place = divmod(tile, 100)
        layout.append(f"  {tile}: [{group * 300}, {-330 * (place // 2)}, {330 * (place % 2)}]")
    layout.append("tile_orientations:")
    layout += [f"  {tile}: [1, 1, 1]" for tile in tiles]
    return "\n".join(layout) + "\n"


def wait(request: Request, limit: float = STEP) -> None:
    """Wait for a request, also when a busy machine does not let the core be heard for a while."""
    end = time.monotonic() + limit
    while True:
        try:
            request.result(limit)
            return
        except NoCore:
            if time.monotonic() > end:
                raise


def configure(operator: Operator, line: System) -> None:
    wait(operator.load_board(str(line.folder / "tile.json")))
    wait(operator.load_pixel_layout(str(line.folder / "layout.yaml")))
    wait(operator.configure_network(), 10 * STEP)
    values = {"threshold_global": THRESHOLD, "channel_mask": [0] * 64}
    wait(operator.send_configuration({"all": values}), 10 * STEP)
    wait(operator.validate_configuration(), 10 * STEP)


def trigger(operator: Operator) -> None:
    """Let all channels trigger themselves, so that the map is full."""
    values = {"periodic_trigger_mask": [0] * 64, "periodic_trigger_cycles": SLOWEST}
    values |= {"enable_hit_veto": 0, "enable_periodic_trigger": 1}
    wait(operator.send_configuration({"all": values}), 10 * STEP)


def save(page: Browser, path: Path, width: int, height: int, *, whole: bool) -> None:
    """Write the page as a small PNG. `whole`: also what lies below the screen."""
    page.size(width, height)
    if whole:
        page.size(width, max(height, page.run("return document.documentElement.scrollHeight")))
    time.sleep(2.5)  # the next values come, and plots are drawn anew
    few_colours(Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")).save(path, optimize=True)


def few_colours(image: Image.Image) -> Image.Image:
    """Return an image with few colours, of which those of backgrounds and texts are exact."""
    counted = sorted(image.getcolors(1 << 24) or [], key=lambda pair: pair[0], reverse=True)
    others = image.quantize(OTHERS, Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for _, colour in counted[:FREQUENT] for part in colour] + others[: 3 * OTHERS])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def press(page: Browser, button: str, selector: str, part: str) -> None:
    """Click a button until its result is there: on a busy machine a request may fail, because no core was heard."""
    for _ in range(5):
        page.click(button)
        try:
            page.wait_text(selector, part, STEP / 4)
            return
        except AssertionError as error:
            problem = error
    raise problem


def fill_configuration(page: Browser) -> None:
    page.tab("configuration")
    press(page, "Known boards", ".board-control .facts", "of generation")
    page.fill("Chip", "1-1-11", ".registers")
    press(page, "Show known values", ".registers table", "threshold_global")
    page.fill("Chips", "1-1-11, 1-1-12", ".compare")
    press(page, "Read and compare", ".compare .facts", "register")
    press(page, "Status and supplies", ".board-status", "mV")
    page.fill("Name", "before the refill", ".snapshots")
    press(page, "Save a snapshot", ".snapshots .facts", "chips")


def run_routine(page: Browser) -> None:
    page.tab("routines")
    page.wait(lambda: page.find(".routine-list option[value=pedestal]"), "the routines")
    page.choose(".routine-list select[size]", "pedestal")
    page.fill("chips", "1-1-11, 1-1-12, 1-1-13, 1-1-14", ".routine-form")
    page.click("Run", ".routine-form")
    page.confirm("Run")
    page.wait_text(".routine-state", "done in", 5 * STEP)


def show_runs(page: Browser) -> None:
    page.tab("runs")
    page.wait(lambda: len(page.all(".run-list tbody tr")) > 2, "the runs", STEP)
    page.click("2", ".run-list tbody")
    page.wait_text(".run-detail h2", "Run 2")
    page.click("with", ".run-list tbody tr:nth-child(3)")
    page.wait_text(".run-plots table", "run 1", STEP)


@contextmanager
def detector(boards: int, chips: int) -> Iterator[tuple[System, Operator, str]]:
    """Start an emulated detector with all processes, and configure its chips."""
    with temporary_system() as line:
        network = line.folder / "tile.json"
        dead = ["--dead-chips", "1" if chips * boards > 10 else "0", "--dead-channels", "20"]
        options = ["--io-groups", str(boards), "--chips", str(chips), "--asic", "2b", "--power-on", "--pps"]
        emulator = Emulator(*options, *dead, "--hot-channels", "10", "--seed", "3", "--write-network", str(network))
        try:
            (line.folder / "layout.yaml").write_text(layout_of(json.loads(network.read_text())["network"]))
            line.launch_core()
            line.launch_log()
            operator = line.start("--pacman", *emulator.addresses, "--asic", "2b")
            configure(operator, line)
            yield line, operator, link_of(launch_web(line))
        finally:
            emulator.close()


def take_run(operator: Operator, comment: str, seconds: float) -> None:
    wait(operator.prepare_run(comment=comment, kind="calibration"))
    wait(operator.begin_run())
    time.sleep(seconds)
    wait(operator.end_run())


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures", help="folder")
    parser.add_argument("--boards", type=int, default=8, help="number of boards (default %(default)d)")
    parser.add_argument("--chips", type=int, default=800, help="chips per board (default %(default)d)")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the run in the pictures")
    args = parser.parse_args()
    if problem := missing():
        raise SystemExit(problem)
    args.output.mkdir(parents=True, exist_ok=True)
    with detector(args.boards, args.chips) as (line, operator, link), browsers(line.folder) as opened:
        operator.shifter = "Ada Lovelace"
        wait(operator.release_control())
        page = opened(link)
        page.size(*SIZES[0])
        run_routine(page)
        wait(operator.take_control())
        trigger(operator)
        take_run(operator, "cosmics, threshold 96", 10)
        wait(operator.comment("HV at 25 kV since 02:10", run=1))
        take_run(operator, "threshold 96, after the refill", 15)
        wait(operator.release_control())
        fill_configuration(page)
        page.tab("run")
        page.fill("Comment of the next run", "night shift, threshold 96")
        page.click("Prepare run")
        page.confirm("Prepare run")
        page.wait_text("#state-word", "READY", STEP)
        page.click("Begin run")
        page.confirm("Begin run")
        page.wait_text("#state-word", "RUN", STEP)
        page.tab("monitor")
        time.sleep(args.seconds)
        show_runs(page)
        for tab in TABS:
            page.tab(tab)
            for width, height in SIZES:
                for scheme in ("dark", "light"):
                    page.colours(scheme)
                    save(
                        page, args.output / f"{tab}-{scheme}-{width}.png", width, height, whole=(scheme, width) == WHOLE
                    )
        wait(operator.take_control())
        wait(operator.abort_run())
    if args.output == ROOT / "docs" / "pictures":
        update(DOCUMENT, "pictures", index())


def index() -> str:
    lines = ["| tab | dark | light |", "| --- | --- | --- |"]
    for tab in TABS:
        links = [
            ", ".join(f"[{width}](pictures/{tab}-{scheme}-{width}.png)" for width, _ in SIZES)
            for scheme in ("dark", "light")
        ]
        lines.append(f"| {tab.capitalize()} | {links[0]} | {links[1]} |")
    pictures = "\n\n".join(f"![{tab.capitalize()}](pictures/{tab}-dark-1280.png)" for tab in TABS)
    return "\n".join(lines) + "\n\n" + pictures


if __name__ == "__main__":
    main()
