"""Emulated board with chips: its clock, words to the chips, and the words and data messages of chips and board.

Messages have the legacy format of PACMAN boards.
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
from larpixdaq.emulators.noise import FIFO, TICK_BITS, TICKS, Noise
from larpixdaq.emulators.revisions import VDDA, VDDD, Rail
from larpixdaq.schema import ASICS, SPAN

#: A word of a board: its bytes 0 to 7, its packet (bytes 8 to 15), and the tick at which the board received it.
WORD: Final = np.dtype([("head", "<u8"), ("packet", "<u8"), ("tick", "<i8")])
#: Maximum words of a message.
MAX_WORDS: Final = 65_535
#: Words that a board keeps until it can send them: the memory of a PACMAN.
MEMORY: Final = 1_966_080
#: Ticks from the chip to the board; recorded runs have a median of 293.
LATENCY: Final = 290
#: Bits of a word on an io_channel: 64, start and stop.
UART_BITS: Final = 66
#: The io_channel of words that the board sends to the chips of all io_channels.
ALL_CHANNELS: Final = 255
#: Maximum hits that a board takes, in multiples of what all its io_channels carry on average.
_SLACK: Final = 1.2
#: Minimum ticks between two generations of hits.
GENERATION_TICKS: Final = 50_000
#: Maximum hits of a generation, because the same processor must also send them.
MAX_HITS: Final = 65_536
#: Seconds until the next turn when only heartbeats are due.
IDLE: Final = 0.1
#: Minimum ticks between two heartbeats or triggers of the board, whatever its registers ask for.
MIN_PERIOD: Final = 1_000
_DEFAULT_HEARTBEAT: Final = 10 * TICKS
#: By chip generation: bits of a timestamp below the one that can mark the first packet of a burst. Others have 31.
TIMESTAMP_BITS: Final = {"3": 27}
#: Ticks of the board registers' 100 MHz clock in a tick of 10 MHz.
_FAST: Final = 10
#: Bits of the clock control register.
_HEARTBEAT_ON: Final = 0b010
_RESET: Final = 0b100
#: Registers of a UART that change its line.
_LINE_REGISTERS: Final = (CLOCK_RATIO, INVERSION)


class EmulatedTile:
    """Chips and clock of a board; a `MessageSource` of the words that they send.

    `seconds`: unix time at tick 0. `tick`: start of the 10 MHz clock, which follows time.monotonic(). `pps`: the clock
    restarts each second. `heartbeat`: ticks between heartbeats, 0 for none. `registers`: those of a PACMAN, which set
    power, resets, lines and triggers; without them the chips keep their power, and an io_channel carries `carries`
    hits/s.
    """

    def __init__(
        self,
        noise: Noise,
        *,
        seconds: int,
        tick: int,
        pps: bool = False,
        heartbeat: int = _DEFAULT_HEARTBEAT,
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
        #: Words lost because the board's memory was full, and hits lost because the io_channels carry no more.
        self.overflowed = 0
        self.crowded = 0
        self._seconds = seconds
        self._zero = time.monotonic() - tick / TICKS
        self._period = TICKS if pps else 1 << 32
        self._heartbeat = heartbeat
        self._trigger = 0  # ticks between two triggers, 0 while they are off
        self._trigger_period = TICKS // 10
        self._generated = tick  # tick up to which hits and events were generated
        self._max_capacity = FIFO * len(self.chips.keys)
        self._capacity = float(self._max_capacity)  # words that chips and io_channels can take now
        self._carries = np.zeros(256, np.int64)  # by io_channel
        self._io_channels = sorted({io_channel for io_channel, _ in self.chips.keys})
        self._carries[self._io_channels] = carries
        self._queue: deque[NDArray[Any]] = deque()
        self._n_queued = 0
        self._later: NDArray[Any] = np.zeros(0, WORD)  # words of bursts after the last generation
        self._fifos = WaitingWords()
        self._lines_changed = False
        self._registers = registers
        if registers:
            registers.on_change = self._register_changed
            tiles, analog = self._tiles_with_power(registers)
            self.chips.power(tiles, tick, analog)
            self._set_lines(registers)

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
        self._generated = 0
        self._seconds = 0
        self._later = self._later[:0]
        self._fifos = WaitingWords()
        self.chips.clock_start.fill(0)

    def set_ticks_per_bit(self, io_channel: int, ticks: int) -> None:
        """Set the speed of a line of a board without registers, in ticks of the chips' clock for each bit."""
        self.chips.network.ticks_per_bit[io_channel] = ticks
        self.chips.network.invalidate()
        self._lines_changed = True

    def transmit(self, words: NDArray[np.uint8]) -> None:
        """Send words, shape (N, 16), to the chips, in order."""
        words = self._expand_broadcasts(self.losses.lose_words(words))
        packets = np.ascontiguousarray(words[:, 8:]).view(np.uint64)[:, 0]
        answers, channels = self.chips.send(packets, np.ascontiguousarray(words[:, 1]))
        self._enqueue(self.losses.change_answers(data_words(channels, answers, self.tick, self._period)))

    def _expand_broadcasts(self, words: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Replace each word to all io_channels by one word for each io_channel."""
        to_all = words[:, 1] == ALL_CHANNELS
        if not to_all.any():
            return words
        copies = np.where(to_all, len(self._io_channels), 1)
        expanded = np.repeat(words, copies, axis=0)
        expanded[np.repeat(to_all, copies), 1] = np.tile(self._io_channels, np.count_nonzero(to_all))
        return expanded

    def _register_changed(self, register: int, old: int, value: int) -> None:
        """Apply a write to a register of the board."""
        assert self._registers
        if register in (TILE_ENABLE, ANALOG_POWER) or register >= I2C:
            self._power(*self._tiles_with_power(self._registers))
        elif register == CLOCK_CONTROL:
            if value & ~old & _RESET:
                self.reset(self._registers[RESET_CYCLES], self._registers.reset_tiles())
            self._heartbeat = (self._heartbeat or _DEFAULT_HEARTBEAT) if value & _HEARTBEAT_ON else 0
        elif register == HEARTBEAT_CYCLES and self._heartbeat:
            self._heartbeat = max(MIN_PERIOD, value // _FAST)
        elif register == TRIGGER_CONTROL:
            self._trigger = self._trigger_period if value & 1 else 0
        elif register == TRIGGER_CYCLES:
            self._trigger_period = max(MIN_PERIOD, value // _FAST)
            self._trigger = self._trigger and self._trigger_period
        receivers = self._registers.revision.receivers
        if register == receivers or (register < I2C and register % BANK in _LINE_REGISTERS):
            self._set_lines(self._registers)

    def _tiles_with_power(self, registers: BoardRegisters) -> tuple[int, int]:
        """Masks of the tiles whose VDDD is high enough for their chips, and of those whose VDDA is, too."""
        minimum = SUPPLIES[self.chips.asic].minimum
        high = [0, 0]
        for tile in range(registers.revision.tiles):
            for rail in (VDDA, VDDD):
                high[rail] |= (registers.volts(Rail(tile, rail)) >= minimum[rail]) << tile
        return high[VDDD], high[VDDD] & high[VDDA]

    def _power(self, tiles: int, analog: int) -> None:
        if (tiles, analog) != self.chips.powered_tiles:
            self._generate_until(now := self.tick)
            self.chips.power(tiles, now, analog)

    def reset(self, length: int, tiles: int = -1) -> None:
        """Reset the chips on these tiles (mask) for `length` ticks of their clock."""
        self._generate_until(now := self.tick)
        self.chips.reset(length, now, tiles)

    def _set_lines(self, registers: BoardRegisters) -> None:
        network = self.chips.network
        for io_channel in self._io_channels:
            ratio = max(1, registers.clock_ratio(io_channel))
            self._carries[io_channel] = registers.revision.uart_clock // (ratio * UART_BITS)
            line = registers.uart_line(io_channel)
            network.to_chips[io_channel], network.from_chips[io_channel], network.ticks_per_bit[io_channel] = line
        network.invalidate()
        self._lines_changed = True

    def queued_words(self) -> int:
        """Generate what is due, and return the number of words that could be sent now."""
        now = self.tick
        if now - self._generated >= GENERATION_TICKS and self._n_queued < MAX_HITS:
            self._generate_until(now)
        return self._n_queued

    def _generate_until(self, now: int) -> None:
        self._update_shares()
        # at most the last second: after a longer pause the rest is not made up for
        self._generate(max(self._generated, now - TICKS), now)
        self._generated = now

    @property
    def busy(self) -> bool:
        """Whether hits or triggers may come at any moment."""
        return self.noise.busy or self._trigger > 0 or len(self._later) > 0

    def _generate(self, start: int, end: int) -> None:
        """Enqueue syncs, heartbeats, triggers and hits after tick `start`, up to `end`."""
        parts = [self._later] if len(self._later) else []
        for tick in _multiples(self._period, start, end):
            parts.append(event_word(b"S", ord("S"), tick, min(self._period, 0xFFFFFFFF)))
        for tick in _multiples(self._heartbeat, start, end):
            parts.append(event_word(b"S", ord("H"), tick, tick % self._period))
        samples = []
        for tick in _multiples(self._trigger, start, end):
            parts.append(event_word(b"T", 1, tick, tick % self._period))
            samples.append(self.noise.external(tick))
        carried = _SLACK * self._carries.sum() * (end - start) / TICKS
        self._capacity = min(self._capacity + carried, max(carried, self._max_capacity))
        if self.noise.busy:
            hits, lost, excess = self.noise.hits(start, end, min(int(self._capacity), MAX_HITS))
            self._capacity -= len(hits)
            self.crowded += lost + excess
            hits["full"] |= excess > 0
            samples.append(hits)
        if samples:
            parts.append(self._hit_words(np.concatenate(samples)))
        if parts:
            self._enqueue_until(np.concatenate(parts), end)

    def _enqueue_until(self, words: NDArray[Any], end: int) -> None:
        """Enqueue the words up to tick `end`, in order, and keep the others for the next generation."""
        words = words[np.argsort(words["tick"], kind="stable")]
        n = int(np.searchsorted(words["tick"], end, side="right"))
        self._later = words[n:]
        self._enqueue(words[:n])

    def _hit_words(self, hits: NDArray[Any]) -> NDArray[Any]:
        """Return the D words of those hits that reach the board.

        Their FIFO-full flag is set if `full`, and for chips that lose hits because their io_channel carries no more.
        """
        io_channels = self.chips.exit_channels(hits["chip"])
        connected = io_channels >= 0
        hits, io_channels = hits[connected], io_channels[connected]
        chip = hits["chip"]
        flags = (self.noise.share[chip] < 1) | hits["full"]
        ids, asic = self.chips.chip_ids()[chip], self.chips.asic
        stamps = self._timestamps(hits["tick"] - LATENCY, self.chips.clock_start[chip])
        first = np.where(self.noise.marks[chip], hits["first"], stamps >> TIMESTAMP_BITS.get(asic, 31) & 1)
        packets = make_packets(asic, ids, hits["channel"], stamps, hits["adc"], hits["trigger"], flags, first)
        if self.noise.diagnostics.any() and len(hits):
            spacing = TICKS / np.maximum(self._carries, 1)
            waiting = self._fifos.count(chip, hits["tick"], io_channels, spacing)
            waiting[flags] = FIFO
            packets = np.where(self.noise.diagnostics[chip], with_counts(packets, waiting), packets)
        self.full += int(flags.sum())
        return data_words(io_channels, self.chips.arrive(packets, chip), hits["tick"], self._period)

    def _timestamps(self, ticks: NDArray[Any], clock_start: NDArray[Any]) -> NDArray[Any]:
        """Return the chips' clocks at ticks of the board. A board whose clock restarts each second restarts theirs."""
        if self._period == TICKS:
            clock_start = np.maximum(clock_start, ticks // TICKS * TICKS)
        stamps: NDArray[Any] = np.maximum(ticks - clock_start, 0)
        return stamps

    def _update_shares(self) -> None:
        """Update the fraction of hits that io_channels carry: the same for all chips of an io_channel."""
        if not self.noise.update() and not self._lines_changed:
            return
        self._lines_changed = False
        io_channels = self.chips.exit_channels(np.arange(len(self.chips.keys)))
        connected = io_channels >= 0
        load = np.bincount(io_channels[connected], self.noise.load()[connected], len(self._carries))
        share = np.minimum(1.0, self._carries / np.maximum(load, 1.0))
        self.noise.set_share(np.where(connected, share[io_channels], 0.0))

    def _pulse(self, chip: int, step: int) -> None:
        self._update_shares()
        now = self.tick
        words = self._hit_words(self.noise.pulse(chip, step, now))
        later = words["tick"] > now
        self._enqueue(words[~later])
        self._later = np.concatenate([self._later, words[later]])

    def _enqueue(self, words: NDArray[Any]) -> None:
        free = MEMORY - self._n_queued
        if len(words) > free:
            self.overflowed += len(words) - free
            words = words[:free]
        if len(words):
            self._queue.append(words)
            self._n_queued += len(words)

    def take_packets(self) -> NDArray[np.uint64]:
        """Remove all queued words and return their packets, for boards that send packets alone."""
        if not self.queued_words():
            return np.zeros(0, np.uint64)
        queue, self._queue, self._n_queued = self._queue, deque(), 0
        return np.concatenate([words["packet"][words["head"] & np.uint64(0xFF) == ord("D")] for words in queue])

    def counts(self) -> dict[str, int]:
        """Return the numbers of words that were lost or doubled, by cause."""
        own = {"overflowed": self.overflowed, "crowded": self.crowded + self.noise.crowded}
        return own | self.chips.counts() | self.losses.counts

    def fill(self, words: int, per_message: int = 0, window: int = SERVICE_TICKS) -> int:
        """Move at most `words` queued words into messages, in `buffer` at `spans`. Returns the number of messages."""
        parts = []
        while words and self._queue:
            first = self._queue.popleft()
            if len(first) > words:
                self._queue.appendleft(first[words:])
            parts.append(first[:words])
            words -= len(parts[-1])
        if not parts:
            return 0
        content = np.concatenate(parts)
        self._n_queued -= len(content)
        self.buffer, self.spans = make_messages(content, per_message, window, self._seconds)
        return len(self.spans)


class TileBoard(EmulatedBoard):
    """Emulated board that sends the words of its chips, at their rates."""

    def __init__(self, io_group: int, tile: EmulatedTile, registers: BoardRegisters, **options: Any) -> None:
        super().__init__(io_group, tile, registers, rate=None, transmit=tile.transmit, **options)
        self.tile = tile

    def counts(self) -> dict[str, int]:
        return super().counts() | self.tile.counts()

    def _make(self, now: float) -> float:
        queued = self.tile.queued_words()
        if not queued:
            return GENERATION_TICKS / TICKS if self.tile.busy else IDLE
        limit = max(BATCH, self._per_message)
        words = min(queued, limit) if self._remaining is None else min(queued, limit, self._remaining)
        self._overdue = queued > words
        self._take(words, SERVICE_TICKS)
        return 0.0


class Losses:
    """Losses of configuration words: each 512th to the chips with `bug_512`, and fractions of the answers.

    `lose`: fraction of answers lost. `double`: fraction of answers sent twice. `counts`: words that were affected.
    """

    def __init__(self, *, bug_512: bool = False, lose: float = 0.0, double: float = 0.0, seed: int = 0) -> None:
        self.counts = {"words_lost": 0, "answers_lost": 0, "answers_doubled": 0}
        self._bug_512 = bug_512
        self._lose = lose
        self._double = double
        self._words = 0
        self._random = np.random.default_rng([seed, 5])

    def lose_words(self, words: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return those of the next words to the chips that arrive."""
        nth = self._words + 1 + np.arange(len(words))
        self._words += len(words)
        if not self._bug_512:
            return words
        arrives = nth % 512 != 0
        self.counts["words_lost"] += int((~arrives).sum())
        arrived: NDArray[np.uint8] = words[arrives]
        return arrived

    def change_answers(self, words: NDArray[Any]) -> NDArray[Any]:
        """Return the answers without the lost ones, and with doubled ones twice."""
        if not self._lose and not self._double:
            return words
        fate = self._random.random(len(words))
        lost = fate < self._lose
        doubled = ~lost & (fate < self._lose + self._double)
        self.counts["answers_lost"] += int(lost.sum())
        self.counts["answers_doubled"] += int(doubled.sum())
        return np.repeat(words, np.where(lost, 0, 1 + doubled))


def make_packets(
    asic: str,
    chip_ids: NDArray[Any],
    channels: NDArray[Any],
    ticks: NDArray[Any],
    adc: NDArray[Any],
    triggers: NDArray[Any],
    full: NDArray[np.bool_] | bool,
    first: NDArray[Any] | bool = True,
) -> NDArray[np.uint64]:
    """Return data packets (u8) of chips of this generation.

    `full`: their flag that a FIFO is full. `first`: the highest bit of their timestamps, which v1 packets do not have.
    """
    flag, mark = np.asarray(full, np.uint64), np.asarray(first, np.uint64)
    chip, channel, tick, dataword, trigger = (
        part.astype(np.uint64) for part in (chip_ids, channels, ticks, adc, triggers)
    )

    def bits(values: NDArray[np.uint64], low: int, width: int) -> NDArray[np.uint64]:
        shifted: NDArray[np.uint64] = (values & np.uint64((1 << width) - 1)) << np.uint64(low)
        return shifted

    words = bits(chip, 2, 8) | bits(channel, 10, 7 if asic == "1" else 6)
    if asic == "1":
        words |= bits(tick >> np.uint64(1), 17, 24) | bits(dataword, 41, 10) | flag << np.uint64(52)
    elif asic == "3":
        words |= np.uint64(1) | bits(tick, 16, 27) | mark << np.uint64(43) | bits(dataword, 46, 10)
    else:
        words |= bits(tick, 16, 31) | mark << np.uint64(47) | bits(dataword, 48, 8)
    if asic != "1":
        words |= bits(trigger, 56, 2) | flag << np.uint64(59) | np.uint64(1 << 62)
    return parity(words, asic=ASICS[asic])


def with_counts(packets: NDArray[np.uint64], waiting: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return data packets of v2 chips in the mode fifo diagnostics, with the words that wait in the chip's FIFO.

    A channel's own FIFO, of four words, is full when that of its chip is, and empty otherwise.
    """
    local = np.where(waiting >= FIFO, 3, 0)
    counts = (np.minimum(waiting, FIFO) | local << 12).astype(np.uint64) << np.uint64(32)
    return parity(packets & ~np.uint64(0x3FFF << 32 | 1 << 63) | counts, asic=ASICS["2"])


class WaitingWords:
    """Words that wait in the chips' FIFOs, of lines that carry the words of all their chips in the order of making."""

    def __init__(self) -> None:
        self._free = np.zeros(256)  # by io_channel: tick at which it has carried its last word
        self._chips = np.zeros(0, np.int64)  # of the waiting words, in order
        self._leave = np.zeros(0, np.int64)  # ticks at which they leave

    def count(
        self, chips: NDArray[Any], ticks: NDArray[Any], io_channels: NDArray[Any], spacing: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Add words and return how many words of its chip wait before each of them.

        `spacing`: by io_channel, ticks that a word takes.
        """
        order = np.argsort(ticks, kind="stable")
        leave = np.zeros(len(ticks), np.int64)
        for io_channel in np.unique(io_channels):
            at = order[io_channels[order] == io_channel]
            carried = spacing[io_channel] * np.arange(len(at))
            start = np.maximum(np.maximum.accumulate(ticks[at] - carried), self._free[io_channel])
            leave[at] = np.ceil(start + carried + spacing[io_channel])
            longest = spacing[io_channel] * FIFO * len(np.unique(chips[at]))
            self._free[io_channel] = min(leave[at[-1]], ticks[at[-1]] + longest)
        waiting, n = len(self._chips), len(order)
        self._chips = np.concatenate([self._chips, chips[order]])
        self._leave = np.concatenate([self._leave, leave[order]])
        by_chip = np.argsort(self._chips, kind="stable")
        in_order = self._chips[by_chip]
        entered = np.empty(len(by_chip), np.int64)  # words of the chip before each word
        entered[by_chip] = np.arange(len(by_chip)) - np.searchsorted(in_order, in_order)
        leaving = np.sort(self._chips << TICK_BITS | self._leave)
        begin = chips.astype(np.int64) << TICK_BITS
        left = np.searchsorted(leaving, begin | ticks, side="right") - np.searchsorted(leaving, begin)
        counts = np.empty(n, np.int64)
        counts[order] = entered[waiting:]
        keep = self._leave > ticks[order[-1]]
        self._chips, self._leave = self._chips[keep], self._leave[keep]
        waiting_before: NDArray[np.int64] = counts - left
        return waiting_before


def data_words(io_channels: NDArray[Any], packets: NDArray[Any], ticks: Any, period: int) -> NDArray[Any]:
    """Return D words with these packets, of dtype WORD. The board's clock restarts after `period` ticks."""
    words = np.empty(len(packets), WORD)
    words["tick"] = ticks
    words["packet"] = packets
    receipt = (words["tick"] % period).astype(np.uint64)
    words["head"] = np.uint64(ord("D")) | io_channels.astype(np.uint64) << np.uint64(8) | receipt << np.uint64(16)
    return words


def event_word(kind: bytes, subtype: int, tick: int, timestamp: int) -> NDArray[Any]:
    """Return an S or T word, of dtype WORD. `subtype`: the sync type or the trigger bits."""
    return np.array([(kind[0] | subtype << 8 | timestamp << 32, 0, tick)], WORD)


def make_messages(
    words: NDArray[Any], per_message: int, window: int, seconds: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return a buffer with messages of these words, and the spans of the messages.

    `per_message`: words in a message; with 0 a message ends where `window` ticks pass without a word.
    `seconds`: unix time at tick 0.
    """
    n = len(words)
    numbers = np.arange(n)
    if per_message:
        first = numbers[::per_message]
    else:
        pauses = np.diff(words["tick"]) > window
        first = np.flatnonzero(np.concatenate(([True], pauses | (numbers[1:] % MAX_WORDS == 0))))
    counts = np.diff(first, append=n)
    message = np.repeat(np.arange(len(first)), counts)
    buffer = np.empty(2 * n + len(first), np.uint64)
    starts = 2 * first + np.arange(len(first))
    sent_at = (seconds + words["tick"][first] // TICKS).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    buffer[starts] = np.uint64(ord("D")) | sent_at << np.uint64(8) | counts.astype(np.uint64) << np.uint64(48)
    positions = 2 * numbers + message + 1
    buffer[positions] = words["head"]
    buffer[positions + 1] = words["packet"]
    spans = np.empty(len(first), SPAN)
    spans["start"] = 8 * starts
    spans["length"] = 8 + 16 * counts
    return buffer.view(np.uint8), spans


def _multiples(period: int, start: int, end: int) -> range:
    """Multiples of `period` after `start`, up to `end`; none if the period is 0."""
    return range(start // period * period + period, end + 1, period) if period else range(0)
