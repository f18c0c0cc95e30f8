"""Which chips are behind the emulated boards, and what is wrong with them: the options that say so.

What is wrong with emulated chips on request: dead ones, broken links, stuck bits, hot and dead channels.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from larpixdaq.emulators import network
from larpixdaq.emulators.board_registers import BoardRegisters
from larpixdaq.emulators.chips import SUPPLIES, TICKS_PER_BIT, EmulatedChips
from larpixdaq.emulators.network import Wiring, register_map
from larpixdaq.emulators.noise import DAC_STEP, HOT, VCM, Channels, Noise
from larpixdaq.emulators.revisions import EmulatedRevision
from larpixdaq.emulators.tile import Losses
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.schema import ASICS

DEFAULT_ASIC = "2"
#: Option, what stands in its list, help.
PLANTS = (
    ("dead-chips", "CHIP", "chips that hear and say nothing"),
    ("broken-links", "CHIP/CHIP", "links of the network without wires"),
    ("stuck-bits", "CHIP:REGISTER.BIT=VALUE", "bits of registers that never change"),
    ("hot-channels", "CHIP-CHANNEL", f"channels with {HOT:g} times the noise of others"),
    ("dead-channels", "CHIP-CHANNEL", "channels that see nothing"),
)
LOSSES = (
    ("lose-answers", "fraction of the chips' answers that get lost"),
    ("double-answers", "fraction of the chips' answers that come twice"),
)
Chip = tuple[int, int]  # io_group, number on its board
_CHIP: Final = r"(\d+-\d+-\d+)"
_CHANNEL: Final = re.compile(rf"{_CHIP}-(\d+)")
_LINK: Final = re.compile(rf"{_CHIP}/{_CHIP}")
_STUCK: Final = re.compile(rf"{_CHIP}:(\d+)\.([0-7])=([01])")


class EmulatedDetector(NamedTuple):
    """`boards`: the chips of each io_group, none without --chips."""

    boards: dict[int, Wiring]
    planted: Planted


def add_arguments(parser: argparse.ArgumentParser, tile_channels: int = network.TILE_CHANNELS) -> None:
    """`tile_channels`: io_channels of a default tile, at most."""
    parser.set_defaults(tile_channels=tile_channels)
    add = parser.add_argument_group("chips").add_argument
    add(
        "--chips",
        metavar="WHAT",
        help="chips behind the boards, which are configured and answer as real ones do: a controller configuration of "
        "larpix-control (its network is what is wired, its io_groups are the boards), or how many on each board, on "
        f"tiles of up to {network.TILE_CHIPS} with {tile_channels} io_channel{'s' * (tile_channels > 1)} each",
    )
    add("--asic", choices=sorted(ASICS), help=f"generation of the chips (default {DEFAULT_ASIC}, or the file's)")
    add(
        "--write-network",
        type=Path,
        metavar="FILE",
        help="with a number of --chips: write a controller configuration for larpix-control, with their network",
    )
    add(
        "--power-on",
        action="store_true",
        help="begin with all tiles powered, and with DACs and UARTs set for these chips, as an operator leaves them "
        "(default: as boards come up)",
    )
    for name, form, what in PLANTS:
        add(f"--{name}", metavar="N|LIST", help=f"{what}: how many, or which, as {form},... with CHIP as in 1-2-34")
    for name, what in LOSSES:
        add(f"--{name}", type=float, default=0.0, metavar="F", help=f"{what} (default 0)")
    add("--bug-512", action="store_true", help="each 512th word to the chips of a board gets lost")
    add(
        "--truth",
        type=Path,
        metavar="FILE",
        help="write as JSON what is wrong, and pedestal, noise, threshold offset and leakage of each channel",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> EmulatedDetector:
    """What --chips and the options about them ask for; `args.asic` says which kind. Ends with status 2 for options
    that do not go together."""
    if args.chips is None:
        names = ["write-network", "power-on", "bug-512", "truth", *(name for name, *_ in (*PLANTS, *LOSSES))]
        for name in names:
            if getattr(args, name.replace("-", "_")):
                parser.error(f"--{name} goes with --chips")
        args.asic = args.asic or DEFAULT_ASIC
        return EmulatedDetector({}, Planted())
    for name, _ in LOSSES:
        if not 0 <= getattr(args, name.replace("-", "_")) <= 1:
            parser.error(f"--{name}: expected a fraction, 0 to 1, found {getattr(args, name.replace('-', '_'))}")
    if args.lose_answers + args.double_answers > 1:
        parser.error("--lose-answers, --double-answers: an answer suffers one of them, so they add up to at most 1")
    boards = _boards(parser, args)
    wrong = _plant(args, boards)
    for (io_group, a), (_, b) in wrong.broken_links:
        boards[io_group].cut(a, b)
    return EmulatedDetector(boards, wrong)


def _boards(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[int, Wiring]:
    if args.chips.isdigit():
        args.asic = args.asic or DEFAULT_ASIC
        if args.asic == "1":
            parser.error("--chips: v1 chips are no network; name a file of larpix-control with a chip_list")
        chips = int(args.chips)
        boards = {
            io_group: network.tile_wiring(chips, args.tile_channels, args.asic)
            for io_group in range(1, args.io_groups + 1)
        }
        if args.write_network:
            network.write_network(args.write_network, args.asic, boards)
        return boards
    if args.write_network:
        parser.error("--write-network goes with a number of --chips; a file there says the network already")
    asic, boards = network.read_network(args.chips)
    args.asic = args.asic or asic
    if "1" in (args.asic, asic) and args.asic != asic:
        parser.error(f"--asic {args.asic}: {args.chips} wires chips of generation {asic}, which is done in another way")
    return boards


def _plant(args: argparse.Namespace, boards: dict[int, Wiring]) -> Planted:
    planter, wrong = Planter(boards, args.seed), Planted()
    registers = register_map(args.asic)
    if args.dead_chips:
        wrong.dead_chips = planter.dead_chips(args.dead_chips)
    if args.broken_links:
        wrong.broken_links = planter.broken_links(args.broken_links)
    if args.stuck_bits:
        wrong.stuck_bits = planter.stuck_bits(args.stuck_bits, registers.defaults, registers.count)
    if args.hot_channels:
        wrong.hot_channels = planter.channels(args.hot_channels, registers.channels)
    if args.dead_channels:
        wrong.dead_channels = planter.channels(args.dead_channels, registers.channels)
    return wrong


def make(args: argparse.Namespace, detector: EmulatedDetector, io_group: int) -> Noise:
    """The chips of one board, as they are in the beginning, and what their channels see."""
    board, wrong = detector.boards[io_group], detector.planted
    chips = EmulatedChips(
        board,
        args.asic,
        dead=[chip for group, chip in wrong.dead_chips if group == io_group],
        stuck=[(chip, at, bit, value) for (group, chip), at, bit, value in wrong.stuck_bits if group == io_group],
        powered=args.power_on,
    )
    channels = Channels(len(board.keys), chips.map.channels, [args.seed, 2, io_group])
    for (group, chip), channel in wrong.hot_channels:
        if group == io_group:
            channels.noise[chip, channel] *= HOT
    for (group, chip), channel in wrong.dead_channels:
        if group == io_group:
            channels.working[chip, channel] = False
    return Noise(chips, channels, [args.seed, 3, io_group])


def registers(args: argparse.Namespace, revision: EmulatedRevision, chips: EmulatedChips) -> BoardRegisters:
    """The registers of a PACMAN with these chips."""
    made = BoardRegisters(revision, chips=chips.on_tiles(), inverted=args.inverted, slow_read=args.slow_read)
    if args.power_on:
        made.switch_on(chips.tiles_there, SUPPLIES[chips.asic].usual, TICKS_PER_BIT[chips.asic])
    return made


def losses(args: argparse.Namespace, io_group: int) -> Losses:
    return Losses(
        bug_512=args.bug_512, lose=args.lose_answers, double=args.double_answers, seed=args.seed * 256 + io_group
    )


def told(detector: EmulatedDetector) -> dict[str, list[Any]]:
    """What is wrong, in the form of the options."""
    return planted_told(detector.planted, detector.boards)


def ready(detector: EmulatedDetector, boards: dict[str, Any]) -> str:
    """The line that an emulator says when `boards`, and what they are reached by, are there."""
    wrong = told(detector)
    return json.dumps({"ready": boards} | ({"planted": wrong} if wrong else {}))


def write_truth(path: Path, detector: EmulatedDetector, noises: dict[int, Noise]) -> None:
    """`channels`: by chip, lists over its channels. Pedestal and noise in ADC counts, with the references of power-up;
    `threshold` in counts of threshold_global with trim 0, where the discriminator meets the pedestal; `noise_dac` in
    the same; leakage in mV/s. FileError if that cannot be."""
    found = {}
    for io_group, noise in noises.items():
        seen, scale = noise.channels, noise.counts_per_mv()
        for chip in range(len(seen.noise)):
            found[chip_key_of(detector.boards, (io_group, chip))] = {
                "pedestal": ((seen.pedestal[chip] - VCM) * scale).round(3).tolist(),
                "noise": (seen.noise[chip] * scale).round(3).tolist(),
                "threshold": ((seen.pedestal[chip] - seen.offset[chip]) / DAC_STEP).round(3).tolist(),
                "noise_dac": (seen.noise[chip] / DAC_STEP).round(3).tolist(),
                "leakage": seen.leakage[chip].round(3).tolist(),
            }
    try:
        path.write_text(json.dumps({"planted": told(detector), "channels": found}) + "\n")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from None


@dataclass
class Planted:
    """`stuck`: chip, register, bit, the value that it keeps. Links are in the order board to chips."""

    dead_chips: list[Chip] = field(default_factory=list)
    broken_links: list[tuple[Chip, Chip]] = field(default_factory=list)
    stuck_bits: list[tuple[Chip, int, int, int]] = field(default_factory=list)
    hot_channels: list[tuple[Chip, int]] = field(default_factory=list)
    dead_channels: list[tuple[Chip, int]] = field(default_factory=list)


class Planter:
    """Reads what the options say: a number, for which the seed chooses, or a list with commas."""

    def __init__(self, boards: dict[int, Wiring], seed: int) -> None:
        self._random = np.random.default_rng([seed, 1])
        self._boards = boards
        self._all = [(io_group, chip) for io_group, board in boards.items() for chip in range(len(board.keys))]
        self._by_key = {chip_key_of(boards, chip): chip for chip in self._all}

    def dead_chips(self, text: str) -> list[Chip]:
        if text.isdigit():
            return self._choose(self._all, text)
        return [self._chip(part) for part in text.split(",")]

    def broken_links(self, text: str) -> list[tuple[Chip, Chip]]:
        if text.isdigit():
            links = [((g, a), (g, b)) for g, board in self._boards.items() for a, b in board.tree]
            return self._choose(links, text)
        return [(self._chip(a), self._chip(b)) for a, b in self._parts(text, _LINK, "CHIP/CHIP")]

    def stuck_bits(self, text: str, defaults: Any, registers: int) -> list[tuple[Chip, int, int, int]]:
        """Bits that the seed chooses are stuck at what they are not at power-up, so that they can be noticed."""
        if text.isdigit():
            found = []
            for chip in self._choose(self._all, text):
                address, bit = int(self._random.integers(registers)), int(self._random.integers(8))
                found.append((chip, address, bit, 1 ^ int(defaults[address]) >> bit & 1))
            return found
        parts = self._parts(text, _STUCK, "CHIP:REGISTER.BIT=VALUE")
        stuck = [(self._chip(chip), int(at), int(bit), int(value)) for chip, at, bit, value in parts]
        for _, address, _, _ in stuck:
            if address >= registers:
                raise ConfigError(f"stuck bit: register {address} of {registers}")
        return stuck

    def channels(self, text: str, channels: int) -> list[tuple[Chip, int]]:
        if text.isdigit():
            every = len(self._all) * channels
            chosen = self._choose(range(every), text)
            return [(self._all[n // channels], n % channels) for n in chosen]
        parts = self._parts(text, _CHANNEL, "CHIP-CHANNEL")
        for chip, channel in parts:
            if int(channel) >= channels:
                raise ConfigError(f"chip {chip}: channel {channel} of {channels}")
        return [(self._chip(chip), int(channel)) for chip, channel in parts]

    def _choose(self, among: Any, number: str) -> list[Any]:
        if int(number) > len(among):
            raise ConfigError(f"asked for {number} of {len(among)} that there are")
        return [among[n] for n in sorted(self._random.permutation(len(among))[: int(number)].tolist())]

    @staticmethod
    def _parts(text: str, pattern: re.Pattern[str], expected: str) -> list[tuple[str, ...]]:
        found = [pattern.fullmatch(part) for part in text.split(",")]
        if not all(found):
            raise ConfigError(f"{text!r}: expected a number or {expected},... with CHIP as in 1-2-34")
        return [match.groups() for match in found if match]

    def _chip(self, key: str) -> Chip:
        try:
            return self._by_key[key]
        except KeyError:
            raise ConfigError(f"no chip {key!r}; the first is {next(iter(self._by_key))}") from None


def chip_key_of(boards: dict[int, Wiring], chip: Chip) -> str:
    """As larpix-control writes it: io_group-io_channel-chip_id."""
    io_channel, chip_id = boards[chip[0]].keys[chip[1]]
    return f"{chip[0]}-{io_channel}-{chip_id}"


def planted_told(planted: Planted, boards: dict[int, Wiring]) -> dict[str, list[Any]]:
    """For JSON, in the form of the options; only what there is."""

    def key(chip: Chip) -> str:
        return chip_key_of(boards, chip)

    found = {
        "dead_chips": [key(chip) for chip in planted.dead_chips],
        "broken_links": [f"{key(a)}/{key(b)}" for a, b in planted.broken_links],
        "stuck_bits": [f"{key(chip)}:{at}.{bit}={value}" for chip, at, bit, value in planted.stuck_bits],
        "hot_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.hot_channels],
        "dead_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.dead_channels],
    }
    return {name: list(values) for name, values in found.items() if values}
