"""Online monitor without its process: counters, rates, histograms, the last packets, and rows as text."""

from larpixdaq.monitor.monitor import Monitor

__all__ = ["Monitor"]
