"""What the routines that ship are made of, and others may be: hits of channels, registers of many chips, the search for
trims, the report."""

from larpixdaq.routines.kit.chips import Chips
from larpixdaq.routines.kit.measurement import CROSS, EXTERNAL, NATURAL, PERIODIC, Hits, Rates, collect, rates

__all__ = ["CROSS", "EXTERNAL", "NATURAL", "PERIODIC", "Chips", "Hits", "Rates", "collect", "rates"]
