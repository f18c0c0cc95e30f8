"""Discovers the chips and links of tiles, and leads a hydra network round dead chips and broken links.

At power-up each chip has the same id, listens to all neighbours and sends to none. So a chip that is in the network
opens its UART to one neighbour, the neighbour gets the id of its position, and then it must answer over the same link.
Each *wave* tries all neighbours of the network once, on all tiles of all boards at the same time.

After each wave every id of the tile is read: a chip must answer with its own id, and nothing else may answer. So a chip
that answers for others is found before it can take words for its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, NamedTuple

from larpixdaq.hardware.discovered_tile import Chip, Tile, Wire
from larpixdaq.hardware.discovery_exchange import NO_ROOTS, Answers, DiscoveryExchange, Key, LinkRegisters
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hardware.tile_shape import OPPOSITE
from larpixdaq.protocol import hardware

#: The id of all chips at power-up, and the last id that a chip can have.
_POWER_UP: Final = 1
_LAST_ID: Final = 254
#: Reads of a new chip, and of a link or chip that has given a wrong or no answer.
_READS: Final = 4
_MORE_READS: Final = 32
#: Times that a neighbour is tried over a link, because words can get lost.
_TRIES: Final = 2
#: Fraction of reads without an answer from which a link is not used.
_LOST: Final = 0.5
#: Maximum number of times that a tile is discovered.
_PASSES: Final = 3
#: Maximum number of times that the network of a tile is grown anew after a link or chip of it turned out to be bad.
_RESTARTS: Final = 20


class _Probe(NamedTuple):
    """A trial to reach the chip at a position, from `parent` in `direction`, or as the root of an io_channel."""

    chip_id: int
    io_channel: int
    parent: Chip | None
    direction: int  # of the parent, or of the tile's outside for a root: towards the chip

    @property
    def link(self) -> tuple[int, int]:
        """The sender and receiver on the way to the chip; a root's sender is minus its io_channel."""
        return (-self.io_channel if self.parent is None else self.parent.chip_id), self.chip_id


class NetworkDiscovery:
    """Discovers the networks of tiles through the producer. The chips must have their power-up configuration."""

    def __init__(
        self,
        link: ProducerPipe,
        registers: ChipRegisters,
        tiles: list[Tile],
        progress: Callable[[str, int, int], None],
        reset: Callable[[list[int]], object] | None,
    ) -> None:
        """`reset` resets the chips of these boards; None if they must not be reset."""
        self._links = LinkRegisters(registers)
        self._words = DiscoveryExchange(link, registers, self._links)
        self._tiles = tiles
        self._progress = progress
        self._reset = reset
        self._expected_chips = sum(len(tile.shape.ids()) for tile in tiles)

    def discover(self) -> None:
        """Grow the networks of all tiles, then test the other links. The results are in the tiles.

        A link that changes bits may have given wrong ids to chips behind it. Then the boards are reset, and their tiles
        are discovered again without this link.
        """
        tiles = self._tiles
        for _ in range(_PASSES):
            known = {tile: len(tile.bad_links) for tile in self._tiles}
            self._discover()
            self._tiles = [tile for tile, n in known.items() if len(tile.bad_links) > n and tile.missing()]
            self._tiles = [tile for tile in self._tiles if not tile.error]
            if not self._tiles or self._reset is None:
                break
            self._reset(sorted({tile.io_group for tile in self._tiles}))
            for tile in self._tiles:
                tile.forget()
        self._tiles = tiles

    def _discover(self) -> None:
        self._words.listen(hardware.CONFIG_ANSWERS)
        try:
            self._grow()
            while self._verify() or self._try_detours():
                self._grow()
            self._test_wires()
            for tile in self._tiles:
                self._settle(tile)
            self._exchange([])
        finally:
            self._words.listen(hardware.NO_ROWS)
        for tile in self._tiles:
            if tile.error:
                tile.chips.clear()

    def answering_roots(self) -> list[str]:
        """Return the keys of roots that answer. After a reset there are none, unless chips have ignored it."""
        self._words.listen(hardware.CONFIG_ANSWERS)
        try:
            asked = {}
            for tile in self._tiles:
                for root in tile.roots:
                    asked[self._key(tile, root.io_channel, root.chip_id)] = tile.key(root.chip_id)
                    self._words.read(tile, root.io_channel, root.chip_id, self._links.id, _READS)
            answers = self._exchange([], marks=False)
        finally:
            self._words.listen(hardware.NO_ROWS)
        return [name for key, name in asked.items() if key in answers.good]

    # Growing the network.

    def _grow(self) -> None:
        while True:
            probes = {tile: self._plan(tile) for tile in self._tiles if not tile.error}
            probes = {tile: planned for tile, planned in probes.items() if planned}
            if not probes:
                return
            self._wave(probes)
            found = sum(len(tile.chips) for tile in self._tiles)
            self._progress(f"{found} chips of {len(self._tiles)} tiles are found", found, self._expected_chips)

    def _plan(self, tile: Tile) -> list[_Probe]:
        """Return the next trials: each position once, from the io_channel with the fewest chips."""
        shape = tile.shape
        begin = []
        for io_channel, root in zip(tile.io_channels, shape.roots, strict=False):
            if root in tile.chips or root in tile.excluded:
                continue
            sides = [side for side in shape.outsides(root) if self._left(tile, -io_channel, root, side)]
            if sides:
                begin.append(_Probe(root, io_channel, None, OPPOSITE[sides[0]]))
        if begin:  # all roots first, because a root has to be reached from the board
            return begin
        load = Counter(chip.io_channel for chip in tile.chips.values())
        probes = []
        for chip_id in shape.ids():
            if chip_id in tile.chips or chip_id in tile.excluded:
                continue
            ways = []
            for side in range(4):
                parent = tile.chips.get(shape.neighbour(chip_id, side))
                if parent is not None and self._left(tile, parent.chip_id, chip_id, 0):
                    ways.append((load[parent.io_channel], len(parent.path()), parent.chip_id, side))
            if ways:
                _, _, parent_id, side = min(ways)
                parent = tile.chips[parent_id]
                load[parent.io_channel] += 1
                probes.append(_Probe(chip_id, parent.io_channel, parent, OPPOSITE[side]))
        return probes

    def _left(self, tile: Tile, sender: int, chip_id: int, side: int) -> bool:
        """Return whether this link can be tried (again)."""
        link = (sender, chip_id)
        return frozenset(link) not in tile.bad_links and tile.tries[sender, chip_id, side] < _TRIES

    def _wave(self, probes: dict[Tile, list[_Probe]]) -> None:
        """Try to reach these chips, and read all ids of the tiles."""
        for tile, planned in probes.items():
            self._settle(tile)
            for probe in planned:
                side = OPPOSITE[probe.direction] if probe.parent is None else 0
                tile.tries[probe.link[0], probe.chip_id, side] += 1
                self._try(tile, probe)
            parents = {probe.parent.chip_id: probe.parent for probe in planned if probe.parent}.values()
            for parent in parents:
                self._open(tile, parent, [probe.direction for probe in planned if probe.parent is parent])
            for probe in planned:
                self._words.read(tile, probe.io_channel, probe.chip_id, self._links.id, _READS)
            self._read_ids(tile, {probe.io_channel for probe in planned}, [_POWER_UP, *tile.shape.ids()])
            for parent in parents:  # so that a chip which has not taken its id gets no other one
                self._open(tile, parent, [])
        answers = self._exchange(list(probes))
        doubtful = []
        for tile, planned in probes.items():
            if tile.error:
                continue
            impostors = self._impostors(tile, answers)
            for probe in planned:
                key = self._key(tile, probe.io_channel, probe.chip_id)
                right = answers.right(key)
                if not right and answers.bad[key[:3]] > 1:
                    self._name_bad_link(tile, probe.link, answers.bad[key[:3]], 0, _READS)
                if not right:
                    continue
                chip = Chip(probe.chip_id, probe.io_channel, probe.parent, OPPOSITE[probe.direction])
                tile.chips[probe.chip_id] = chip
                if probe.parent is not None:
                    probe.parent.children.append(chip)
                if right < _READS:
                    doubtful.append((tile, chip))
            for chip_id in impostors:
                self._exclude(tile, chip_id)
            doubtful += self._doubtful(tile, answers, {probe.io_channel for probe in planned})
        self._examine(list(dict.fromkeys(doubtful)))

    def _doubtful(self, tile: Tile, answers: Answers, io_channels: Collection[int]) -> list[tuple[Tile, Chip]]:
        """Return the chips with no answer or a wrong one, after all ids on these io_channels were read."""
        keys = {
            chip: self._key(tile, chip.io_channel, chip.chip_id)
            for chip in tile.chips.values()
            if chip.io_channel in io_channels
        }
        return [(tile, chip) for chip, key in keys.items() if answers.bad[key[:3]] or not answers.right(key)]

    def _verify(self) -> bool:
        """Read all possible ids. Returns whether a link or chip was found to be bad, so that the network must grow."""
        tiles = [tile for tile in self._tiles if tile.chips and not tile.error]
        before = [(len(tile.chips), tile.restarts) for tile in tiles]
        for tile in tiles:
            self._settle(tile)
            self._read_ids(tile, tile.io_channels, range(_POWER_UP, _LAST_ID + 1))
        answers = self._exchange(tiles)
        doubtful = []
        for tile in tiles:
            for chip_id in self._impostors(tile, answers):
                self._exclude(tile, chip_id)
            doubtful += self._doubtful(tile, answers, tile.io_channels)
        self._examine(doubtful)
        return before != [(len(tile.chips), tile.restarts) for tile in tiles]

    def _try(self, tile: Tile, probe: _Probe) -> None:
        """Give the chip its id and let it answer over this link. The link is closed again, for the next trial."""
        if probe.parent is not None:
            self._open(tile, probe.parent, [probe.direction])
        self._words.write(tile, probe.io_channel, _POWER_UP, self._links.id, probe.chip_id)
        self._begin(tile, probe.io_channel, probe.chip_id, OPPOSITE[probe.direction])
        if probe.parent is not None:
            self._open(tile, probe.parent, [])

    def _begin(self, tile: Tile, io_channel: int, chip_id: int, side: int) -> None:
        """Set the UARTs of a chip that has its id: no children, and answers in this direction."""
        for address, value in self._links.first:
            self._words.write(tile, io_channel, chip_id, address, value)
        self._answer_to(tile, io_channel, chip_id, side)

    def _answer_to(self, tile: Tile, io_channel: int, chip_id: int, side: int | None) -> None:
        """Let a chip answer in this direction only, or nowhere."""
        uarts = [] if side is None else [tile.shape.send[side]]
        self._words.write(tile, io_channel, chip_id, self._links.down, self._links.value(self._links.down, uarts))

    def _open(self, tile: Tile, chip: Chip, directions: Iterable[int], without: Chip | None = None) -> None:
        """Open the links of a chip to its children, but one, and in these directions, and close all others."""
        children = [OPPOSITE[child.side] for child in chip.children if child is not without]
        uarts = {tile.shape.send[direction] for direction in (*children, *directions)}
        self._words.write(tile, chip.io_channel, chip.chip_id, self._links.up, self._links.value(self._links.up, uarts))

    def _settle(self, tile: Tile) -> None:
        """Open the links of the network, and close all others, which trials have left open."""
        for chip in tile.ordered():
            self._open(tile, chip, [])
            self._answer_to(tile, chip.io_channel, chip.chip_id, chip.side)

    def _read_ids(self, tile: Tile, io_channels: Iterable[int], ids: Iterable[int]) -> None:
        for io_channel in io_channels:
            for chip_id in ids:
                self._words.read(tile, io_channel, chip_id, self._links.id, 1)

    def _impostors(self, tile: Tile, answers: Answers) -> set[int]:
        """Return the chips that have answered for another id, as the id that they answer with shows."""
        impostors = set()
        for key in answers.others:
            io_group, io_channel, chip_id, _ = key
            if io_group != tile.io_group or io_channel not in tile.io_channels:
                continue
            values = answers.good[key]
            for value, count in Counter(values).items():
                if value != chip_id and count * 2 >= len(values):
                    tile.fault(f"chip {value} answers for id {chip_id} on io_channel {io_channel}: not used")
                    impostors.add(value)
        return impostors

    def _exclude(self, tile: Tile, chip_id: int) -> None:
        tile.excluded.add(chip_id)
        chip = tile.chips.get(chip_id)
        if chip is None:
            return
        if chip.children:
            self._restart(tile)
        else:
            tile.drop(chip)

    def _restart(self, tile: Tile) -> None:
        """Forget the network of a tile, so that it grows anew without the links and chips that are not used."""
        for chip in reversed(tile.ordered()):
            closed = self._links.value(self._links.up, [])
            self._words.write(tile, chip.io_channel, chip.chip_id, self._links.up, closed)
        tile.restarts += 1
        if tile.restarts > _RESTARTS:
            tile.error = f"its network was grown {tile.restarts} times, and a link or chip was bad each time"
        tile.chips.clear()
        tile.tries.clear()

    # Bad links.

    def _examine(self, doubtful: list[tuple[Tile, Chip]]) -> None:
        """Find the links that change or lose words, on the way to these chips, and use them no more."""
        doubtful = [(tile, chip) for tile, chip in doubtful if tile.chips.get(chip.chip_id) is chip]
        if not doubtful:
            return
        tiles = list(dict.fromkeys(tile for tile, _ in doubtful))
        for tile in tiles:
            self._settle(tile)
            chips = [chip for other, end in doubtful if other is tile for chip in end.path()]
            for chip in dict.fromkeys([*chips, *tile.roots]):
                self._words.read(tile, chip.io_channel, chip.chip_id, self._links.id, _MORE_READS)
        answers = self._exchange(tiles)
        for tile in tiles:
            if not any(answers.right(self._key(tile, root.io_channel, root.chip_id)) for root in tile.roots):
                tile.error = tile.error or NO_ROOTS
        for tile, end in doubtful:
            if tile.error or tile.chips.get(end.chip_id) is not end:
                continue
            for chip in end.path():
                key = self._key(tile, chip.io_channel, chip.chip_id)
                corrupt, right = answers.bad[key[:3]], answers.right(key)
                if right < (_MORE_READS if corrupt else _LOST * _MORE_READS):  # a changed answer is missing, too
                    self._close_bad_link(tile, chip, corrupt, right)
                    break

    def _close_bad_link(self, tile: Tile, chip: Chip, corrupt: int, right: int) -> None:
        link = (-chip.io_channel if chip.parent is None else chip.parent.chip_id), chip.chip_id
        self._name_bad_link(tile, link, corrupt, right, _MORE_READS)
        if chip.children:
            self._restart(tile)
        else:
            tile.drop(chip)

    def _name_bad_link(self, tile: Tile, link: tuple[int, int], corrupt: int, right: int, reads: int) -> None:
        wrong = f"{corrupt} wrong" if corrupt else "none wrong"
        doing = "changes bits" if corrupt else "loses words"
        if frozenset(link) not in tile.bad_links:
            tile.fault(f"{tile.link_text(link)} {doing}: {right} of {reads} answers were right, {wrong}: not used")
        tile.bad_links.add(frozenset(link))

    # Chips without a link that works both ways.

    def _try_detours(self) -> bool:
        """Find out whether missing chips have taken a wrong id, or hear one neighbour and are heard by another.

        Returns whether chips have got their id back, so that the network can grow again.
        """
        plans = {tile: [trials for trials in self._detours(tile) if trials] for tile in self._tiles if not tile.error}
        recovered = False
        while any(plans.values()):
            now = {tile: self._next_detours(tile, plan) for tile, plan in plans.items() if plan}
            recovered |= self._detour_wave(now)
            for tile, plan in plans.items():
                named = tile.wrong_ids.keys() | tile.detours.keys()
                plans[tile] = [trials for trials in plan if trials and trials[0][0] not in named and not tile.error]
        return recovered

    def _next_detours(self, tile: Tile, plan: list[list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
        """Remove and return the next trials: wrong ids of one chip on each io_channel, and one detour of each chip.

        Two chips can have the same wrong id.
        """
        trials, io_channels = [], set()
        for waiting in plan:
            chip_id, near, far = waiting[0]
            io_channel = tile.chips[tile.shape.neighbour(chip_id, near)].io_channel
            if near != far or io_channel not in io_channels:
                trials.append(waiting.pop(0))
            if near == far:
                io_channels.add(io_channel)
        return trials

    def _detours(self, tile: Tile) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the trials for each missing chip: its id, the side that it may hear, the side that may hear it."""
        for chip_id in tile.missing():
            if chip_id in tile.excluded:
                continue
            sides = [side for side in range(4) if tile.shape.neighbour(chip_id, side) in tile.chips]
            good = [
                side
                for side in sides
                if frozenset((tile.shape.neighbour(chip_id, side), chip_id)) not in tile.bad_links
            ]
            yield [(chip_id, side, side) for side in sides] + [
                (chip_id, near, far) for near in good for far in good if near != far
            ]

    def _detour_wave(self, trials: dict[Tile, list[tuple[int, int, int]]]) -> bool:
        asked = []
        for tile, planned in trials.items():
            self._settle(tile)
            for chip_id, near, far in planned:
                parent = tile.chips[tile.shape.neighbour(chip_id, near)]
                listener = tile.chips[tile.shape.neighbour(chip_id, far)]
                self._open(tile, parent, [OPPOSITE[near]])
                if near == far:
                    ids = self._wrong_ids(tile, parent, chip_id)
                    for wrong in ids:
                        self._begin(tile, parent.io_channel, wrong, far)
                        self._words.read(tile, parent.io_channel, wrong, self._links.id, _READS)
                        self._words.write(tile, parent.io_channel, wrong, self._links.id, chip_id)
                else:
                    ids = []
                    self._words.write(tile, parent.io_channel, _POWER_UP, self._links.id, chip_id)
                self._begin(tile, parent.io_channel, chip_id, far)
                self._words.read(tile, parent.io_channel, chip_id, self._links.id, _READS)
                for each in (chip_id, *ids):
                    self._answer_to(tile, parent.io_channel, each, None)
                self._open(tile, parent, [])
                keys = [self._key(tile, listener.io_channel, each) for each in (chip_id, *ids)]
                asked.append((tile, chip_id, near, far, keys))
        answers = self._exchange(list(trials))
        recovered = False
        for tile, chip_id, near, far, keys in asked:
            answered = [key[2] for key in keys if answers.right(key)]
            if not answered or tile.error:
                continue
            if chip_id in answered and not tile.recovered[chip_id]:  # it has its id now: try its links once more
                tile.recovered[chip_id] = 1
                recovered = True
                for side in range(4):
                    tile.tries[tile.shape.neighbour(chip_id, side), chip_id, 0] = 0
            elif near == far:
                tile.wrong_ids |= {} if chip_id in answered else {chip_id: answered[0]}
            else:
                a, b = tile.shape.neighbour(chip_id, near), tile.shape.neighbour(chip_id, far)
                tile.detours[chip_id] = a, b
                tile.one_way += [(a, chip_id), (chip_id, b)]
        return recovered

    @staticmethod
    def _wrong_ids(tile: Tile, parent: Chip, chip_id: int) -> list[int]:
        """Return the ids with which a chip may have missed its own: one bit differs from it, or from that at power-up.

        Words for other chips of the same io_channel must not be sent.
        """
        used = {chip.chip_id for chip in tile.chips.values() if chip.io_channel == parent.io_channel}
        ids = [_POWER_UP, *(right ^ 1 << bit for right in (_POWER_UP, chip_id) for bit in range(8))]
        return [wrong for wrong in dict.fromkeys(ids) if wrong not in used | {chip_id} and wrong <= _LAST_ID]

    # Links beside the network.

    def _test_wires(self) -> None:
        """Test the wires between chips of the network that the network does not use.

        A sender that is no ancestor of the receiver answers through it. Another sender is opened to the receiver while
        the receiver's own link is closed. Words of one test must not cross the chips that another test changes.
        """
        plans = {tile: list(self._wires(tile)) for tile in self._tiles if not tile.error}
        total, done = sum(map(len, plans.values())), 0
        while any(plans.values()):
            now = {tile: self._independent(tile, wires) for tile, wires in plans.items() if wires}
            silent = self._wire_wave(now)
            silent = self._wire_wave(silent) if silent else {}
            for tile, wires in silent.items():
                tile.broken += wires
            for tile, wires in now.items():
                chosen = set(wires)
                plans[tile] = [wire for wire in plans[tile] if wire not in chosen] if not tile.error else []
                done += len(chosen)
            self._progress(f"{done} of {total} links beside the network are tested", done, total)
        for tile in self._tiles:
            broken = set(tile.broken)
            for a, b in tile.broken:
                if (b, a) not in broken:
                    tile.one_way.append((b, a))
            tile.broken = [wire for wire in tile.broken if (wire[1], wire[0]) in broken]

    def _wires(self, tile: Tile) -> Iterator[Wire]:
        for chip in tile.chips.values():
            for side in range(4):
                other = tile.chips.get(tile.shape.neighbour(chip.chip_id, side))
                if (
                    other is not None
                    and chip.parent is not other
                    and other.parent is not chip
                    and frozenset((chip.chip_id, other.chip_id)) not in tile.bad_links
                ):
                    yield chip.chip_id, other.chip_id

    def _independent(self, tile: Tile, wires: list[Wire]) -> list[Wire]:
        """Return some of these wires whose tests do not disturb each other."""
        chosen, changed, crossed = list[Wire](), set[int](), set[int]()
        for sender, receiver in wires:
            path = {chip.chip_id for chip in tile.chips[receiver].path()}
            if sender in path:
                if chosen:
                    continue
                return [(sender, receiver)]
            if sender not in crossed | changed and not path & changed:
                chosen.append((sender, receiver))
                changed.add(sender)
                crossed |= path
        return chosen

    def _wire_wave(self, tests: dict[Tile, list[Wire]]) -> dict[Tile, list[Wire]]:
        """Test these wires. Returns those without an answer."""
        asked = []
        for tile, wires in tests.items():
            self._settle(tile)
            for wire in wires:
                sender, receiver = (tile.chips[chip_id] for chip_id in wire)
                direction = next(side for side in range(4) if tile.shape.neighbour(wire[0], side) == wire[1])
                if sender in receiver.path():
                    assert receiver.parent is not None
                    self._open(tile, receiver.parent, [], without=receiver)
                    self._open(tile, sender, [direction])
                    self._words.read(tile, sender.io_channel, receiver.chip_id, self._links.id, _READS)
                    self._open(tile, sender, [])
                    self._open(tile, receiver.parent, [])
                    key = self._key(tile, receiver.io_channel, receiver.chip_id)
                else:
                    self._answer_to(tile, sender.io_channel, sender.chip_id, direction)
                    self._words.read(tile, sender.io_channel, sender.chip_id, self._links.id, _READS)
                    self._answer_to(tile, sender.io_channel, sender.chip_id, sender.side)
                    key = self._key(tile, receiver.io_channel, sender.chip_id)
                asked.append((tile, wire, key))
        answers = self._exchange(list(tests))
        silent: dict[Tile, list[Wire]] = {}
        for tile, wire, key in asked:
            if tile.error:
                continue
            if not answers.right(key):
                silent.setdefault(tile, []).append(wire)
            elif answers.bad[key[:3]] and answers.right(key) < _READS:
                tile.fault(f"link {wire[0]} - {wire[1]}, beside the network, changes bits from {wire[0]} to {wire[1]}")
        return silent

    # Words.

    def _exchange(self, asked: list[Tile], *, marks: bool = True) -> Answers:
        return self._words.exchange(asked, self._tiles, marks=marks)

    def _key(self, tile: Tile, io_channel: int, chip_id: int) -> Key:
        return tile.io_group, io_channel, chip_id, self._links.id
