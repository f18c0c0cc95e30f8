"""Put measured results into documents, between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """Return a description of this machine."""
    release = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores, {platform.machine()}, Linux {release}, Python {platform.python_version()}"


def update(document: Path, name: str, text: str) -> None:
    """Put `text` between the marks of this name. SystemExit when the document does not have them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, opening, rest = document.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not (opening and closing):
        raise SystemExit(f"{document}: has no marks {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
