"""larpix-daq: data acquisition for LArPix, the pixel-readout chip of liquid-argon detectors."""

from larpixdaq.version import VERSION as __version__

__all__ = ["__version__"]
