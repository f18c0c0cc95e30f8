"""What is wrong with emulated chips on request: dead ones, broken links, stuck bits, hot and dead channels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from larpixdaq.emulators.wiring import Wiring
from larpixdaq.errors import ConfigError

Chip = tuple[int, int]  # io_group, number on its board

_CHIP: Final = r"(\d+-\d+-\d+)"
_CHANNEL: Final = re.compile(rf"{_CHIP}-(\d+)")
_LINK: Final = re.compile(rf"{_CHIP}/{_CHIP}")
_STUCK: Final = re.compile(rf"{_CHIP}:(\d+)\.([0-7])=([01])")


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
        self._by_key = {key_of(boards, chip): chip for chip in self._all}

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


def key_of(boards: dict[int, Wiring], chip: Chip) -> str:
    """As larpix-control writes it: io_group-io_channel-chip_id."""
    io_channel, chip_id = boards[chip[0]].keys[chip[1]]
    return f"{chip[0]}-{io_channel}-{chip_id}"


def told(planted: Planted, boards: dict[int, Wiring]) -> dict[str, list[Any]]:
    """For JSON, in the form of the options; only what there is."""

    def key(chip: Chip) -> str:
        return key_of(boards, chip)

    found = {
        "dead_chips": [key(chip) for chip in planted.dead_chips],
        "broken_links": [f"{key(a)}/{key(b)}" for a, b in planted.broken_links],
        "stuck_bits": [f"{key(chip)}:{at}.{bit}={value}" for chip, at, bit, value in planted.stuck_bits],
        "hot_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.hot_channels],
        "dead_channels": [f"{key(chip)}-{channel}" for chip, channel in planted.dead_channels],
    }
    return {name: list(values) for name, values in found.items() if values}
