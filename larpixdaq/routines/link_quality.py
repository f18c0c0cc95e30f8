"""Quality of the UART links: words that get lost or come back wrong, on the way to each chip and back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips
from larpixdaq.routines.kit.measurement import is_answer, rows_from_chips
from larpixdaq.routines.kit.report import Report
from larpixdaq.schema import chips_of, parse_key, registers_of

#: Registers that are read in each round, and bits of a question and its answer on a link.
_REGISTERS: Final = 16
_BITS: Final = 128
#: Seconds without an answer after which missing answers of a round are lost, and between two looks.
_SILENCE, _LOOK = 0.3, 0.005
#: Expected number of errors that 95 % of measurements without any error exclude.
_LIMIT_95: Final = 3.0


def _link_quality(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    words: int = 1000,
    most_errors: float | None = 0.001,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads WORDS registers of each chip, and counts the answers that are missing or wrong, for each link.

    CHIPS: a chip key, a list of chip keys, or None for all chips. All channels are masked and triggers off meanwhile;
    the registers of the chips are restored. A link is the way from a chip's neighbour nearer to the board, or from the
    board, to the chip and back. Its share of wrong words is what the chip has more than this neighbour. A link is bad
    if its share is above MOST_ERRORS by at least two standard deviations.

    Result: "links" {"1-1-11/1-1-12", or "1-1/1-1-11" from the board: {"words", "errors": fraction of words, "error":
    its standard deviation, "limit": below which the fraction is with 95 % confidence, "bit_errors": the mean fraction
    of wrong bits of question and answer}}, None where the neighbour or the chip does not answer; "chips" {chip:
    {"asked", "right", "missing", "wrong_parity", "wrong_value", "doubled": numbers of words}}; "silent": chips without
    a right answer; "answering": the other chips; "twice": chips of which more than half of the words came more than
    once, as if two chips had this id; "bad_links"; "bad_bits": fraction of wrong bits of all links together, or its
    limit "bad_bits_limit" if all words were right; "strange": answers that belong to no chip or question.
    With DIRECTORY, on the producer's machine: "files", the result as JSON and a picture.
    """
    if words < _REGISTERS:
        raise ValueError(f"words: expected at least {_REGISTERS}, found {words}")
    selected = Chips(controller, chips)
    if not hasattr(controller.io, "take_rows"):
        raise RequestError("link_quality: needs the stream of a producer, which this io does not have")
    with selected.restored(), selected.untriggered():
        selected.set(mask=1)
        counts = _Counts(selected)
        rounds = -(-words // _REGISTERS)
        controller.io.listen_to = "answers"
        controller.io.start_listening()
        try:
            for number in range(rounds):
                if number % 8 == 0:
                    send_info("words to each chip", number * _REGISTERS, rounds * _REGISTERS)
                counts.ask()
        finally:
            controller.io.stop_listening()
            controller.io.listen_to = None
    right = counts.right()
    asked = rounds * _REGISTERS
    keys = selected.keys
    by_chip = {
        key: {
            "asked": asked,
            "right": int(right[at]),
            "missing": asked - int(counts.answered[at] + counts.bad_parity[at]),
            "wrong_parity": int(counts.bad_parity[at]),
            "wrong_value": int(counts.answered[at] - right[at]),
            "doubled": int(counts.doubled[at]),
        }
        for at, key in enumerate(keys)
    }
    links = {}
    errors = np.full((len(keys), 1), np.nan)
    sure = np.full((len(keys), 1), np.nan)
    for at, key in enumerate(keys):
        parent = _parent(controller, key)
        before = None if parent is None else int(right[keys.index(parent)]) if parent in keys else 0
        link = _link(asked, int(right[at]), before)
        links[f"{parent or key.rpartition('-')[0]}/{key}"] = link
        if link["errors"] is not None:
            errors[at] = link["errors"]
            sure[at] = link["errors"] - 2 * link["error"]
    report = Report("link_quality", keys, np.zeros((len(keys), 1), np.bool_))
    report.add("errors", errors, "of the words", needed="no answers")
    bad = (sure > (math.inf if most_errors is None else most_errors))[:, 0]
    silent = right == 0
    total = asked * int((~silent).sum())
    wrong = total - int(right[~silent].sum())
    bits = _BITS * sum(_depth(controller, key) for at, key in enumerate(keys) if not silent[at]) * asked
    result: dict[str, Any] = {
        "words": asked,
        "links": links,
        "chips": by_chip,
        "silent": [key for at, key in enumerate(keys) if silent[at]],
        "answering": [key for at, key in enumerate(keys) if not silent[at]],
        "twice": [key for at, key in enumerate(keys) if counts.doubled[at] > asked / 2],
        "bad_links": [name for name, marked in zip(links, bad.tolist(), strict=True) if marked],
        "bad_bits": wrong / bits if wrong else None,
        "bad_bits_limit": _LIMIT_95 / bits if bits and not wrong else None,
        "strange": counts.strange,
        "most_errors": most_errors,
    }
    report.write(directory, result, f"{wrong:,} of {total:,} words lost or wrong; {int(silent.sum())} chips silent")
    return controller, result


class _Counts:
    """Asks each chip for the same registers again and again, and counts the answers, shape (chips,)."""

    def __init__(self, chips: Chips) -> None:
        self._chips = chips
        self._io = chips.controller.io
        count = self._io.registers.count
        self._registers = np.unique(np.linspace(0, count - 1, _REGISTERS).astype(np.int64))
        numbers = [parse_key(key) for key in chips.keys]
        self._index = {a << 16 | b << 8 | c: at for at, (a, b, c) in enumerate(numbers)}
        n = len(chips)
        #: Right and wrong answers by value, because a register may have another value than it should.
        self._values = np.zeros((n, len(self._registers), 256), np.uint32)
        self.answered, self.bad_parity, self.doubled = np.zeros((3, n), np.int64)
        self.strange = 0

    def ask(self) -> None:
        """Ask for all registers once, and wait for the answers."""
        open_ = np.ones((len(self._chips), len(self._registers)), np.bool_)
        self._io.request_registers(self._chips.keys, self._registers.tolist())
        last = time.monotonic()
        while open_.any() and time.monotonic() - last < _SILENCE:
            time.sleep(_LOOK)
            for rows in self._io.take_rows():
                if self._take(rows_from_chips(rows), open_):
                    last = time.monotonic()

    def _take(self, rows: NDArray[Any], open_: NDArray[np.bool_]) -> bool:
        """Count these rows. `open_`: questions without an answer. Returns whether there were rows."""
        if not len(rows):
            return False
        chips = np.array([self._index.get(chip, -1) for chip in chips_of(rows).tolist()], np.int64)
        wrong = rows["valid_parity"] == 0
        self.bad_parity += np.bincount(chips[wrong & (chips >= 0)], minlength=len(self.bad_parity))
        self.strange += int((wrong & (chips < 0)).sum())
        addresses, values = registers_of(rows)
        good = ~wrong & (chips >= 0) & is_answer(rows, self._registers.tolist())
        self.strange += int((~wrong & ~good).sum())
        places = np.searchsorted(self._registers, addresses[good])
        for chip, place, value in zip(chips[good].tolist(), places.tolist(), values[good].tolist(), strict=True):
            if open_[chip, place]:
                open_[chip, place] = False
                self.answered[chip] += 1
                self._values[chip, place, value] += 1
            else:
                self.doubled[chip] += 1
        return True

    def right(self) -> NDArray[np.int64]:
        """Return the number of answers with the most frequent value of their register."""
        result: NDArray[np.int64] = self._values.max(2).sum(1).astype(np.int64)
        return result


def _link(asked: int, right: int, before: int | None) -> dict[str, Any]:
    """Return the share of wrong words of a link to a chip with `right` of `asked` answers.

    `before`: right answers of the neighbour; None at the board.
    """
    share: dict[str, Any] = {"words": asked, "errors": None, "error": None, "limit": None, "bit_errors": None}
    parts = [right] if before is None else [right, before]
    if not all(parts):
        return share
    ratio = right / (asked if before is None else before)
    # Each of the two numbers is known to its binomial error, of at least one word.
    variance = sum(max((asked - part) / asked, 1 / asked) / part for part in parts)
    error = ratio * math.sqrt(variance)
    errors = max(0.0, 1 - ratio)
    limit = _LIMIT_95 / asked if right == asked and before in (None, asked) else errors + 2 * error
    bits = 1 - (1 - errors) ** (1 / _BITS) if errors < 1 else 1.0
    return share | {"errors": errors, "error": error, "limit": min(1.0, limit), "bit_errors": bits}


def _parent(controller: Any, key: str) -> str | None:
    """Return the neighbour of a chip that is nearer to the board in the network, None at the board."""
    io_group, io_channel, chip_id = parse_key(key)
    try:
        network = controller.network[io_group][io_channel]["miso_us"]
        parents = [tail for tail, _ in network.in_edges(chip_id) if isinstance(tail, int)]
    except (KeyError, TypeError, AttributeError):  # v1 chips have no network
        return None
    return f"{io_group}-{io_channel}-{parents[0]}" if parents else None


def _depth(controller: Any, key: str) -> int:
    """Return the number of links from the board to a chip."""
    depth, visited = 1, {key}
    while (parent := _parent(controller, key)) is not None and parent not in visited:
        visited.add(parent)
        key, depth = parent, depth + 1
    return depth


registration = {"link_quality": Routine("link_quality", _link_quality)}
