"""Completion of an Operator's calls: which argument of which method is being typed, and what it may be.

`parse()` reads the text before the cursor. `Names` asks the system for its names: components, chips, registers,
routines and their parameters. Answers are kept for some seconds, so that a key that is held down asks nobody.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from larpixdaq.errors import LarpixDaqError

#: Seconds for which an answer is kept, and maximum seconds to wait for one.
_KEPT: Final = 5.0
_LIMIT: Final = 2.0
#: Maximum characters before the cursor that are read.
_MOST: Final = 20_000
_CALLED: Final = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)\s*$")
_KEYWORD: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)\s*")
_WORD: Final = re.compile(r"\w*$")
_CLOSING: Final = {")": "(", "]": "[", "}": "{"}
#: Parameters in which a chip is a number, not a key.
_CHIP_NUMBERS: Final = ("adc_histogram", "pixel")
#: Methods whose parameter `name` is a snapshot.
_SNAPSHOT_NAMES: Final = ("remove_snapshot", "write_snapshot")


@dataclass
class _Frame:
    """An open bracket: the object and method that it calls, and the arguments before the cursor."""

    bracket: str
    owner: str = ""
    method: str = ""
    argument: int = 0
    start: int = 0  # of the present argument in the text
    texts: list[str] = field(default_factory=list)  # of the arguments before


@dataclass(frozen=True)
class Argument:
    """The argument before the cursor. `owner.method(` is the call.

    `position`: its place, from 0; `keyword`: its name if it is given; `texts`: source of the arguments before it.
    `depth`: number of open [ and { in it. `quote`: quotation mark of an open string, "" outside of one. `prefix`: what
    is typed of the string, or of a word.
    """

    owner: str
    method: str
    position: int
    keyword: str
    texts: tuple[str, ...]
    depth: int
    quote: str
    prefix: str

    def given(self, position: int, keyword: str) -> str:
        """Return the text of a string that was given before, by position or name; "" if it is no plain string."""
        for index, text in enumerate(self.texts):
            name = _KEYWORD.match(text)
            value = text[name.end() :] if name else text
            if (name[1] if name else "") == keyword or (not name and index == position):
                match = re.fullmatch(r"\s*(['\"])([^'\"\\]*)\1\s*", value)
                return match[2] if match else ""
        return ""


def parse(text: str) -> Argument | None:
    """Read the text before the cursor; None outside of a call of an object's method."""
    text = text[-_MOST:]
    frames: list[_Frame] = []
    quote, quoted_from, i = "", 0, 0
    while i < len(text):
        letter = text[i]
        if quote:
            if letter == "\\":
                i += 1
            elif text.startswith(quote, i):
                i += len(quote) - 1
                quote = ""
        elif letter in "'\"":
            quote = letter * 3 if text.startswith(letter * 3, i) else letter
            i += len(quote) - 1
            quoted_from = i + 1
        elif letter == "#":
            end = text.find("\n", i)
            i = len(text) if end < 0 else end
        elif letter in "([{":
            called = _CALLED.search(text[max(0, i - 200) : i]) if letter == "(" else None
            frames.append(_Frame(letter, called[1] if called else "", called[2] if called else "", start=i + 1))
        elif letter in ")]}":
            if not frames or frames[-1].bracket != _CLOSING[letter]:
                return None
            frames.pop()
        elif letter == "," and frames:
            frame = frames[-1]
            frame.texts.append(text[frame.start : i])
            frame.argument, frame.start = frame.argument + 1, i + 1
        i += 1
    depth = 0
    while frames and frames[-1].bracket != "(":
        frames.pop()
        depth += 1
    if not frames or not frames[-1].method:
        return None
    frame = frames[-1]
    keyword = _KEYWORD.match(text, frame.start)
    prefix = text[quoted_from:] if quote else (_WORD.search(text) or [""])[0]
    return Argument(
        frame.owner,
        frame.method,
        frame.argument,
        keyword[1] if keyword else "",
        tuple(frame.texts),
        depth,
        quote,
        prefix,
    )


class Names:
    """Names in the system of an Operator, asked for when needed. Nothing is raised: what is not known is empty."""

    def __init__(self, operator: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._operator = operator
        self._clock = clock
        self._kept: dict[Any, tuple[float, Any]] = {}

    def _ask(self, key: Any, ask: Callable[[], Any], empty: Any) -> Any:
        taken, value = self._kept.get(key, (-_KEPT, empty))
        if self._clock() - taken < _KEPT:
            return value
        try:
            value = ask().result(_LIMIT)
        except LarpixDaqError:
            value = empty
        self._kept[key] = self._clock(), value
        return value

    def components(self) -> list[str]:
        return [part["name"] for part in self._ask("components", self._operator.components, [])]

    def actions(self, component: str) -> list[str]:
        found = self._ask("actions", self._operator.actions, {})
        return list(found.get(component, []))

    def routines(self) -> dict[str, list[str]]:
        """Return the names of the parameters of each routine."""
        listed = self._ask("routines", self._operator.list_routines, [])
        return {
            routine["name"]: [param["name"] for param in routine["params"]]
            for routine in listed
            if not routine.get("error")
        }

    def chips(self) -> list[str]:
        """Return the keys of the chips of the loaded board, or else of those that the monitor has seen."""
        known = self._ask("chips", lambda: self._operator.retrieve_configuration(registers=0), {})
        if known:
            return list(known)
        rates = self._ask("rates", lambda: self._operator.packet_rate(channels=False), {})
        rows = rates.get("chips", []) if isinstance(rates, dict) else []
        return [f"{row['io_group']}-{row['io_channel']}-{row['chip_id']}" for row in rows]

    def registers(self) -> list[str]:
        chips = self._ask("chips", lambda: self._operator.retrieve_configuration(registers=0), {})
        chip = next(iter(chips), None)
        if chip is None:
            return []
        found = self._ask("registers", lambda: self._operator.retrieve_configuration(chip=chip), {})
        return [name for name in found.get(chip, {}).get("wanted", {}) if isinstance(name, str)]

    def snapshots(self) -> list[str]:
        return [snapshot["name"] for snapshot in self._ask("snapshots", self._operator.snapshots, [])]

    def complete(self, argument: Argument) -> list[str]:
        """Return what the argument may be: texts of strings, and inside of run_routine(…) parameters with `=`."""
        function = getattr(type(self._operator), argument.method, None)
        if not callable(function):
            return []
        found = self._complete(argument, _parameter(function, argument))
        return sorted({name for name in found if name.startswith(argument.prefix)}, key=_natural)

    def _complete(self, argument: Argument, parameter: str) -> list[str]:
        method, depth = argument.method, argument.depth
        if method == "run_routine" and parameter != "name" and not argument.quote and not depth:
            routine = argument.given(0, "name")
            return [] if argument.keyword else [f"{name}=" for name in self.routines().get(routine, [])]
        if parameter == "component":
            return self.components()
        if parameter == "action":
            return self.actions(argument.given(0, "component"))
        if method == "run_routine":
            return list(self.routines()) if parameter == "name" else self.chips() if argument.quote else []
        if parameter == "chip" and method not in _CHIP_NUMBERS:
            return self.chips()
        if parameter == "registers":
            return self.registers()
        if parameter in ("snapshot", "other") or (parameter == "name" and method in _SNAPSHOT_NAMES):
            return self.snapshots()
        if parameter == "updates":
            return ["all", *self.chips()] if depth == 1 else self.registers()
        return []


def _parameter(function: Any, argument: Argument) -> str:
    """Return the name of the parameter to which an argument belongs."""
    if argument.keyword:
        return argument.keyword
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds][1:]
    return names[argument.position] if argument.position < len(names) else ""


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key by which 1-2-9 comes before 1-2-11."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
