"""Paths of recorded data, which belong to other groups and are not part of the repository."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LARPIXDAQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def shared_data(name: str) -> Path:
    """Return the path of a recorded file. Skips the test, with a message, if the file is absent."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"recorded data are absent: {path}")
    return path
