"""One line about new alarms at the next prompt of IPython. Scripts and plain Python print nothing."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any, Final

from larpixdaq.control.client import Connection
from larpixdaq.errors import printable

_EVENTS: Final = ("pre_run_cell", "post_run_cell")


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
