"""Building blocks of routines: hits and rates of channels, registers of many chips, search for trims, report."""

from larpixdaq.routines.kit.chips import Chips
from larpixdaq.routines.kit.measurement import CROSS, EXTERNAL, NATURAL, PERIODIC, Hits, Rates, collect, rates

__all__ = ["CROSS", "EXTERNAL", "NATURAL", "PERIODIC", "Chips", "Hits", "Rates", "collect", "rates"]
