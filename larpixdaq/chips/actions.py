"""What an Operator can ask of chips and boards, as the child does it: arguments checked, results of plain values.

Every method is an action of the same name; what it returns is the request's result. RequestError, in one line, names
the chip, register or board that it is about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from larpixdaq.chips import bringup, talk
from larpixdaq.chips.boardcare import BoardCare, whole
from larpixdaq.chips.detector import Detector
from larpixdaq.chips.exchange import Exchange, Found
from larpixdaq.chips.layoutcare import LayoutCare
from larpixdaq.chips.link import BoardError, Link
from larpixdaq.chips.terms import ACTIONS
from larpixdaq.errors import RequestError, misuse

#: Differing registers that a result lists; all are counted.
_LISTED: Final = 10_000
#: Times that what differs is written again.
_TRIES: Final = 3

#: send_info of a routine: text, done, total.
Info = Callable[..., None]


class Actions(BoardCare, LayoutCare):
    """One for the life of the child."""

    def __init__(self, link: Link, detector: Detector) -> None:
        BoardCare.__init__(self, link)
        LayoutCare.__init__(self, link.setup.pixel_layout)
        self.detector = detector
        self._info: Info = lambda text="", done=0, total=0: None

    def do(self, action: str, params: dict[str, Any], info: Info) -> Any:
        if action not in ACTIONS:
            raise RequestError(f"no action {action!r} of chips or boards; there are {', '.join(ACTIONS)}")
        method = getattr(self, action)
        signature = inspect.signature(method)
        try:
            bound = signature.bind(**params)
        except TypeError as error:
            raise misuse(action, error, signature) from None
        self._info = info
        return method(*bound.args, **bound.kwargs)

    # Chips.

    def write_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        return self._write(*self._given(chip, registers))

    def send_configuration(self, updates: Any) -> dict[str, Any]:
        if not isinstance(updates, dict) or not updates:
            raise RequestError('send_configuration: expected {chip: {register: value}}, "all" for every chip')
        wanted = self.detector.wanted.copy()
        which = np.zeros(wanted.shape, bool)
        for chip, values in updates.items():
            if not isinstance(values, dict) or not values:
                raise RequestError(
                    f"send_configuration: chip {chip}: expected {{register: value}}, found {values!r:.100}"
                )
            places = self.detector.find(None if chip == "all" else chip)
            grown = len(self.detector.parts) - len(wanted)
            if grown:  # a chip that is named for the first time
                wanted = np.concatenate([wanted, self.detector.wanted[-grown:]])
                which = np.concatenate([which, np.zeros((grown, which.shape[1]), bool)])
            changed = wanted[places]
            addresses = self.detector.registers.change(changed, values, f"chip {chip}: ")
            wanted[places] = changed
            which[np.ix_(places, addresses)] = True
        self.detector.wanted = wanted
        self.detector.given |= which
        places = np.flatnonzero(which.any(axis=1))
        return self._write(places, which[places])

    def read_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places = self.detector.find(chip)
        addresses = self.detector.registers.select(registers)
        which = self._marked(len(places), addresses)
        found = self._read(places, which)
        silent = self._silent(places, found, which)
        if len(silent) == len(places):
            raise BoardError("; ".join(found.errors) or f"{self._chips(silent)}: no answer")
        answered = found.answers > 0
        values = {
            self.detector.key(place): self._readable(found.values[i], answered[i], addresses)
            for i, place in enumerate(places.tolist())
            if answered[i].any()
        }
        return {"chips": values, **self._trouble(places, found, which)}

    def validate_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places, which = self._given(chip, registers)
        found = self._read(places, which)
        return self._verdict(places, which, found)

    def enforce_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places, which = self._given(chip, registers)
        found = self._read(places, which)
        written = 0
        for _ in range(_TRIES):
            wrong = self._wrong(places, found, which)
            if not wrong.any():
                break
            self._info(f"{int(wrong.sum())} registers are written again", 0, 0)
            written += int(wrong.sum())
            self._write(places, wrong)
            again = self._read(places, wrong)
            for name in ("values", "answers", "conflicts"):
                getattr(found, name)[wrong] = getattr(again, name)[wrong]
            found.asked_again += again.asked_again
            found.errors += again.errors
        return self._verdict(places, which, found) | {"written": written}

    def retrieve_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places = self.detector.find(chip)
        addresses = self.detector.registers.select(registers)
        detector = self.detector
        return {
            detector.key(place): {
                "wanted": self._readable(detector.wanted[place], detector.given[place], addresses),
                "confirmed": self._readable(detector.confirmed[place], detector.known[place], addresses),
            }
            for place in places.tolist()
        }

    def load_board(self, file: Any) -> dict[str, Any]:
        if not isinstance(file, str) or not file:
            raise RequestError(f"load_board: expected the name of a board file, found {file!r:.100}")
        if self.detector.registers.version is None:
            raise RequestError(f"load_board: larpix-control knows no {self.detector.registers.chips}")
        self.detector.load_board(file)
        return self._board()

    def configure_network(self, tries: Any = 3) -> dict[str, Any]:
        whole("configure_network: tries", tries, 1, 100)
        detector = self.detector
        if not detector.board_file:
            raise RequestError("configure_network: load_board(file) first, which says how the chips are wired")
        names = [name for name in bringup.NETWORK if name in detector.registers.addresses]
        if detector.registers.version == 1:  # nothing to bring up: the chips are there as soon as they have power
            return self.enforce_configuration()
        controller = detector.controller(self._link)
        wrong: set[str] | None = None
        for attempt in range(tries):
            words = f"try {attempt + 1}: " if attempt else ""

            def told(done: int, total: int, words: str = words) -> None:
                self._info(f"{words}{done} of {total} chips are told their place", done, total)

            bringup.bring_up(controller, wrong, told)
            detector.take_over(controller)
            result = self.validate_configuration(None, names)
            wrong = {*result["silent"], *(one["chip"] for one in result["differences"])}
            if not wrong:
                break
        return result | {"tries": attempt + 1}

    def get_boards(self) -> dict[str, Any]:
        boards = [
            {
                "io_group": one.io_group,
                "kind": one.kind or "takes no commands",
                "name": one.name,
                "revision": one.revision or None,
            }
            for one in self._link.setup.boards
        ]
        return {"boards": boards, **self._board()}

    def _board(self) -> dict[str, Any]:
        detector = self.detector
        groups = np.unique(detector.parts[:, :2], axis=0, return_counts=True)
        channels = [
            {"io_group": a, "io_channel": b, "chips": n}
            for (a, b), n in zip(groups[0].tolist(), groups[1].tolist(), strict=True)
        ]
        name, file = detector.board_name, detector.board_file
        return {
            "board": name,
            "file": file,
            "asic": detector.registers.asic,
            "chips": len(detector.parts),
            "networks": channels,
        }

    def state(self) -> talk.Remember:
        """What another child should know, should this one end."""
        return replace(self.detector.state(), pixel_layout=self.layout_name)

    # What they share.

    def _marked(self, chips: int, addresses: NDArray[np.intp]) -> NDArray[np.bool_]:
        which = np.zeros((chips, self.detector.registers.count), bool)
        which[:, addresses] = True
        return which

    def _given(self, chip: Any, registers: Any) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Chips, and which of their registers, of those asked for: of all, those that ought to hold something known;
        RequestError for others that are named, and when there are none."""
        detector = self.detector
        places = detector.find(chip)
        asked = self._marked(len(places), detector.registers.select(registers))
        which = asked & detector.given[places]
        missing = np.argwhere(asked & ~which)
        if len(missing) and (registers is not None or not which.any()):
            place, address = missing[0].tolist()
            what = "any register" if registers is None else detector.registers.name(address)
            unknown = f"what {detector.registers.chips} hold at power-up is not known"
            raise RequestError(f"chip {detector.key(places[place])}: nobody has set {what}, and {unknown}")
        some = which.any(axis=1)
        return places[some], which[some]

    def _exchange(self, places: NDArray[np.intp]) -> Exchange:
        parts = self.detector.parts[places]
        self.groups(np.unique(parts[:, 0]).tolist())
        return Exchange(self._link, self.detector.registers, parts)

    def _write(self, places: NDArray[np.intp], which: NDArray[np.bool_]) -> dict[str, Any]:
        exchange = self._exchange(places)
        n = len(places)
        errors = exchange.write(
            self.detector.wanted[places],
            which,
            lambda done, total: self._info(f"written: {done} of {total} chips", done, total),
        )
        if errors:
            raise BoardError("; ".join(errors))
        return {"chips": n, "registers": int(which.sum())}

    def _read(self, places: NDArray[np.intp], which: NDArray[np.bool_]) -> Found:
        exchange = self._exchange(places)
        found = exchange.read(which, lambda done, total: self._info(f"read: {done} of {total} chips", done, total))
        self.detector.confirm(places, found.values, (found.answers > 0) & ~found.conflicts)
        return found

    def _deaf(self, found: Found, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Chips that answered nothing of what was asked."""
        deaf: NDArray[np.bool_] = ((found.answers == 0) | ~which).all(axis=1)
        return deaf

    def _wrong(self, places: NDArray[np.intp], found: Found, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Registers that are not known to hold what they ought to, of chips that answered anything."""
        other = (found.answers == 0) | (found.values != self.detector.wanted[places])
        wrong: NDArray[np.bool_] = which & other & ~self._deaf(found, which)[:, None]
        return wrong

    def _silent(self, places: NDArray[np.intp], found: Found, which: NDArray[np.bool_]) -> list[str]:
        return [self.detector.key(place) for place in places[self._deaf(found, which)].tolist()]

    def _chips(self, keys: list[str]) -> str:
        shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        return f"chip {shown}" if len(keys) == 1 else f"{len(keys)} chips ({shown})"

    def _verdict(self, places: NDArray[np.intp], which: NDArray[np.bool_], found: Found) -> dict[str, Any]:
        at = np.argwhere(self._wrong(places, found, which))
        registers = self.detector.registers
        differences = [
            {
                "chip": self.detector.key(places[chip]),
                "register": registers.name(address),
                "address": address,
                "expected": int(self.detector.wanted[places[chip], address]),
                "found": int(found.values[chip, address]) if found.answers[chip, address] else None,
            }
            for chip, address in at[:_LISTED].tolist()
        ]
        return {
            "ok": not len(at) and not self._deaf(found, which).any() and not found.conflicts.any(),
            "chips": len(places),
            "registers": int(which.sum()),
            "different": len(at),
            "differences": differences,
            **self._trouble(places, found, which),
        }

    def _trouble(self, places: NDArray[np.intp], found: Found, which: NDArray[np.bool_]) -> dict[str, Any]:
        """What did not go as it should: chips without any answer, registers that answered more than once, and so on."""
        registers = self.detector.registers
        missing = which & (found.answers == 0) & ~self._deaf(found, which)[:, None]

        def named(marked: NDArray[np.bool_]) -> list[str]:
            at = np.argwhere(marked)[:100].tolist()
            return [f"{self.detector.key(places[chip])} {registers.name(address)}" for chip, address in at]

        return {
            "silent": self._silent(places, found, which),
            "unanswered": named(missing),
            "answered_twice": named(found.answers > 1),
            "contradicting": named(found.conflicts),
            "asked_again": found.asked_again,
            "bad_parity": found.bad_parity,
            "strange_answers": found.strange,
            "board_errors": found.errors,
        }

    def _readable(
        self, values: NDArray[np.uint8], have: NDArray[np.bool_], addresses: NDArray[np.intp]
    ) -> dict[str, Any]:
        """Values by name, of registers all of whose addresses were asked for and are there; others by address."""
        registers = self.detector.registers
        wanted = set(addresses[have[addresses]].tolist())
        names = [name for name, at in registers.addresses.items() if wanted.issuperset(at)]
        covered = {address for name in names for address in registers.addresses[name]}
        shown: dict[str, Any] = {}
        if names:
            shown = {name: one[0] for name, one in registers.named(values[None, :], names).items()}
        rest = {registers.name(address): int(values[address]) for address in sorted(wanted - covered)}
        return shown | rest
