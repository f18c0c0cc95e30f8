"""How far a command is, on stderr: done, rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final

from larpixdaq.cli.system import plain_console
from larpixdaq.errors import printable
from larpixdaq.runtime.units import duration

#: Seconds between two lines, on a terminal and elsewhere.
_TERMINAL: Final = 0.5
_ELSEWHERE: Final = 10.0
#: Seconds from which on the rate says something about the time left.
_SURE: Final = 2.0


class ProgressLine:
    """A line on stderr. On a terminal it is written anew, elsewhere one follows the other."""

    def __init__(self) -> None:
        self._console = plain_console(stderr=True)
        self._is_terminal = sys.stderr.isatty()
        self._pause = _TERMINAL if self._is_terminal else _ELSEWHERE
        self._next = time.monotonic() + self._pause
        self._width = 0

    def show(self, line: Callable[[], str]) -> None:
        """Show what `line` returns, if the last line is old enough."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self._pause
        text = printable(line())
        if self._is_terminal:
            sys.stderr.write(f"\r{text:<{self._width}}")
            sys.stderr.flush()
            self._width = len(text)
        else:
            self._console.print(text)

    def clear(self) -> None:
        """Remove the line from the terminal, for a line on stdout."""
        if self._is_terminal and self._width:
            sys.stderr.write(f"\r{'':<{self._width}}\r")
            sys.stderr.flush()
            self._width = 0


def time_left(seconds: float, done: float, total: float) -> str:
    """Return the time that the rest will take at the rate so far, for the end of a line; "" as long as it is unsure."""
    return f", {duration(seconds * (total - done) / done)} left" if done and seconds > _SURE else ""
