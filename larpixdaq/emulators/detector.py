"""Options for the chips of emulated boards and their planted faults, and the emulated chips that they describe.

Planted faults are dead chips, broken links, stuck bits, hot channels and dead channels.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Container
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
from larpixdaq.errors import FileError, UsageError
from larpixdaq.schema import ASICS

DEFAULT_ASIC = "2"
#: Options of the planted faults: name, form of a list element, help.
PLANTED_OPTIONS = (
    ("dead-chips", "CHIP", "chips that neither receive nor send"),
    ("broken-links", "CHIP/CHIP", "links of the network without wires"),
    ("one-way-links", "CHIP/CHIP", "links that carry words from the first chip to the second only"),
    ("flipping-links", "CHIP/CHIP", "links that flip bits of words from the first chip to the second, see --flips"),
    ("impostors", "CHIP=ID", "chips that also take words for another chip_id"),
    ("stuck-bits", "CHIP:REGISTER.BIT=VALUE", "bits of registers that never change"),
    ("hot-channels", "CHIP-CHANNEL", f"channels with {HOT:g} times the noise of others"),
    ("dead-channels", "CHIP-CHANNEL", "channels that see nothing"),
)
#: Options of losses: name, help.
LOSS_OPTIONS = (
    ("lose-answers", "fraction of the chips' answers that get lost"),
    ("double-answers", "fraction of the chips' answers that come twice"),
)
#: Fraction of the bits that links flip.
DEFAULT_FLIPS: Final = 0.0035
#: io_group, number on its board.
Chip = tuple[int, int]
_CHIP: Final = r"(\d+-\d+-\d+)"
_CHANNEL: Final = re.compile(rf"{_CHIP}-(\d+)")
_LINK: Final = re.compile(rf"{_CHIP}/{_CHIP}")
_IMPOSTOR: Final = re.compile(rf"{_CHIP}=(\d+)")
_STUCK: Final = re.compile(rf"{_CHIP}:(\d+)\.([0-7])=([01])")


class EmulatedDetector(NamedTuple):
    """The chips of all boards, by io_group (none without --chips), and their planted faults."""

    boards: dict[int, Wiring]
    planted: Planted

    def key(self, chip: Chip) -> str:
        """Return the key of a chip: io_group-io_channel-chip_id."""
        return _key(self.boards, chip)

    def planted_json(self) -> dict[str, list[str]]:
        """Return the planted faults in the form of the options, without empty lists."""
        key, planted = self.key, self.planted
        faults = {
            "dead_chips": [key(chip) for chip in planted.dead_chips],
            "broken_links": [f"{key(a)}/{key(b)}" for a, b in planted.broken_links],
            "one_way_links": [f"{key(a)}/{key(b)}" for a, b in planted.one_way_links],
            "flipping_links": [f"{key(a)}/{key(b)}" for a, b in planted.flipping_links],
            "impostors": [f"{key(chip)}={chip_id}" for chip, chip_id in planted.impostors],
            "stuck_bits": [
                f"{key(chip)}:{register}.{bit}={value}" for chip, register, bit, value in planted.stuck_bits
            ],
            "hot_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.hot_channels],
            "dead_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.dead_channels],
        }
        return {name: values for name, values in faults.items() if values}

    def ready_line(self, boards: dict[str, Any]) -> str:
        """Return the JSON line that an emulator prints at its start, with the ports or devices of its boards."""
        planted = self.planted_json()
        return json.dumps({"ready": boards} | ({"planted": planted} if planted else {}))

    def write_truth(self, path: Path, noises: dict[int, Noise]) -> None:
        """Write planted faults and channel properties as JSON. Raises FileError.

        `channels`: lists over the channels of each chip. Pedestal and noise in ADC counts, with the references of
        power-up; `threshold` in counts of threshold_global with trim 0, where the discriminator meets the pedestal;
        `noise_dac` in the same counts; leakage in mV/s.
        """
        truth = {}
        for io_group, noise in noises.items():
            channels, scale = noise.channels, noise.counts_per_mv()
            for chip in range(len(channels.noise)):
                truth[self.key((io_group, chip))] = {
                    "pedestal": ((channels.pedestal[chip] - VCM) * scale).round(3).tolist(),
                    "noise": (channels.noise[chip] * scale).round(3).tolist(),
                    "threshold": ((channels.pedestal[chip] - channels.offset[chip]) / DAC_STEP).round(3).tolist(),
                    "noise_dac": (channels.noise[chip] / DAC_STEP).round(3).tolist(),
                    "leakage": channels.leakage[chip].round(3).tolist(),
                }
        try:
            path.write_text(json.dumps({"planted": self.planted_json(), "channels": truth}) + "\n")
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from None


class Planted(NamedTuple):
    """Planted faults."""

    dead_chips: list[Chip]
    #: The chip nearer to the board first, if the seed has chosen the link.
    broken_links: list[tuple[Chip, Chip]]
    #: The chip that sends, the chip that receives.
    one_way_links: list[tuple[Chip, Chip]]
    #: The same.
    flipping_links: list[tuple[Chip, Chip]]
    #: Chip, the other chip_id whose words it takes.
    impostors: list[tuple[Chip, int]]
    #: Chip, register, bit, the value that it keeps.
    stuck_bits: list[tuple[Chip, int, int, int]]
    #: Chip, channel.
    hot_channels: list[tuple[Chip, int]]
    dead_channels: list[tuple[Chip, int]]


class Planter:
    """Parses the options of planted faults: a number, for which the seed chooses, or a list with commas."""

    def __init__(self, boards: dict[int, Wiring], seed: int) -> None:
        self._random = np.random.default_rng([seed, 1])
        self._boards = boards
        self._chips = [(io_group, chip) for io_group, board in boards.items() for chip in range(len(board.keys))]
        self._by_key = {_key(boards, chip): chip for chip in self._chips}

    def dead_chips(self, text: str) -> list[Chip]:
        if text.isdigit():
            return self._choose(self._chips, text)
        return [self._chip(part) for part in text.split(",")]

    def broken_links(self, text: str) -> list[tuple[Chip, Chip]]:
        if text.isdigit():
            links = [((g, a), (g, b)) for g, board in self._boards.items() for a, b in board.tree]
            return self._choose(links, text)
        return [(self._chip(a), self._chip(b)) for a, b in self._parse(text, _LINK, "CHIP/CHIP")]

    def any_links(self, text: str) -> list[tuple[Chip, Chip]]:
        """Links between any neighbours, which the seed turns round."""
        if text.isdigit():
            links = self._choose(
                [((g, a), (g, b)) for g, board in self._boards.items() for a, b in board.links()], text
            )
            return [(b, a) if self._random.integers(2) else (a, b) for a, b in links]
        return [(self._chip(a), self._chip(b)) for a, b in self._parse(text, _LINK, "CHIP/CHIP")]

    def impostors(self, text: str) -> list[tuple[Chip, int]]:
        """Chips that the seed chooses take the words for the chip after them."""
        if text.isdigit():
            keys = {chip: self._boards[chip[0]].keys[chip[1]][1] for chip in self._chips}
            return [(chip, keys[chip] % 254 + 1) for chip in self._choose(self._chips, text)]
        parts = [(self._chip(chip), int(chip_id)) for chip, chip_id in self._parse(text, _IMPOSTOR, "CHIP=ID")]
        for _, chip_id in parts:
            if not 0 < chip_id < network.BROADCAST:
                raise UsageError(f"impostor: chip_id {chip_id}: expected 1 to {network.BROADCAST - 1}")
        return parts

    def stuck_bits(self, text: str, defaults: Any, registers: int) -> list[tuple[Chip, int, int, int]]:
        """Bits that the seed chooses are stuck at the opposite of their power-up values, so that they are noticed."""
        if text.isdigit():
            bits = []
            for chip in self._choose(self._chips, text):
                address, bit = int(self._random.integers(registers)), int(self._random.integers(8))
                bits.append((chip, address, bit, 1 ^ int(defaults[address]) >> bit & 1))
            return bits
        parts = self._parse(text, _STUCK, "CHIP:REGISTER.BIT=VALUE")
        bits = [(self._chip(chip), int(address), int(bit), int(value)) for chip, address, bit, value in parts]
        for _, address, _, _ in bits:
            if address >= registers:
                raise UsageError(f"stuck bit: register {address} of {registers}")
        return bits

    def channels(self, text: str, channels: int) -> list[tuple[Chip, int]]:
        """`channels`: number of channels of a chip."""
        if text.isdigit():
            chosen = self._choose(range(len(self._chips) * channels), text)
            return [(self._chips[n // channels], n % channels) for n in chosen]
        parts = self._parse(text, _CHANNEL, "CHIP-CHANNEL")
        for chip, channel in parts:
            if int(channel) >= channels:
                raise UsageError(f"chip {chip}: channel {channel} of {channels}")
        return [(self._chip(chip), int(channel)) for chip, channel in parts]

    def _choose(self, candidates: Any, number: str) -> list[Any]:
        if int(number) > len(candidates):
            raise UsageError(f"{number} requested, only {len(candidates)} exist")
        return [candidates[n] for n in sorted(self._random.permutation(len(candidates))[: int(number)].tolist())]

    @staticmethod
    def _parse(text: str, pattern: re.Pattern[str], form: str) -> list[tuple[str, ...]]:
        matches = [pattern.fullmatch(part) for part in text.split(",")]
        if not all(matches):
            raise UsageError(f"{text!r}: expected a number or {form},... with CHIP as in 1-2-34")
        return [match.groups() for match in matches if match]

    def _chip(self, key: str) -> Chip:
        try:
            return self._by_key[key]
        except KeyError:
            raise UsageError(f"no chip {key!r}; the first is {next(iter(self._by_key))}") from None


def fraction(text: str) -> float:
    """Parse a fraction, 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction, 0 to 1, found {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser, tile_channels: int = network.TILE_CHANNELS) -> None:
    """Add the options for chips. `tile_channels`: maximum number of io_channels of a default tile."""
    parser.set_defaults(tile_channels=tile_channels)
    add = parser.add_argument_group("chips").add_argument
    add(
        "--chips",
        type=str,  # of a configuration file it takes numbers, too
        metavar="FILE|N",
        help="emulate chips, which are configured and answer as real ones do: a controller configuration of "
        "larpix-control (its network is the wiring, its io_groups are the boards), or the number of chips on each "
        f"board, on tiles of up to {network.TILE_CHIPS} with {tile_channels} io_channel{'s' * (tile_channels > 1)}",
    )
    add("--asic", choices=sorted(ASICS), help=f"generation of the chips (default {DEFAULT_ASIC}, or the file's)")
    add(
        "--write-network",
        type=Path,
        metavar="FILE",
        help="with a number of --chips: write a controller configuration of their network for larpix-control",
    )
    add(
        "--power-on",
        action="store_true",
        help="begin with all tiles powered, and with DACs and UARTs set for these chips, as after a power-up by an "
        "operator (default: as boards start)",
    )
    for name, form, description in PLANTED_OPTIONS:
        add(
            f"--{name}",
            type=str,
            metavar="N|LIST",
            help=f"{description}: a number, or {form},... with CHIP as in 1-2-34",
        )
    for name, description in LOSS_OPTIONS:
        add(f"--{name}", type=fraction, default=0.0, metavar="F", help=f"{description} (default 0)")
    add(
        "--flips",
        type=fraction,
        default=DEFAULT_FLIPS,
        metavar="F",
        help="fraction of the bits that --flipping-links flip, in words of all kinds (default %(default)s, which "
        "changes a fifth of the words)",
    )
    add("--bug-512", action="store_true", help="each 512th word to the chips of a board gets lost")
    add(
        "--truth",
        type=Path,
        metavar="FILE",
        help="write the planted faults, and pedestal, noise, threshold and leakage of each channel, as JSON",
    )


def check_arguments(args: argparse.Namespace, io_channels: Container[int] = range(1, 41)) -> EmulatedDetector:
    """Return the chips of the options, and set `args.asic` to their generation. `io_channels`: those of the boards.

    Raises UsageError if options exclude each other, ConfigError and FileError for the file of --chips.
    """
    if args.chips is None:
        options = ["write-network", "power-on", "bug-512", "truth"]
        options += [name for name, *_ in (*PLANTED_OPTIONS, *LOSS_OPTIONS)]
        for name in options:
            if getattr(args, name.replace("-", "_")):
                raise UsageError(f"--{name} goes with --chips")
        args.asic = args.asic or DEFAULT_ASIC
        return EmulatedDetector({}, Planted(*([] for _ in Planted._fields)))
    if args.lose_answers + args.double_answers > 1:
        raise UsageError("--lose-answers, --double-answers: an answer is lost or doubled, so they add up to at most 1")
    boards = _boards(args, io_channels)
    planted = _plant(args, boards)
    for (io_group, a), (_, b) in planted.broken_links:
        boards[io_group].cut(a, b)
    for (io_group, a), (_, b) in planted.one_way_links:
        boards[io_group].cut_one_way(b, a)
    for (io_group, a), (_, b) in planted.flipping_links:
        boards[io_group].flipping.add((a, b))
    for (io_group, chip), chip_id in planted.impostors:
        boards[io_group].also[chip] = chip_id
    return EmulatedDetector(boards, planted)


def _boards(args: argparse.Namespace, io_channels: Container[int]) -> dict[int, Wiring]:
    if args.chips.isdigit():
        args.asic = args.asic or DEFAULT_ASIC
        if args.asic == "1":
            raise UsageError("--chips: v1 chips are no network; name a file of larpix-control with a chip_list")
        chips = int(args.chips)
        boards = {
            io_group: network.tile_wiring(chips, args.tile_channels, args.asic, io_channels)
            for io_group in range(1, args.io_groups + 1)
        }
        if args.write_network:
            network.write_network(args.write_network, args.asic, boards)
        return boards
    if args.write_network:
        raise UsageError("--write-network goes with a number of --chips; a file has its network already")
    asic, boards = network.read_network(args.chips)
    args.asic = args.asic or asic
    if "1" in (args.asic, asic) and args.asic != asic:
        raise UsageError(
            f"--asic {args.asic}: {args.chips} wires chips of generation {asic}, which differ in their wiring"
        )
    return boards


def _plant(args: argparse.Namespace, boards: dict[int, Wiring]) -> Planted:
    planter, registers = Planter(boards, args.seed), register_map(args.asic)
    return Planted(
        planter.dead_chips(args.dead_chips) if args.dead_chips else [],
        planter.broken_links(args.broken_links) if args.broken_links else [],
        planter.any_links(args.one_way_links) if args.one_way_links else [],
        planter.any_links(args.flipping_links) if args.flipping_links else [],
        planter.impostors(args.impostors) if args.impostors else [],
        planter.stuck_bits(args.stuck_bits, registers.defaults, registers.count) if args.stuck_bits else [],
        planter.channels(args.hot_channels, registers.channels) if args.hot_channels else [],
        planter.channels(args.dead_channels, registers.channels) if args.dead_channels else [],
    )


def make_noise(args: argparse.Namespace, io_group: int) -> Noise:
    """Make the chips of one board, and the noise of their channels."""
    wiring, planted = args.detector.boards[io_group], args.detector.planted
    chips = EmulatedChips(
        wiring,
        args.asic,
        dead=[chip for group, chip in planted.dead_chips if group == io_group],
        stuck=[(fault[0][1], *fault[1:]) for fault in planted.stuck_bits if fault[0][0] == io_group],
        powered=args.power_on,
        flips=args.flips,
        seed=args.seed * 256 + io_group,
    )
    channels = Channels(len(wiring.keys), chips.map.channels, [args.seed, 2, io_group])
    for (group, chip), channel in planted.hot_channels:
        if group == io_group:
            channels.noise[chip, channel] *= HOT
    for (group, chip), channel in planted.dead_channels:
        if group == io_group:
            channels.working[chip, channel] = False
    return Noise(chips, channels, [args.seed, 3, io_group])


def make_registers(args: argparse.Namespace, revision: EmulatedRevision, chips: EmulatedChips) -> BoardRegisters:
    """Make the registers of a PACMAN with these chips."""
    registers = BoardRegisters(
        revision,
        chips=chips.chips_per_tile(),
        inverted=args.inverted,
        slow_read=args.slow_read,
        overload=args.overload,
    )
    if args.power_on:
        registers.switch_on(chips.equipped_tiles, SUPPLIES[chips.asic].usual, TICKS_PER_BIT[chips.asic])
    return registers


def make_losses(args: argparse.Namespace, io_group: int) -> Losses:
    """Make the losses of configuration words of one board."""
    seed = args.seed * 256 + io_group
    return Losses(bug_512=args.bug_512, lose=args.lose_answers, double=args.double_answers, seed=seed)


def _key(boards: dict[int, Wiring], chip: Chip) -> str:
    io_channel, chip_id = boards[chip[0]].keys[chip[1]]
    return f"{chip[0]}-{io_channel}-{chip_id}"
