"""The table [alarms] of a detector's configuration file."""

from __future__ import annotations

import msgspec


class AlarmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Conditions of alarms, and where they are sent."""
