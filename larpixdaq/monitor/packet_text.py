"""Rows as text: one line a row, with aligned columns, for every layout and packet type.

``ticks``: the chip's clock, in sync and trigger rows the board's clock. ``receipt``: the board's clock at the arrival
of the packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from larpixdaq.runtime.units import utc_iso
from larpixdaq.schema import PacketType

HEADER: Final = "group channel chip way  what                  ticks        receipt  content"
_WHAT: Final = {kind: kind.name.lower().replace("_", " ") for kind in PacketType}
_TRIGGERS: Final = ("normal", "external", "cross", "periodic")
_SYNCS: Final = {"S": "counter reset or rolled over", "H": "heartbeat", "C": "clock source is now"}
#: Names in later layouts of the columns of layout 1.0.
_NAMES_1_0: Final = {
    "type": "packet_type",
    "chipid": "chip_id",
    "channel": "channel_id",
    "adc_counts": "dataword",
    "register": "register_address",
    "value": "register_data",
}


def text(rows: NDArray[Any]) -> str:
    """Return a header line, and one line for each row, shape (N,), of any layout."""
    return "\n".join((HEADER, *lines(rows)))


def lines(rows: NDArray[Any]) -> list[str]:
    """Return one line for each row, shape (N,), of any layout."""
    names = rows.dtype.names or ()
    known = [_NAMES_1_0.get(name, name) for name in names] if "chip_key" in names else names
    # v3 chips send data as type 1; they have no type 0 and no test packets
    v3 = "cds_flag" in names
    return [_line(dict(zip(known, row, strict=True)), v3) for row in rows.tolist()]


def _line(row: Mapping[str, Any], v3: bool) -> str:
    kind = row["packet_type"]
    what = _WHAT.get(kind, f"type {kind}")
    if v3 and kind < 2:
        what = "data" if kind == 1 else "type 0"
    if "chip_key" in row:
        group, channel = _address(row["chip_key"])
    else:
        group, channel = str(row["io_group"]), str(row["io_channel"])
    chip, way, ticks, receipt = str(row["chip_id"]), "in" if row["direction"] else "out", "", ""
    if kind > PacketType.CONFIG_READ:
        channel = chip = way = ""
    elif row.get("receipt_timestamp"):
        receipt = str(row["receipt_timestamp"])
    if what == "data" or kind in (PacketType.SYNC, PacketType.TRIGGER):
        # in other packets these bits have another meaning
        ticks = str(row["timestamp"])
    content = _content(row, what)
    return f"{group:>5} {channel:>7} {chip:>4} {way:<3}  {what:<12} {ticks:>14} {receipt:>14}  {content}".rstrip()


def _address(chip_key: bytes) -> tuple[str, str]:
    """Return io_group and io_channel of a chip key. For other bytes return them, made printable, and an empty text."""
    parts = chip_key.decode("ascii", "backslashreplace").split("-")
    if len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit():
        return parts[0], parts[1]
    return "".join(c if c.isprintable() else "?" for c in "-".join(parts)), ""


def _content(row: Mapping[str, Any], what: str) -> str:
    if what == "data":
        return _data(row)
    if what == "timestamp":
        return utc_iso(row["timestamp"])
    if what == "message":
        return f"number {row['counter']}"
    if what in ("sync", "trigger"):
        return _board_word(row, what)
    parts = []
    if what in ("config write", "config read"):
        value = row["register_data"]
        parts.append(f"register {row['register_address']:>3} = {value:>3} ({value:#04x})")
    elif what == "test" and "chip_key" in row:
        parts.append(f"counter {row['counter']}")
    if row["packet_type"] <= PacketType.CONFIG_READ and not row["valid_parity"]:
        parts.append("BAD PARITY")
    return "  ".join(parts)


def _board_word(row: Mapping[str, Any], what: str) -> str:
    if "chip_key" in row:
        detail, source = row["register_address"], row["register_data"]
    else:
        detail, source = row["trigger_type"], row["dataword"]
    if what == "trigger":
        return f"bits {detail:#010b}" + (f"  source {source}" if source else "")
    letter = chr(detail)
    content = f"{letter if letter.isprintable() else f'{detail:#04x}'} {_SYNCS.get(letter, 'unknown')}"
    if letter == "C":
        content += f" {source}"
    return content + (f"  status {row['counter']:#x}" if row["counter"] else "")


def _data(row: Mapping[str, Any]) -> str:
    parts = [f"channel {row['channel_id']:>3}  adc {row['dataword']:>4}"]
    if row.get("trigger_type"):
        parts.append(f"{_TRIGGERS[row['trigger_type'] & 3]} trigger")
    for column, name in (("first_packet", "first"), ("cds_flag", "CDS"), ("reset_sample_flag", "reset sample")):
        if row.get(column):
            parts.append(name)
    if "chip_key" in row:
        fifos = [("fifo", row["fifo_half"] + 2 * row["fifo_full"])]
    else:
        fifos = [("local fifo", row["local_fifo"]), ("shared fifo", row["shared_fifo"])]
    for name, bits in fifos:
        if bits:
            parts.append(f"{name} {'full' if bits & 2 else 'half full'}")
    if row.get("fifo_diagnostics_enabled"):
        parts.append(f"local events {row['local_fifo_events']}  shared events {row['shared_fifo_events']}")
    if not row["valid_parity"]:
        parts.append("BAD PARITY")
    return "  ".join(parts)
