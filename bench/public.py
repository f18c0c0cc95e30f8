"""Runs scripts of public repositories against the emulator, unmodified but for addresses.

    python bench/public.py --tens larpix-10x10-scripts --crs crs_daq --larpix-control larpix-control
    python bench/public.py --routines larpix-daq-routines
    python bench/public.py --monitor larpix-monitor

Each option names a checkout (crs_daq: branch 2x2); the scripts of those that are given run, in copies of them. A PACMAN
is emulated on a loopback address with its usual ports, as larpix-control's PACMAN_IO wants them. `--larpix-control`:
its newest version, which hydra_v2a.py needs (`reset_tiles`); without it the installed one. `--routines`: the routines
of larpix-daq-routines run in a producer, first unmodified, then with the changes of docs/migration.md. `--monitor`:
larpix-monitor reads the raw file of a run. It needs tqdm, plotly and pytz, crs_daq tqdm. One line for each script or
routine: seconds, exit status and what was found; the whole output of a script is in NAME.out of the copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import argument_parser, begin_run, temporary_system
from emulated_board import Emulator
from processes import until

from larpixdaq.errors import LarpixDaqError
from larpixdaq.operator import Operator

#: Maximum seconds of a script.
LIMIT = 1800.0
#: Messages that are sent to record_data.py.
MESSAGES = 10_000
#: Data and command port of a PACMAN.
PORTS = (5556, 5555)


#: Changes that larpix-daq-routines need for v2 chips, as docs/migration.md has them: pattern and replacement.
CHANGES = (
    (r"controller\.get_chip\((\w+)\)", r"controller[\1]"),
    (r"\brange\(32\)", "range(64)"),
    (r"\]\*32\b", "]*64"),
    (r"iter_idx < 31\b", "iter_idx < 63"),
    (r"Configuration\.pixel_trim_threshold_addresses", '["pixel_trim_dac"]'),
    (r"Configuration\.channel_mask_addresses", '["channel_mask"]'),
    (r"Configuration\.global_threshold_address", '"threshold_global"'),
    (r"Configuration\.test_mode_xtrig_reset_diag_address", '"enable_periodic_reset"'),
    (r"config\.global_threshold\b", "config.threshold_global"),
    (r"config\.pixel_trim_thresholds\b", "config.pixel_trim_dac"),
    (r"config\.periodic_reset\b", "config.enable_periodic_reset"),
    (r" *chip\.config\.sample_cycles = .*\n", ""),
    (r"extract\('adc_counts'(.*)\bchannel=", r"extract('dataword'\1channel_id="),
    (r"(_rough_leakage, \['chip', 'run_time')\]", r"\1, 'parallelize']"),
)


class Step(NamedTuple):
    """A script with its arguments. `found` makes a text of its output and folder; it raises if a result is missing."""

    command: list[str]
    found: Callable[[str, Path], str]


def free_host() -> str:
    """Return a loopback address on which a PACMAN's ports are free."""
    for last in range(2, 255):
        host = f"127.0.0.{last}"
        with contextlib.ExitStack() as stack:
            try:
                for port in PORTS:
                    stack.enter_context(socket.socket()).bind((host, port))
            except OSError:
                continue
            return host
    raise SystemExit("no loopback address has the ports 5555 and 5556 free")


@contextlib.contextmanager
def emulated(host: str, *options: str) -> Iterator[None]:
    """Emulate a PACMAN on a host, and print the words that it has sent."""
    data, command = map(str, PORTS)
    board = Emulator("--address", host, "--data-port", data, "--command-port", command, *options)
    try:
        yield
        board.stop()
        print(f"the board sent {board.finish()['sent']}")
    finally:
        board.close()


def run(steps: list[Step], folder: Path, library: Path | None) -> bool:
    """Run the scripts in a folder, one after the other. Returns whether all have done what they should."""
    path = [*([str(library)] if library else []), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    good = True
    for step in steps:
        name = Path(step.command[0]).stem
        began = time.monotonic()
        with (folder / f"{name}.out").open("w+") as out:
            try:
                status: Any = subprocess.run(
                    [sys.executable, *step.command],
                    cwd=folder,
                    env=env,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT,
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after {LIMIT:g} s"
            out.seek(0)
            output = out.read()
        try:
            found = step.found(output, folder) if status == 0 else (output.strip().splitlines() or [""])[-1]
        except Exception as error:
            found, status = f"{type(error).__name__}: {error}", "no result"
        good = good and status == 0
        print(f"{' '.join(step.command):60.60} {time.monotonic() - began:7.1f} s  exit {status}: {found}", flush=True)
    return good


def said(pattern: str) -> Callable[[str, Path], str]:
    """Return a check that the output has a line like this, whose groups are the result."""

    def found(output: str, folder: Path) -> str:
        matches = re.findall(pattern, output)
        if not matches:
            raise LookupError(f"the output has no {pattern!r}")
        return f"{matches[-1]}"

    return found


def chips_in(name: str) -> Callable[[str, Path], str]:
    """Return a check that counts the chips of a network file."""

    def found(output: str, folder: Path) -> str:
        content = json.loads((folder / name).read_text())
        networks = [net for group, nets in content["network"].items() if group.isdigit() for net in nets.values()]
        ids = [node["chip_id"] for net in networks for node in net["nodes"] if isinstance(node["chip_id"], int)]
        return f"{len(set(ids))} chips"

    return found


def messages_in(name: str, expected: int) -> Callable[[str, Path], str]:
    """Return a check that a raw file has as many messages as the board has sent."""

    def found(output: str, folder: Path) -> str:
        import h5py

        with h5py.File(folder / name) as file:
            messages = len(file["msgs"])
        if messages != expected:
            raise ValueError(f"{messages} messages, {expected} were sent")
        return f"{messages} messages, all that were sent"

    return found


def address_io(folder: Path, host: str, io_group: int) -> None:
    """Let all io files of a copy name one board at this host."""
    for path in (folder / "io").glob("*.json"):
        content = {"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[io_group, host]]}
        path.write_text(json.dumps(content))


def copied(checkout: Path, name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"larpixdaq-{name}-"))
    shutil.copytree(checkout, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    print(f"{name} in {folder}")
    return folder


def tens(checkout: Path, library: Path | None, full: bool, faults: list[str]) -> bool:
    """The scripts of larpix-10x10-scripts for a tile of v2 chips with three noisy channels on a board of revision 3."""
    folder, host = copied(checkout, "10x10"), free_host()
    address_io(folder, host, 1)
    network = folder / "tile-id-1.json"
    faults = faults or ["--hot-channels", "3"]
    with emulated(host, "--revision", "3", "--asic", "2", "--chips", "100", "--write-network", str(network), *faults):
        config = ["--controller_config", network.name]
        links = ["map_uart_links_qc.py", "--tile_id", "1", *([] if full else ["--skip_test", "yes"])]
        # With the references of base.py the emulated pedestals are at 82 to 96 ADC counts, with a noise of 0.2 to 1.3.
        cuts = ["--baseline_cut_value", "120", "--noise_cut_value", "5"]
        return run(
            [
                Step(["base.py", *config], said(r"base configuration successfully enforced")),
                Step(links, said(r"tested (\d+) uarts" if full else r"path including (\d+) chips")),
                Step(["pedestal_qc.py", *config, "--runtime", "10", *cuts], said(r"(\d+)  bad channels")),
            ],
            folder,
            library,
        )


def crs(checkout: Path, library: Path | None, asic: str, faults: list[str]) -> bool:
    """The scripts of crs_daq for a tile of v2a or v2b chips of the 2x2. `faults`: options of the emulator."""
    io_group, options, hydra = {
        "2": (1, ["--revision", "3b", "--asic", "2"], "hydra_v2a.py"),
        "2b": (5, ["--revision", "4m2", "--asic", "2b", "--inverted", "--slow-read", "0"], "hydra_v2b.py"),
    }[asic]
    folder, host = copied(checkout, f"crs-{asic}"), free_host()
    address_io(folder, host, io_group)
    run_config = json.loads((folder / "RUN_CONFIG.json").read_text())
    run_config |= {"destination_dir_": f"{folder}/", "monitor_dir_": f"{folder}/monitor/"}
    (folder / "RUN_CONFIG.json").write_text(json.dumps(run_config))
    network = f"iog-{io_group}-pacman-tile-1-hydra-network.json"
    (folder / "controller.json").write_text(json.dumps({str(io_group): network}))
    with emulated(host, *options, "--chips", "100", *faults):
        good = run(
            [
                Step(["configure_pacman.py", "--verbose"], said(r"Tile\s+1 .*VDDA:\s+(\d+)  mV")),
                Step([hydra, "--io_group", str(io_group), "--pacman_tile", "1"], chips_in(network)),
                Step(
                    ["network_larpix.py", "--controller_config", "controller.json"],
                    lambda *_: "all registers read back",
                ),
            ],
            folder,
            library,
        )
    # Messages of one word, as boards send them at ordinary rates, all within the time of the script.
    sent = ["--rate", "1000", "--words-per-message", "1", "--count", str(MESSAGES)]
    with emulated(host, *sent, "--lossless", "--wait-for-subscriber", "--stay"):
        record = ["record_data.py", "--runtime", "15", "--file_count", "1", "--filename", "x.h5"]
        return run([Step(record, messages_in("x.h5", MESSAGES))], folder, library) and good


def routines(checkout: Path) -> bool:
    """The routines of larpix-daq-routines for an emulated v2 chip, unmodified and changed."""
    folder = copied(checkout, "routines")
    board = Emulator("--asic", "2", "--chips", "1", "--power-on", "--write-network", str(folder / "tile.json"))
    try:
        with temporary_system() as system:
            operator = system.start("--pacman", *board.addresses, "--asic", "2", "--routines", folder / "routines")
            operator.load_board(str(folder / "tile.json")).result(60)
            operator.configure_network().result(60)
            (chip,) = operator.retrieve_configuration(registers=0).result(60)
            calls: dict[str, list[Any]] = {
                "load_configuration": [chip, "mine.json"],
                "configure_to_rate": [chip, 50, 1000, 110, 16, 0.2],
                "leakage": [chip, 1],
                "pedestal": [chip],
                "rough_leakage": [chip, 0.05, False],
                "test_pulse": [chip, 20, 1],
            }
            # All channels of v2 chips are masked at power-up.
            operator.send_configuration({chip: {"channel_mask": [0] * 64, "threshold_global": 110}}).result(60)
            own = operator.retrieve_configuration(chip).result(60)[chip]["wanted"]
            (folder / "configs" / "mine.json").write_text(chip_file(own))
            print("unmodified:")
            for name, arguments in calls.items():
                run_routine(operator, name, arguments)
            for path in (folder / "routines").glob("*.py"):
                text = path.read_text()
                for pattern, replacement in CHANGES:
                    text = re.sub(pattern, replacement, text)
                path.write_text(text)
            print("with the changes of docs/migration.md:")
            good = [run_routine(operator, name, arguments) for name, arguments in calls.items()]
            return all(good)
    finally:
        board.close()


def monitor(checkout: Path) -> bool:
    """larpix-monitor's loader and plots for a raw file, which must have as many packets as the packet file."""
    import h5py

    folder = copied(checkout, "monitor")
    (folder / "layout-2.4.0.yaml").write_text("chips: []\n")  # which its modules read, also without a pixel map
    board = Emulator("--rate", "20000", "--words-per-message", "10", "--pps")
    try:
        with temporary_system() as system:
            system.launch_core()
            system.launch_storage("--raw")
            operator = begin_run(system, "--pacman", *board.addresses, "--asic", "2")
            time.sleep(3)
            (name,) = operator.end_run().result(60)["files"]
            (packets,) = system.data.glob("*[0-9].h5")
            until(lambda: packets.with_suffix(".raw.h5").exists(), f"the raw file of {name}", 60)
            with h5py.File(packets) as file:
                kind, direction = file["packets"]["packet_type"][:], file["packets"]["direction"][:]
            received = int(((direction == 1) & (kind < 4) | (kind == 4) | (kind > 5)).sum())  # no INFO, nothing sent
            shutil.copy(packets.with_suffix(".raw.h5"), folder / "x.h5")
    finally:
        board.close()
    plots = ["--plots", "HotPixelPlot", "PacmanSyncHistograms"]
    load = ["run_monitor.py", "--once", "x.h5", "--max_msgs", "-1", *plots]
    return run([Step(load, lambda output, _: packets_loaded(output, received))], folder, None)


def packets_loaded(output: str, received: int) -> str:
    (found,) = re.findall(r"got (\d+) packets", output)
    plots = re.findall(r"generated (\d+) plots", output)
    if int(found) != received:
        raise ValueError(f"{found} packets, {received} were received")
    return f"{found} packets, all that were received, {plots[-1]} plots"


def chip_file(registers: dict[str, Any]) -> str:
    """Return a chip's configuration file of larpix-control."""
    return json.dumps({"_config_type": "chip", "class": "Configuration_v2", "register_values": registers})


def run_routine(operator: Operator, name: str, arguments: list[Any]) -> bool:
    """Run a routine and print how it ended. Returns whether its result is one."""
    began = time.monotonic()
    said = []
    try:
        for response in operator.run_routine(name, *arguments):
            if response.kind == "progress":
                said.append(response.text)
        found, good = f"{response.value!r}, after {len(said)} lines such as {said[-1]!r}", response.value != "error"
    except LarpixDaqError as error:
        found, good = str(error).splitlines()[0], False
    print(f"{name:20} {time.monotonic() - began:7.1f} s  {found}", flush=True)
    return good


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--tens", type=Path, metavar="DIR", help="checkout of larpix-10x10-scripts")
    parser.add_argument("--crs", type=Path, metavar="DIR", help="checkout of crs_daq")
    parser.add_argument("--routines", type=Path, metavar="DIR", help="checkout of larpix-daq-routines")
    parser.add_argument("--monitor", type=Path, metavar="DIR", help="checkout of larpix-monitor")
    parser.add_argument("--asic", choices=("2", "2b"), action="append", help="of crs_daq only this generation of chips")
    parser.add_argument("--larpix-control", type=Path, metavar="DIR", help="checkout of larpix-control")
    parser.add_argument(
        "--fault", action="append", default=[], help="option for the emulated board, as --fault=--dead-chips=1-1-35"
    )
    parser.add_argument(
        "--all-links", action="store_true", help="let map_uart_links_qc.py test all links, not only the paths"
    )
    options = parser.parse_args()
    library = options.larpix_control and options.larpix_control.resolve()
    good = True
    if options.tens:
        good &= tens(options.tens, library, options.all_links, options.fault)
    if options.routines:
        good &= routines(options.routines)
    if options.monitor:
        good &= monitor(options.monitor)
    if options.crs:
        for asic in options.asic or ("2", "2b"):
            good &= crs(options.crs, library, asic, options.fault)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
