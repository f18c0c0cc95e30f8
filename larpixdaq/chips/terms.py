"""What a producer can be asked to do with its chips and boards: names only, for processes that do none of it."""

from __future__ import annotations

from typing import Final

#: What only tells what is known, or asks a board how it is. (states.LOOKING has them too: they need no control.)
LOOKING: Final = ("board_status", "get_boards", "ping", "retrieve_configuration", "retrieve_pixel_layout")
#: What changes something, or sends words to chips.
CHANGING: Final = (
    "configure_network",
    "enforce_configuration",
    "load_board",
    "load_pixel_layout",
    "power",
    "read_configuration",
    "reset",
    "send_configuration",
    "set_uart_clock",
    "validate_configuration",
    "write_configuration",
)
ACTIONS: Final = LOOKING + CHANGING
