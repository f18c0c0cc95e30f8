"""What discovery knows of a tile: the chips of its network, bad links and chips, and the faults as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from larpixdaq.hardware.tile_shape import TileShape

#: Chip ids: sender, receiver.
Wire = tuple[int, int]


@dataclass(eq=False)
class Chip:
    """A chip of the network. `side`: direction to its parent, which is None for a root."""

    chip_id: int
    io_channel: int
    parent: Chip | None
    side: int
    children: list[Chip] = field(default_factory=list)

    def path(self) -> list[Chip]:
        """Return the chips from the root to this one."""
        path: list[Chip] = []
        chip: Chip | None = self
        while chip is not None:
            path.insert(0, chip)
            chip = chip.parent
        return path


class Tile:
    """Knowledge of one tile, numbered from 0."""

    def __init__(self, io_group: int, number: int, io_channels: Sequence[int], shape: TileShape) -> None:
        self.io_group, self.number, self.shape = io_group, number, shape
        self.io_channels = list(io_channels)
        self.chips: dict[int, Chip] = {}
        #: Chips that are not used.
        self.excluded: set[int] = set()
        #: Chips that have another id than that of their position, and this id.
        self.wrong_ids: dict[int, int] = {}
        #: Chips without a link that works both ways: the neighbour that they hear, and the neighbour that hears them.
        self.detours: dict[int, Wire] = {}
        self._bad: dict[str, None] = {}
        #: Wires between chips of the network that carry no words, and wires to and from chips that have no way back.
        self.broken: list[Wire] = []
        self.one_way: list[Wire] = []
        #: Links that change or lose words, which are not used. A root's link is minus its io_channel, and the root.
        self.bad_links: set[frozenset[int]] = set()
        self.restarts = 0
        self.silences = 0
        #: Reason why the tile was given up.
        self.error = ""
        self.recovered: Counter[int] = Counter()
        #: Number of trials by sender, chip_id, and side of the sender for roots.
        self.tries: Counter[tuple[int, int, int]] = Counter()

    @property
    def name(self) -> str:
        return f"io_group {self.io_group} tile {self.number}"

    @property
    def roots(self) -> list[Chip]:
        return [chip for chip in self.chips.values() if chip.parent is None]

    def ordered(self) -> list[Chip]:
        """Return the chips of the network, each after its parent, those near to the roots first."""
        chips = self.roots
        for chip in chips:
            chips += chip.children  # the list grows while it is read
        return chips

    def key(self, chip_id: int) -> str:
        """Return the name of a chip: its key, or with ? for an io_channel that it does not have."""
        chip = self.chips.get(chip_id)
        return f"{self.io_group}-{chip.io_channel if chip else '?'}-{chip_id}"

    def fault(self, text: str) -> None:
        """Note a bad link or chip, in one line."""
        self._bad[text] = None

    def forget(self) -> None:
        """Forget all but the links and chips that are not used."""
        self.chips.clear()
        self.tries.clear()
        self.recovered.clear()
        self.wrong_ids.clear()
        self.detours.clear()
        self.broken, self.one_way = [], []

    def faults(self) -> list[str]:
        """Return all faults, one line each."""
        lines = [*self._bad, *([self.error] if self.error else [])]
        lines += [f"chip {chip} keeps id {wrong}: not used" for chip, wrong in self.wrong_ids.items()]
        lines += [
            f"chip {chip} hears {a} and is heard by {b}, but no link of it works both ways: not used"
            for chip, (a, b) in self.detours.items()
        ]
        on = {chip.io_channel for chip in self.roots}
        for io_channel, root in zip(self.io_channels, self.shape.roots, strict=False):
            if io_channel not in on:
                lines.append(f"io_channel {io_channel}: root chip {root} does not answer")
        named = self.excluded | self.wrong_ids.keys() | self.detours.keys()
        silent = [chip for chip in self.missing() if chip not in named]
        if silent:
            lines.append(f"no answer from chip{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}")
        lines += [
            f"link {a} - {b} works only from {a} to {b}" for a, b in self.one_way if a in self.chips and b in self.chips
        ]
        lines += [f"link {a} - {b} is broken" for a, b in self.broken if a < b]
        return [f"{self.name}: {line}" for line in lines]

    def missing(self) -> list[int]:
        return [chip_id for chip_id in self.shape.ids() if chip_id not in self.chips]

    def drop(self, chip: Chip) -> None:
        """Remove a chip without children."""
        if chip.parent is not None:
            chip.parent.children.remove(chip)
        del self.chips[chip.chip_id]

    def link_text(self, link: tuple[int, int]) -> str:
        if link[0] < 0:
            return f"link from the board over io_channel {-link[0]} to chip {link[1]}"
        return f"link {link[0]} - {link[1]}"
