"""`larpixdaq demo --calibrate`: an emulated tile of chips brought up, calibrated and read out, all in one run."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from larpixdaq.launch import Group
from larpixdaq.operator import Operator

ASIC = "2b"
CHIPS = 100
#: What v2b chips need: 1.8 V and 1.2 V.
VDDA_DAC, VDDD_DAC = 46_000, 31_000
#: Channels that are planted: so many with ten times the noise of others, and so many that see nothing.
PLANTED = 8
#: Rates that are wanted of each channel (Hz): higher than a detector's, so that seconds are enough to count them, and
#: low enough for what four io_channels carry.
LOW, HIGH = 2.0, 20.0
#: Bring-up of a tile, and its calibration, are done within so long (seconds).
LIMIT = 300.0

#: The emulator's next line of JSON within a time limit (seconds); what is awaited is said in an error.
Line = Callable[[subprocess.Popen[bytes], float, str], dict[str, Any]]


class Rehearsal:
    """`start()` before the system, `take()` in its run."""

    def __init__(self, options: argparse.Namespace, state: Path) -> None:
        self._seconds: float = options.seconds
        self._directory = options.output_dir.absolute()
        self._network = state / "tile.json"
        self._truth = self._directory / "tile_truth.json"

    def start(self, group: Group) -> subprocess.Popen[bytes]:
        return group.start(
            "emulators", "pacman", "--chips", str(CHIPS), "--asic", ASIC,
            "--write-network", str(self._network), "--hot-channels", str(PLANTED), "--dead-channels", str(PLANTED),
            "--truth", str(self._truth), "--lossless", "--wait-for-go", "--data-port", "0", "--command-port", "0",
            pipes=True,
        )  # fmt: skip

    def take(
        self, operator: Operator, emulator: subprocess.Popen[bytes], line: Line, console: Console, planted: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """In a run, with the boards told to go: what the emulator sent, and what there is to tell of the chips."""
        operator.power(True, tiles=0, vdda_dac=VDDA_DAC, vddd_dac=VDDD_DAC).result(LIMIT)
        chips = operator.load_board(str(self._network)).result(LIMIT)["chips"]
        network = operator.configure_network().result(LIMIT)
        console.print(f"{chips} chips, {'all' if network['ok'] else 'NOT all'} of them in their networks")
        calibration = operator.run_routine("calibrate", LOW, HIGH, apply=True, directory=str(self._directory))
        last = ""
        for response in calibration:
            if response.kind == "progress" and response.text and response.text.split(":")[0] != last:
                last = response.text.split(":")[0]
                console.print(f"  calibrating: {last}")
        found = calibration.result(LIMIT)
        checked = operator.validate_configuration().result(LIMIT)
        time.sleep(self._seconds)
        with contextlib.suppress(ProcessLookupError):
            emulator.send_signal(signal.SIGTERM)
        sent = line(emulator, LIMIT, "the end of the emulated board")
        return sent["sent"], self._told(found, checked, planted)

    def _told(self, found: dict[str, Any], checked: dict[str, Any], planted: dict[str, list[str]]) -> dict[str, Any]:
        def listed(by_chip: dict[str, list[int]]) -> set[str]:
            return {f"{chip}-{channel}" for chip, channels in by_chip.items() for channel in channels}

        hot, dead = listed(found["disable"]), listed(found["dead"])
        return {
            **{name: found[name] for name in ("low_hz", "high_hz", "live", "within", "seconds", "saturated_after")},
            "registers_ok": checked["ok"],
            "registers": checked["registers"],
            "disabled": len(hot),
            "hot_planted": len(planted["hot_channels"]),
            "hot_found": len(hot.intersection(planted["hot_channels"])),
            "dead_planted": len(planted["dead_channels"]),
            "dead_found": len(dead.intersection(planted["dead_channels"])),
            "report": found["files"],
            "no_picture": found.get("no_picture", ""),
            "truth": str(self._truth),
        }


def show(told: dict[str, Any], console: Console) -> None:
    console.print(
        f"calibrated in {told['seconds']:.0f} s: {told['within']} of {told['live']} live channels between "
        f"{told['low_hz']:g} and {told['high_hz']:g} Hz; {told['registers']} registers read back, "
        f"{'all as they were sent' if told['registers_ok'] else 'NOT all as they were sent'}"
    )
    console.print(
        f"channels that were planted and found: {told['hot_found']} of {told['hot_planted']} hot, "
        f"{told['dead_found']} of {told['dead_planted']} dead; {told['disabled']} are masked as too noisy"
    )
    if told["saturated_after"]:
        console.print(f"io_channels that carry all they can: {', '.join(told['saturated_after'])}")
    for path in told["report"]:
        console.print(f"report: {path}")
    if told["no_picture"]:
        console.print(told["no_picture"])
    console.print(f"what the emulated channels are: {told['truth']}")
