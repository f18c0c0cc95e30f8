"""Where the recorded data are, if they are here: they belong to others and are not part of the repository."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LARPIXDAQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def shared_data(name: str) -> Path:
    """The path of a recorded file; skips the test, saying so, where the recordings are absent."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"recorded data are absent: {path}")
    return path
