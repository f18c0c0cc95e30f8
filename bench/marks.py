"""Documents with places that a program fills in: what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """Where a figure was measured."""
    release = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores, {platform.machine()}, Linux {release}, Python {platform.python_version()}"


def update(document: Path, name: str, text: str) -> None:
    """Put `text` between the marks; SystemExit, in one line, when the document does not have them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{document}: has no marks {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
