"""Carries out an action by its name, with the class that has the method of this name."""

from __future__ import annotations

import inspect
from typing import Any

from larpixdaq.errors import misuse
from larpixdaq.hardware.actions import BoardActions, ChipActions, LayoutActions
from larpixdaq.hardware.board_setup import RegisterActions
from larpixdaq.hardware.chip_state import ChipState
from larpixdaq.hardware.discovery_action import DiscoveryActions
from larpixdaq.hardware.power import Progress
from larpixdaq.hardware.power_up import PowerActions
from larpixdaq.hardware.snapshots import SnapshotActions


def act(chips: ChipState, action: str, params: dict[str, Any], progress: Progress) -> Any:
    """Carry out an action, one of constants.HARDWARE_ACTIONS, with these arguments by name. Returns its result."""
    groups = (
        ChipActions(chips, progress),
        SnapshotActions(chips, progress),
        BoardActions(chips.link, chips.invalidate, progress, chips.dacs),
        RegisterActions(chips.link, chips.invalidate, chips.dacs),
        PowerActions(chips.link, chips.invalidate, progress, chips.dacs),
        LayoutActions(chips.layout),
        DiscoveryActions(chips, progress),
    )
    method = next(getattr(actions, action) for actions in groups if hasattr(actions, action))
    signature = inspect.signature(method)
    try:
        bound = signature.bind(**params)
    except TypeError as error:
        raise misuse(action, error, signature) from None
    return method(*bound.args, **bound.kwargs)
