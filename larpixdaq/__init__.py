"""larpix-daq: data acquisition for LArPix, the pixel-readout chip of liquid-argon detectors."""

from typing import TYPE_CHECKING, Any

from larpixdaq.version import VERSION as __version__

if TYPE_CHECKING:
    from larpixdaq.hdf5.run_reader import open_run

__all__ = ["__version__", "open_run"]


def __getattr__(name: str) -> Any:
    """Import open_run() at its first use, because it needs numpy and h5py, which most programs start without."""
    if name == "open_run":
        from larpixdaq.hdf5.run_reader import open_run

        return open_run
    raise AttributeError(f"module 'larpixdaq' has no attribute {name!r}")
