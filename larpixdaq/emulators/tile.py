"""A board with chips: its clock, what is sent to them, and the words that they and the board send.

Packets and PACMAN data messages (legacy format) from arrays.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.word_codec import parity
from larpixdaq.emulators.board import BATCH, SERVICE_TICKS, EmulatedBoard
from larpixdaq.emulators.board_registers import (
    ANALOG_POWER,
    BANK,
    CLOCK_CONTROL,
    CLOCK_RATIO,
    HEARTBEAT_CYCLES,
    I2C,
    INVERSION,
    RESET_CYCLES,
    TILE_ENABLE,
    TRIGGER_CONTROL,
    TRIGGER_CYCLES,
    BoardRegisters,
)
from larpixdaq.emulators.chips import SUPPLIES
from larpixdaq.emulators.noise import Noise
from larpixdaq.emulators.revisions import VDDA, VDDD, Rail
from larpixdaq.schema import ASICS, SPAN

#: The words of a board: bytes 0 to 7, the packet (bytes 8 to 15), and when it came, in ticks.
WORD: Final = np.dtype([("head", "<u8"), ("packet", "<u8"), ("tick", "<i8")])
MOST_WORDS: Final = 65_535
TICKS: Final = 10_000_000  # a second
_HEARTBEAT_ON: Final = 0b010
_RESET: Final = 0b100
#: What a board keeps until it can send it, as the memory of a PACMAN does (words).
MEMORY: Final = 1_966_080
#: Ticks from the chip to the board; recorded runs have a median of 293.
LATENCY: Final = 290
#: Bits of a word on an io_channel: 64, start and stop.
UART_BITS: Final = 66
#: The io_channel that stands for all of them, towards the chips.
EVERY_CHANNEL: Final = 255
#: Words that a chip keeps until the line carries them: all of its channels may say something at once.
FIFO: Final = 2_048
#: Where the registers of a bank are that decide about lines: of UARTs, the tiles' clocks, its divider, and receivers.
_LINE_REGISTERS: Final = (CLOCK_RATIO, INVERSION)
#: What a board takes in one look, for what all its io_channels can carry on average.
_SLACK: Final = 1.2
#: Ticks between two looks at the chips' noise.
LOOK: Final = 50_000
#: Hits that one look takes, at most: what is made must also be sent, by the same processor.
MOST_AT_ONCE: Final = 65_536
#: Seconds until the next turn when nothing comes by itself but heartbeats.
IDLE: Final = 0.1
#: Ticks between two heartbeats or triggers of the board, at least, whatever its registers say.
LEAST_PERIOD: Final = 1_000
#: Board registers count ticks of 100 MHz.
_FAST: Final = 10


def make_packets(
    asic: str,
    chip_ids: NDArray[Any],
    channels: NDArray[Any],
    ticks: NDArray[Any],
    adc: NDArray[Any],
    triggers: NDArray[Any],
    full: NDArray[np.bool_] | bool = False,
) -> NDArray[np.uint64]:
    """Data packets (u8) of chips of this generation; `full`: they say that a FIFO is full."""
    flag = np.asarray(full, np.uint64)
    chip, channel, tick, dataword, trigger = (
        part.astype(np.uint64) for part in (chip_ids, channels, ticks, adc, triggers)
    )

    def at(part: NDArray[np.uint64], bit: int, bits: int) -> NDArray[np.uint64]:
        shifted: NDArray[np.uint64] = (part & np.uint64((1 << bits) - 1)) << np.uint64(bit)
        return shifted

    words = at(chip, 2, 8) | at(channel, 10, 7 if asic == "1" else 6)
    if asic == "1":
        words |= at(tick >> np.uint64(1), 17, 24) | at(dataword, 41, 10) | flag << np.uint64(52)
    elif asic == "3":
        words |= np.uint64(1) | at(tick, 16, 28) | at(dataword, 46, 10)
    else:
        words |= at(tick, 16, 31) | np.uint64(1 << 47) | at(dataword, 48, 8)  # each is the first of its burst
    if asic != "1":
        words |= at(trigger, 56, 2) | flag << np.uint64(59) | np.uint64(1 << 62)
    return parity(words, asic=ASICS[asic])


def data_words(io_channels: NDArray[Any], packets: NDArray[Any], ticks: Any, period: int) -> NDArray[Any]:
    """D words of these packets; the board's clock begins anew after `period` ticks."""
    words = np.empty(len(packets), WORD)
    words["tick"] = ticks
    words["packet"] = packets
    receipt = (words["tick"] % period).astype(np.uint64)
    words["head"] = np.uint64(ord("D")) | io_channels.astype(np.uint64) << np.uint64(8) | receipt << np.uint64(16)
    return words


def event_word(kind: bytes, what: int, tick: int, stamp: int) -> NDArray[Any]:
    """An S or T word of sync type or trigger bits `what`."""
    return np.array([(kind[0] | what << 8 | stamp << 32, 0, tick)], WORD)


def make_messages(
    words: NDArray[Any], per_message: int, window: int, seconds: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """These words in messages: buffer and spans. `seconds`: unix seconds at tick 0.

    Each holds `per_message` words; with 0 a message ends where `window` ticks pass without a word.
    """
    n = len(words)
    place = np.arange(n)
    if per_message:
        first = place[::per_message]
    else:
        pauses = np.diff(words["tick"]) > window
        first = np.flatnonzero(np.concatenate(([True], pauses | (place[1:] % MOST_WORDS == 0))))
    counts = np.diff(first, append=n)
    message = np.repeat(np.arange(len(first)), counts)
    buffer = np.empty(2 * n + len(first), np.uint64)
    starts = 2 * first + np.arange(len(first))
    sent_at = (seconds + words["tick"][first] // TICKS).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    buffer[starts] = np.uint64(ord("D")) | sent_at << np.uint64(8) | counts.astype(np.uint64) << np.uint64(48)
    at = 2 * place + message + 1
    buffer[at] = words["head"]
    buffer[at + 1] = words["packet"]
    spans = np.empty(len(first), SPAN)
    spans["start"] = 8 * starts
    spans["length"] = 8 + 16 * counts
    return buffer.view(np.uint8), spans


def _multiples(period: int, since: int, now: int) -> range:
    """Those after tick `since` up to `now`; none of 0."""
    return range(since // period * period + period, now + 1, period) if period else range(0)


class Losses:
    """What becomes of configuration words on their way: each 512th to the chips lost with `bug_512`; of the answers the
    fraction `lose` lost, `double` sent twice. `count` says how many."""

    def __init__(self, *, bug_512: bool = False, lose: float = 0.0, double: float = 0.0, seed: int = 0) -> None:
        self.count = {"words_lost": 0, "answers_lost": 0, "answers_doubled": 0}
        self._bug_512 = bug_512
        self._lose = lose
        self._double = double
        self._sent = 0
        self._random = np.random.default_rng([seed, 5])

    def sent(self, words: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nth = self._sent + 1 + np.arange(len(words))
        self._sent += len(words)
        if not self._bug_512:
            return words
        there = nth % 512 != 0
        self.count["words_lost"] += int((~there).sum())
        arrived: NDArray[np.uint8] = words[there]
        return arrived

    def answered(self, words: NDArray[Any]) -> NDArray[Any]:
        if not self._lose and not self._double:
            return words
        fate = self._random.random(len(words))
        lost = fate < self._lose
        twice = ~lost & (fate < self._lose + self._double)
        self.count["answers_lost"] += int(lost.sum())
        self.count["answers_doubled"] += int(twice.sum())
        return np.repeat(words, np.where(lost, 0, 1 + twice))


class EmulatedTile:
    """What is behind a board's sockets, in the manner of emulate.PacmanBoard (`Words`).

    `tick`: where the clock of 10 MHz begins; the time is that of time.monotonic(). `heartbeat`: ticks between
    two of its sync words, 0 for none. `registers`: those of a PACMAN, which decide about power, resets, lines and
    triggers; without them chips are as they were made, and an io_channel takes `carries` hits each second. `losses`:
    what becomes of configuration words on their way.
    """

    def __init__(
        self,
        noise: Noise,
        *,
        seconds: int,
        tick: int,
        pps: bool = False,
        heartbeat: int = 10 * TICKS,
        carries: int = 0,
        losses: Losses | None = None,
        registers: BoardRegisters | None = None,
    ) -> None:
        self.noise = noise
        self.chips = noise.chips
        self.chips.on_pulse = self._pulse
        self.losses = losses or Losses()
        self.buffer: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.spans: NDArray[Any] = np.zeros(0, SPAN)
        self.full = 0
        self.left = True
        #: Words that came when the board's memory was full, and hits that found no room on the chips' io_channels.
        self.overflowed = 0
        self.crowded = 0
        self._seconds = seconds
        self._zero = time.monotonic() - tick / TICKS
        self._period = TICKS if pps else 1 << 32
        self._heartbeat = heartbeat
        self._trigger = 0  # ticks between two, 0: none
        self._trigger_every = TICKS // 10
        self._looked = tick
        self._most_room = FIFO * len(self.chips.keys)
        self._room = float(self._most_room)  # words that would find a way out now, or room in a chip
        self._carries = np.zeros(256, np.int64)  # by io_channel
        self._io_channels = sorted({io_channel for io_channel, _ in self.chips.keys})
        self._carries[self._io_channels] = carries
        self._waiting: deque[NDArray[Any]] = deque()
        self._n_waiting = 0
        self._new_lines = False
        self._registers = registers
        if registers:
            registers.changed = self._changed
            self.chips.power(self._powered(registers), tick)
            self._lines(registers)

    @property
    def tick(self) -> int:
        return int((time.monotonic() - self._zero) * TICKS)

    @property
    def receipt(self) -> int:
        return self.tick % self._period

    def jump(self, seconds: int) -> None:
        self._seconds += seconds

    def restart(self) -> None:
        self._zero = time.monotonic()
        self._looked = 0
        self._seconds = 0
        self.chips.began.fill(0)

    def set_ticks_per_bit(self, io_channel: int, ticks: int) -> None:
        """Of the UART of a board that has no registers for it."""
        self.chips.network.ticks_per_bit[io_channel] = ticks
        self.chips.network.changed_all()
        self._new_lines = True

    def transmit(self, words: NDArray[np.uint8]) -> None:
        """Words to the chips, shape (N, 16), in order."""
        words = self._spread(self.losses.sent(words))
        sent = np.ascontiguousarray(words[:, 8:]).view(np.uint64)[:, 0]
        answers, channels = self.chips.send(sent, np.ascontiguousarray(words[:, 1]))
        said = data_words(channels, answers, self.tick, self._period)
        self._keep(self.losses.answered(said))

    def _spread(self, words: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """These words, with one for each io_channel in place of those that go to all of them."""
        to_all = words[:, 1] == EVERY_CHANNEL
        if not to_all.any():
            return words
        copies = np.where(to_all, len(self._io_channels), 1)
        spread = np.repeat(words, copies, axis=0)
        spread[np.repeat(to_all, copies), 1] = np.tile(self._io_channels, np.count_nonzero(to_all))
        return spread

    def _changed(self, register: int, before: int, value: int) -> None:
        """A register of the board was written."""
        assert self._registers
        if register in (TILE_ENABLE, ANALOG_POWER) or register >= I2C:
            self._power(self._powered(self._registers))
        elif register == CLOCK_CONTROL:
            if value & ~before & _RESET:
                self.reset(self._registers[RESET_CYCLES], self._registers.reset_tiles())
            self._heartbeat = (self._heartbeat or 10 * TICKS) if value & _HEARTBEAT_ON else 0
        elif register == HEARTBEAT_CYCLES and self._heartbeat:
            self._heartbeat = max(LEAST_PERIOD, value // _FAST)
        elif register == TRIGGER_CONTROL:
            self._trigger = self._trigger_every if value & 1 else 0
        elif register == TRIGGER_CYCLES:
            self._trigger_every = max(LEAST_PERIOD, value // _FAST)
            self._trigger = self._trigger and self._trigger_every
        receivers = self._registers.revision.receivers
        if register == receivers or (register < I2C and register % BANK in _LINE_REGISTERS):
            self._lines(self._registers)

    def _powered(self, registers: BoardRegisters) -> int:
        """The tiles whose supplies are high enough for their chips, a bit each."""
        least = SUPPLIES[self.chips.asic].least
        tiles = 0
        for tile in range(registers.revision.tiles):
            volts = (registers.volts(Rail(tile, VDDA)), registers.volts(Rail(tile, VDDD)))
            tiles |= (volts[0] >= least[0] and volts[1] >= least[1]) << tile
        return tiles

    def _power(self, tiles: int) -> None:
        if tiles != self.chips.tiles:
            self._catch_up(now := self.tick)
            self.chips.power(tiles, now)

    def reset(self, length: int, tiles: int = -1) -> None:
        """A reset of so many ticks comes to the chips of these tiles, a bit each."""
        self._catch_up(now := self.tick)
        self.chips.reset(length, now, tiles)

    def _lines(self, registers: BoardRegisters) -> None:
        network = self.chips.network
        for io_channel in self._io_channels:
            ratio = max(1, registers.ratio(io_channel))
            self._carries[io_channel] = registers.revision.uart_clock // (ratio * UART_BITS)
            line = registers.line(io_channel)
            network.to_chips[io_channel], network.from_chips[io_channel], network.ticks_per_bit[io_channel] = line
        network.changed_all()
        self._new_lines = True

    def waiting(self) -> int:
        """Words that could be sent now."""
        now = self.tick
        if now - self._looked >= LOOK and self._n_waiting < MOST_AT_ONCE:
            self._catch_up(now)
        return self._n_waiting

    def _catch_up(self, now: int) -> None:
        self._update()
        # one that was kept from looking for long does not make up for all of it
        self._look(max(self._looked, now - TICKS), now)
        self._looked = now

    @property
    def busy(self) -> bool:
        """Whether words may come by themselves at any moment."""
        return self.noise.busy or self._trigger > 0

    def _look(self, since: int, now: int) -> None:
        """What came by itself, after tick `since` up to `now`."""
        found = []
        for tick in _multiples(self._period, since, now):
            found.append(event_word(b"S", ord("S"), tick, min(self._period, 0xFFFFFFFF)))
        for tick in _multiples(self._heartbeat, since, now):
            found.append(event_word(b"S", ord("H"), tick, tick % self._period))
        for tick in _multiples(self._trigger, since, now):
            found += [event_word(b"T", 1, tick, tick % self._period), self._words(self.noise.external(tick))]
        carried = _SLACK * self._carries.sum() * (now - since) / TICKS
        self._room = min(self._room + carried, max(carried, self._most_room))
        if self.noise.busy:
            hits, lost, more = self.noise.hits(since, now, min(int(self._room), MOST_AT_ONCE))
            self._room -= len(hits)
            self.crowded += lost + more
            if len(hits):
                found.append(self._words(hits, crowded=more > 0))
        if found:
            words = np.concatenate(found)
            self._keep(words[np.argsort(words["tick"], kind="stable")])

    def _words(self, hits: NDArray[Any], *, crowded: bool = False) -> NDArray[Any]:
        """D words of those hits that have a way out; those that others found no room beside say so."""
        io_channels = self.chips.channels_of(hits["chip"])
        out = io_channels >= 0
        hits, io_channels = hits[out], io_channels[out]
        full = (self.noise.share[hits["chip"]] < 1) | crowded
        ids, asic = self.chips.ids()[hits["chip"]], self.chips.asic
        stamps = self._stamps(hits["tick"] - LATENCY, self.chips.began[hits["chip"]])
        made = make_packets(asic, ids, hits["channel"], stamps, hits["adc"], hits["trigger"], full)
        self.full += int(full.sum())
        return data_words(io_channels, made, hits["tick"], self._period)

    def _stamps(self, ticks: NDArray[Any], began: NDArray[Any]) -> NDArray[Any]:
        """The chips' clocks at these ticks of the board. A board that resets its own each second resets them too."""
        if self._period == TICKS:
            began = np.maximum(began, ticks // TICKS * TICKS)
        stamps: NDArray[Any] = np.maximum(ticks - began, 0)
        return stamps

    def _update(self) -> None:
        if self.noise.update() or self._new_lines:
            self._new_lines = False
            self._crowd()

    def _crowd(self) -> None:
        """Each io_channel carries the same part of what each of its chips sends by itself."""
        ways = self.chips.channels_of(np.arange(len(self.chips.keys)))
        out = ways >= 0
        load = np.bincount(ways[out], self.noise.rates.sum(1)[out], len(self._carries))
        share = np.minimum(1.0, self._carries / np.maximum(load, 1.0))
        self.noise.carry(np.where(out, share[ways], 0.0))

    def _pulse(self, chip: int, step: int) -> None:
        self._update()
        self._keep(self._words(self.noise.pulse(chip, step, self.tick)))

    def _keep(self, words: NDArray[Any]) -> None:
        room = MEMORY - self._n_waiting
        if len(words) > room:
            self.overflowed += len(words) - room
            words = words[:room]
        if len(words):
            self._waiting.append(words)
            self._n_waiting += len(words)

    def take(self) -> NDArray[np.uint64]:
        """The packets of all words that could be sent now, for boards that send packets alone."""
        if not self.waiting():
            return np.zeros(0, np.uint64)
        waiting, self._waiting, self._n_waiting = self._waiting, deque(), 0
        return np.concatenate([words["packet"][words["head"] & np.uint64(0xFF) == ord("D")] for words in waiting])

    def counts(self) -> dict[str, int]:
        """What did not come through, and why."""
        own = {"overflowed": self.overflowed, "crowded": self.crowded}
        return own | self.chips.count() | self.losses.count

    def fill(self, words: int, per_message: int = 0, window: int = SERVICE_TICKS) -> int:
        """Make the next messages, of at most `words` waiting words, the ones at `spans` of `buffer`; how many."""
        parts = []
        while words and self._waiting:
            first = self._waiting.popleft()
            if len(first) > words:
                self._waiting.appendleft(first[words:])
            parts.append(first[:words])
            words -= len(parts[-1])
        if not parts:
            return 0
        made = np.concatenate(parts)
        self._n_waiting -= len(made)
        self.buffer, self.spans = make_messages(made, per_message, window, self._seconds)
        return len(self.spans)


class TileBoard(EmulatedBoard):
    """A board whose chips and registers decide what is to be sent, and when."""

    def __init__(self, io_group: int, tile: EmulatedTile, registers: BoardRegisters, **options: Any) -> None:
        super().__init__(io_group, tile, registers, rate=None, transmit=tile.transmit, **options)
        self.tile = tile

    def counts(self) -> dict[str, int]:
        return super().counts() | self.tile.counts()

    def _make(self, now: float) -> float:
        words = self.tile.waiting()
        if not words:
            return LOOK / TICKS if self.tile.busy else IDLE
        most = max(BATCH, self._per_message)
        words = min(words, most) if self._left is None else min(words, most, self._left)
        self._behind = self.tile.waiting() > words
        self._take(words, SERVICE_TICKS)
        return 0.0
