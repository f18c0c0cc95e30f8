"""Runs scripts of public repositories against the emulator, unmodified but for addresses.

    python bench/public.py --tens larpix-10x10-scripts --crs crs_daq --larpix-control larpix-control

Each option names a checkout (crs_daq: branch 2x2); the scripts of those that are given run, in copies of them. A PACMAN
is emulated on a loopback address with its usual ports, as larpix-control's PACMAN_IO wants them. `--larpix-control`:
its newest version, which hydra_v2a.py needs (`reset_tiles`); without it the installed one. crs_daq needs tqdm.
One line for each script: seconds, exit status and what was found; its whole output is in NAME.out of the copy.
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

from common import argument_parser
from emulated_board import Emulator

#: Maximum seconds of a script.
LIMIT = 1800.0
#: Messages that are sent to record_data.py.
MESSAGES = 10_000
#: Data and command port of a PACMAN.
PORTS = (5556, 5555)


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


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--tens", type=Path, metavar="DIR", help="checkout of larpix-10x10-scripts")
    parser.add_argument("--crs", type=Path, metavar="DIR", help="checkout of crs_daq")
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
    if options.crs:
        for asic in options.asic or ("2", "2b"):
            good &= crs(options.crs, library, asic, options.fault)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
