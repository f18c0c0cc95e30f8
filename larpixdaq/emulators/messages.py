"""Packets and PACMAN data messages (legacy format) from arrays."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.packets import parity
from larpixdaq.schema import ASICS, SPAN

#: The words of a board: bytes 0 to 7, the packet (bytes 8 to 15), and when it came, in ticks.
WORD: Final = np.dtype([("head", "<u8"), ("packet", "<u8"), ("tick", "<i8")])
MOST_WORDS: Final = 65_535
TICKS: Final = 10_000_000  # a second


def packets(
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


def messages(
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
