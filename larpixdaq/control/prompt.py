"""What IPython shows of the system at its prompt: new alarms, the state of the run, and completions.

`show_alarms()` is for every Operator in IPython. `RunPrompt` is for `larpixdaq shell`. Scripts and plain Python print
nothing, and import no IPython.
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from typing import Any, Final

from larpixdaq.constants import NO_CORE
from larpixdaq.control.client import Connection, Request
from larpixdaq.control.completion import Names, parse
from larpixdaq.errors import LarpixDaqError, printable

_EVENTS: Final = ("pre_run_cell", "post_run_cell")
#: Seconds between two questions for the open alarms, and after which an old answer is not shown any more.
_ASK: Final = 2.0
_OLD: Final = 10.0
#: Maximum seconds that a prompt waits for the open alarms, where it cannot be drawn again.
_WAIT: Final = 0.3


def show_alarms(connection: Connection) -> None:
    """Print a line before and after each cell of IPython when alarms were raised since the last one, until the
    connection is closed. Does nothing where IPython does not run, and does not import it."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if callable(get_ipython) else None
    events: Any = getattr(shell, "events", None)
    if events is None:
        return
    known = weakref.ref(connection)  # so that this does not keep an Operator that nobody uses any more
    seen = connection.last_update.alarms[0]

    def show(*_: object) -> None:
        nonlocal seen
        open_connection = known()
        if open_connection is None or open_connection.closed:
            for event in _EVENTS:
                with contextlib.suppress(ValueError):  # not registered any more
                    events.unregister(event, show)
            return
        raised, line = open_connection.last_update.alarms
        new = raised - seen if raised >= seen else raised  # fewer: the core was restarted
        seen = raised
        if new > 0:
            more = f" ({new - 1} more were raised)" if new > 1 else ""
            print(f"{printable(line)}{more}; see alarms(), acknowledge_alarm()")

    for event in _EVENTS:
        events.register(event, show)


class RunPrompt:
    """The state of the run and the open alarms below the prompt of IPython, and completion of an Operator's calls.

    Where nothing can be below the prompt (on simple terminals) it is in front of it.
    """

    def __init__(self, shell: Any, operator: Any, refresh: float) -> None:
        """`refresh`: seconds after which the line is drawn again."""
        self._shell = shell
        self._operator = operator
        self._connection: Connection = operator._connection
        self._refresh = refresh
        self._names = Names(operator)
        self._request: Request | None = None
        self._asked = self._answered = -_OLD
        self._open: list[dict[str, Any]] = []

    def install(self) -> None:
        from prompt_toolkit.utils import is_dumb_terminal

        self._shell.Completer.custom_matchers.append(self._matcher())
        session = getattr(self._shell, "pt_app", None)
        if session is not None and not is_dumb_terminal():
            session.bottom_toolbar = self.line
            session.refresh_interval = self._refresh
        else:
            self._shell.prompts = self._prompts()

    def line(self, wait: float = 0.0) -> str:
        """Return the state, the run and the open alarms, as known now, or after at most `wait` seconds."""
        silence = self._connection.link.silence()
        if self._connection.closed or silence > NO_CORE:
            return f"no core is heard at {printable(self._connection.link.core)}"
        update = self._connection.last_update
        run = f" {update.run}" if update.run is not None else ""
        self._ask_for_alarms(wait)
        return f"{update.state}{run}{self._alarms()}"

    def _ask_for_alarms(self, wait: float) -> None:
        """Ask for the open alarms, and take the answer if there is one within `wait` seconds."""
        now = time.monotonic()
        if self._request is None and now - self._asked >= _ASK:
            self._request, self._asked = self._operator.alarms(), now
            # Its errors are shown by the line itself, not printed.
            self._request.outcome.awaited = True
            self._request.outcome.mark_seen()
        if self._request is not None:
            with contextlib.suppress(LarpixDaqError, LookupError, TypeError):
                self._open, self._answered = list(self._request.result(wait)["open"]), now
            if self._request.done:
                self._request = None

    def _alarms(self) -> str:
        """Return the number of open alarms as text."""
        if time.monotonic() - self._answered > _OLD:
            return "  alarms: not known"
        new = sum(not alarm.get("acknowledged") for alarm in self._open)
        if not self._open:
            return ""
        return f"  {len(self._open)} open alarm{'s' if len(self._open) > 1 else ''}, {new} not acknowledged: o.alarms()"

    def _prompts(self) -> Any:
        from IPython.terminal.prompts import Prompts

        prompt = self

        class StatePrompts(Prompts):
            def in_prompt_tokens(self) -> Any:
                tokens = super().in_prompt_tokens()  # type: ignore[no-untyped-call]
                return [(tokens[0][0], f"[{prompt.line(_WAIT)}] "), *tokens]

        return StatePrompts(self._shell)

    def _matcher(self) -> Any:
        from IPython.core.completer import SimpleCompletion, context_matcher

        @context_matcher()  # type: ignore[untyped-decorator]
        def operator_matcher(context: Any) -> dict[str, Any]:
            lines = context.full_text.split("\n")[: context.cursor_line + 1]
            text = "\n".join([*lines[:-1], lines[-1][: context.cursor_position]])
            none: dict[str, Any] = {"completions": [], "suppress": False}
            with contextlib.suppress(Exception):  # a completion must never break the prompt
                argument = parse(text)
                if argument is None or self._shell.user_ns.get(argument.owner) is not self._operator:
                    return none
                names = self._names.complete(argument)
                if not argument.quote:
                    names = [name if name.endswith("=") else repr(name) for name in names]
                completions = [SimpleCompletion(name, type="param") for name in names]
                return {"completions": completions, "suppress": bool(names), "matched_fragment": argument.prefix}
            return none

        return operator_matcher
