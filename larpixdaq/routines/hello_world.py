"""The smallest routine: a greeting, which shows that Operator, producer and child process reach each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine


def _hello_world(
    controller: Any, send_data: Callable[..., None], send_info: Callable[..., None], name: str = "world"
) -> tuple[Any, str]:
    """Greets NAME, with three progress reports."""
    send_info(f"looking for {name}", 0, 2)
    greeting = f"Hello, {name}!"
    send_info(f"{name} found", 1, 2)
    send_info(greeting, 2, 2)
    return controller, greeting


registration = {"hello_world": Routine("hello_world", _hello_world)}
