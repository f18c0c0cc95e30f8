"""The producer's child process, in which the chips are configured and routines run; larpix-control lives only here."""

from larpixdaq.chips.process import Child
from larpixdaq.chips.terms import ACTIONS, LOOKING

__all__ = ["ACTIONS", "LOOKING", "Child"]
