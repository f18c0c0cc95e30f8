"""The one place that knows which library makes CRC-32s: ISA-L where it imports, else zlib, several times slower."""

from __future__ import annotations

from typing import Any

try:
    from isal import isal_zlib as _library
except ImportError:
    import zlib as _library  # type: ignore[no-redef]


def crc32(data: Any, start: int = 0) -> int:
    """CRC-32 (that of zlib) of a contiguous buffer, continued from `start`."""
    return int(_library.crc32(data, start))
