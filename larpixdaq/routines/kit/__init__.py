"""What the routines that ship are made of, and others may be: hits of channels, registers of many chips, the search for
trims, the report."""

from larpixdaq.routines.kit.hits import CROSS, EXTERNAL, NATURAL, PERIODIC, Hits, Rates, collect, rates
from larpixdaq.routines.kit.registers import Chips

__all__ = ["CROSS", "EXTERNAL", "NATURAL", "PERIODIC", "Chips", "Hits", "Rates", "collect", "rates"]
