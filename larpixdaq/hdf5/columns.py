"""Unit and meaning of every column of a file: the attribute `columns` of each dataset, and docs/files.md."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Unit and meaning of a column.
Entry = tuple[str, str]

_COMMON: Final[dict[str, Entry]] = {
    "direction": ("", "1: received from the board; 0: sent to the board"),
    "io_channel": ("", "UART of the board, from 1"),
    "parity": ("", "parity bit of the word"),
    "valid_parity": ("", "1: the parity of the whole word is odd, which is correct"),
}
#: Columns of /packets, of all layouts.
PACKETS: Final[dict[str, Entry]] = _COMMON | {
    "io_group": ("", "board, from 1; 0: INFO messages"),
    "chip_id": ("", "chip that sent or gets the word"),
    "packet_type": (
        "",
        "0 data, 1 test (v3: data), 2 configuration write, 3 configuration read, 4 timestamp, 5 message, 6 sync,"
        " 7 trigger",
    ),
    "downstream_marker": ("", "1: the word travels towards the DAQ"),
    "channel_id": ("", "channel of the chip"),
    "timestamp": (
        "ticks of the chip's clock",
        "types 0 to 3; types 6 and 7: ticks of the board's clock; types 4 and 5: unix seconds",
    ),
    "dataword": ("ADC counts", "type 6: source of the board's clock"),
    "trigger_type": (
        "",
        "0 natural, 1 external, 2 cross, 3 periodic; type 6: 83 clock reset, 72 heartbeat, 67 other clock source;"
        " type 7: trigger bits",
    ),
    "local_fifo": ("", "FIFO of the channel: 1 more than half full, 3 full"),
    "shared_fifo": ("", "FIFO of the chip: 1 more than half full, 3 full"),
    "register_address": ("", "types 2 and 3: register"),
    "register_data": ("", "types 2 and 3: value of the register"),
    "local_fifo_events": ("events", "in the FIFO of the channel, in the mode fifo diagnostics"),
    "shared_fifo_events": ("events", "in the FIFO of the chip, in the mode fifo diagnostics"),
    "counter": ("", "type 5: row of /messages; types 6 and 7: status word of PACMAN format 1.0; v1 test: its counter"),
    "fifo_diagnostics_enabled": ("", "1: the word is decoded in the mode fifo diagnostics"),
    "first_packet": (
        "",
        "1: first packet of a burst, or highest bit of the timestamp, depending on the chip's configuration",
    ),
    "receipt_timestamp": (
        "ticks of the board's clock",
        "time at which the board received the word; 10 MHz unless configured",
    ),
    "reset_sample_flag": ("", "1: reset sample (v3)"),
    "cds_flag": ("", "1: correlated double sampling (v3)"),
    # Layout 1.0
    "chip_key": ("", "io_group-io_channel-chip_id"),
    "type": ("", "as packet_type of later layouts"),
    "chipid": ("", "chip that sent or gets the word"),
    "channel": ("", "channel of the chip"),
    "adc_counts": ("ADC counts", "10 bits"),
    "fifo_half": ("", "1: FIFO more than half full"),
    "fifo_full": ("", "1: FIFO full"),
    "register": ("", "types 2 and 3: register; types 6 and 7: as trigger_type of later layouts"),
    "value": ("", "types 2 and 3: value of the register; type 6: source of the board's clock"),
}
_RANGE_NS: Final[dict[str, Entry]] = {
    "first_ns": ("unix ns", "begin, by the clock of the producer's host"),
    "last_ns": ("unix ns", "end, by the clock of the producer's host"),
}
_SOURCE: Final[dict[str, Entry]] = {
    "producer": ("", "row of /run/producers"),
    "epoch": ("", "random number of the producer process"),
}
_CHIP: Final[dict[str, Entry]] = {
    "io_group": ("", "board, from 1"),
    "io_channel": ("", "UART of the board, from 1"),
    "chip_id": ("", "chip"),
}
_COUNTS: Final[dict[str, Entry]] = _SOURCE | {
    "io_group": ("", "board, from 1; 0: INFO messages"),
    "how": ("", "kind of the producer's end record: closed, aborted, recovered; open: no end record"),
    "owed": ("rows", "pending: made by the producer and not in the run's files"),
    "messages": ("messages", "board messages (serial: frames)"),
    "bytes_in": ("bytes", "received from the board"),
    "header_bytes": ("bytes", "headers of messages"),
    "trailing_bytes": ("bytes", "after the words that a header counts"),
    "rejected_bytes": ("bytes", "messages that were rejected as a whole"),
    "resync_bytes": ("bytes", "outside of frames (serial)"),
    "pending_before": ("bytes", "unfinished frame at the begin (serial)"),
    "pending_after": ("bytes", "unfinished frame at the end (serial)"),
    "words_in": ("words", "received from the board"),
    "word_bytes": ("bytes", "words"),
    "word_rows": ("rows", "received words: types 0 to 3, 6 and 7"),
    "unknown_words": ("words", "unknown type"),
    "rejected_words": ("words", "known type, impossible content"),
    "packets": ("packets", "received packets: rows of types 0 to 3 with direction 1"),
    "bad_parity": ("packets", "wrong parity; they are stored too"),
    "time_rows": ("rows", "type 4: times of messages"),
    "rejected_messages": ("messages", "rejected as a whole"),
    "wrong_counts": ("messages", "the header counts more or fewer words than the message has"),
    "info_rows": ("rows", "type 5: INFO messages"),
    "sent_rows": ("rows", "words sent to chips"),
    "dropped": ("rows", "dropped: found no room in the producer's ring and spool"),
    "stored": ("rows", "rows in this file"),
}
#: Columns of the other datasets.
TABLES: Final[dict[str, dict[str, Entry]]] = {
    "messages": {
        "message": ("", "at most 64 bytes of the text; a longer text continues in the next rows"),
        "timestamp": ("unix s", "time at which the message entered the data"),
        "index": ("", "number of this row"),
    },
    "configs": _CHIP | {
        "timestamp": ("unix s", "time of this configuration"),
        "registers": ("", "value sent to each register, or read where none was sent"),
    },
    "run/info": {
        "run": ("", "run number"),
        "part": ("", "number of this file in the run, from 0"),
        "layout": ("", "1: 1.0; 2: 2.4; 3: 2.4 with a clock of 64 bits; 4: 3.0"),
        "condition": ("", "RUNNING, COMPLETE, 'COMPLETE, suspect', INCOMPLETE, INTERRUPTED, ABORTED, CONTINUED"),
        "started_ns": ("unix ns", "time of prepare_run, by the core's clock"),
        "opened_ns": ("unix ns", "time at which this file was opened, by the storage's clock"),
        "closed_ns": ("unix ns", "time at which this file was closed, by the storage's clock"),
        "rows": ("rows", "rows of /packets"),
        "blocks": ("blocks", "rows of /run/blocks"),
        "duplicate_blocks": ("blocks", "received again; each is stored once"),
        "missing_blocks": ("blocks", "never received"),
        "begun_ns": ("unix ns", "begin of RUN, by the core's clock; 0: not yet, or unknown"),
        "ended_ns": ("unix ns", "end of RUN, by the core's clock; 0: not before this file was closed, or unknown"),
        "live_ns": ("ns", "live time: RUN recorded in this file, without times in which rows were dropped"),
    },
    "run/sources": {
        "producer": _SOURCE["producer"],
        "io_group": ("", "board, from 1"),
        "kind": ("", "PACMAN, Bern board, serial, IO class, fake, replay, or recording in converted files"),
        "address": ("", "network address, device, class with its arguments, or files"),
        "host": ("", "host on which the producer runs"),
        "firmware": ("", "PACMAN: registers 0x0 to 0xC; empty: unknown"),
    },
    "run/texts": {
        "name": ("", "name of the text; the newest text of a name counts, except of e-log"),
        "piece": ("", "number of this piece of the text, from 0"),
        "text": ("", "at most 256 bytes of the text"),
        "written_ns": ("unix ns", "time at which it was written, by the storage's clock"),
    },
    "run/producers": {"name": ("", "name of the producer")},
    "run/blocks": _SOURCE | _RANGE_NS | {
        "sequence": ("", "number of the block, from 0"),
        "first_row": ("rows", "index of its first row in /packets"),
        "rows": ("rows", "rows of the block"),
        "crc32": ("", "CRC-32 of its rows as stored"),
        "first_packet": ("rows", "rows that the producer made before this block in this run"),
        "flags": ("", "0"),
    },
    "run/ends": _SOURCE | _RANGE_NS | {
        "next": ("", "sequence after its last block"),
        "how": _COUNTS["how"],
    },
    "run/configs": _SOURCE | _CHIP | {
        "sequence": ("", "sequence of the block with this configuration"),
        "time_ns": ("unix ns", "time of this configuration, by the clock of the producer's host"),
        "asic": ("", "chip generation, as in --asic"),
        "different": ("registers", "read value differs from sent value"),
        "sent": ("", "value last sent to each register"),
        "read": ("", "value last read from each register"),
        "known": ("", "bit 0: a value was sent; bit 1: a value was read"),
    },
    "run/positions": _SOURCE | {
        "first": ("", "next sequence when this file was opened"),
        "next": ("", "next sequence when this file was closed"),
    },
    "run/missing": _SOURCE | {
        "first": ("", "sequence of the first missing block"),
        "next": ("", "sequence of the next received block"),
        "rows": ("rows", "rows of the missing blocks; 0: unknown"),
    },
    "run/checksums": {
        "name": ("", "dataset"),
        "rows": ("rows", "rows of the dataset"),
        "crc32": ("", "CRC-32 of all its bytes"),
    },
    "ledger/counts": _COUNTS,
    "ledger/outside": _COUNTS,
    "ledger/gaps": _SOURCE | _RANGE_NS | {
        "sequence": ("", "sequence of the block, or end, before which the rows are missing"),
        "io_group": ("", "board, from 1; 0: INFO messages"),
        "rows": ("rows", "dropped: found no room in the producer's ring and spool"),
    },
    "ledger/verdicts": _SOURCE | _RANGE_NS | {
        "io_group": ("", "board, from 1"),
        "verdict": ("", "complete, suspect or lost"),
        "why": ("", "reason, one sentence"),
        "lost": ("packets", "minimum number of lost packets; 0: unknown"),
    },
    "ledger/unknown": _SOURCE | {
        "io_group": ("", "board, from 1"),
        "seconds": ("unix s", "time of the message with the word"),
        "reason": ("", "1 unknown word type, 2 io_channel above 255, 3 invalid packet type, 4 time stamp too wide"),
        "size": ("bytes", "size of the word"),
        "raw": ("", "the word"),
    },
    "ledger/raw": {
        "producer": ("", "name of the producer"),
        "epoch": _SOURCE["epoch"],
        "io_group": ("", "board, from 1"),
        "messages": ("messages", "in /msgs"),
        "words": ("words", "in these messages: the received words of the packet file, rows of types 0 to 3, 6 and 7"),
        "bytes": ("bytes", "of these messages"),
        "divided": ("messages", "continue the previous message of their io_group, with its time"),
        "made_headers": ("messages", "have the time of their block, because their header is in no row of this part"),
    },
}  # fmt: skip


def attribute(dataset: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make the attribute `columns` of a dataset: name, unit and meaning of each column, as texts of minimal length."""
    entries = PACKETS if dataset == "packets" else TABLES[dataset]
    lines = [(name, *entries[name]) for name in dtype.names or ()]
    sizes = [max(1, *map(len, texts)) for texts in zip(*lines, strict=True)]
    return np.array(
        lines, [(name, f"S{size}") for name, size in zip(("column", "unit", "meaning"), sizes, strict=True)]
    )
