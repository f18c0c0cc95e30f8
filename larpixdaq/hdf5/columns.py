"""Unit and meaning of every column of a file, for the attribute `columns` of each dataset and for docs/files.md."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Unit and meaning of a column.
Entry = tuple[str, str]

_COMMON: Final[dict[str, Entry]] = {
    "direction": ("", "1: came from the board; 0: was sent to it"),
    "io_channel": ("", "UART of the board, from 1"),
    "parity": ("", "parity bit of the word"),
    "valid_parity": ("", "1: the parity of the whole word is odd, as it should be"),
}
#: Columns of /packets, of all layouts.
PACKETS: Final[dict[str, Entry]] = _COMMON | {
    "io_group": ("", "board, from 1; 0: INFO messages"),
    "chip_id": ("", "chip that sent the word, or for which it is"),
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
    "counter": ("", "type 5: line of /messages; types 6 and 7: status word of PACMAN format 1.0; v1 test: its counter"),
    "fifo_diagnostics_enabled": ("", "1: the word is read as one of the mode fifo diagnostics"),
    "first_packet": ("", "1: first of a burst, or highest bit of the time, by the chip's configuration"),
    "receipt_timestamp": ("ticks of the board's clock", "when the board received the word; 10 MHz unless configured"),
    "reset_sample_flag": ("", "1: reset sample (v3)"),
    "cds_flag": ("", "1: correlated double sampling (v3)"),
    # Layout 1.0
    "chip_key": ("", "io_group-io_channel-chip_id"),
    "type": ("", "as packet_type of later layouts"),
    "chipid": ("", "chip that sent the word, or for which it is"),
    "channel": ("", "channel of the chip"),
    "adc_counts": ("ADC counts", "10 bits"),
    "fifo_half": ("", "1: FIFO more than half full"),
    "fifo_full": ("", "1: FIFO full"),
    "register": ("", "types 2 and 3: register; types 6 and 7: as trigger_type of later layouts"),
    "value": ("", "types 2 and 3: value of the register; type 6: source of the board's clock"),
}
_RANGE_NS: Final[dict[str, Entry]] = {
    "first_ns": ("unix ns", "begin, by the clock of the producer's computer"),
    "last_ns": ("unix ns", "end, by the clock of the producer's computer"),
}
_SOURCE: Final[dict[str, Entry]] = {
    "producer": ("", "line of /run/producers"),
    "epoch": ("", "random number of the producer's process"),
}
_CHIP: Final[dict[str, Entry]] = {
    "io_group": ("", "board, from 1"),
    "io_channel": ("", "UART of the board, from 1"),
    "chip_id": ("", "chip"),
}
_COUNTS: Final[dict[str, Entry]] = _SOURCE | {
    "io_group": ("", "board, from 1; 0: INFO messages"),
    "how": ("", "how the end of the producer came: closed, aborted, recovered; open: not at all"),
    "owed": ("rows", "made, and not in the run's files"),
    "messages": ("messages", "of the board (frames, on a serial line)"),
    "bytes_in": ("bytes", "that came"),
    "header_bytes": ("bytes", "of headers"),
    "trailing_bytes": ("bytes", "behind the words that a header counts"),
    "rejected_bytes": ("bytes", "of messages that were thrown away whole"),
    "resync_bytes": ("bytes", "in no frame (serial)"),
    "pending_before": ("bytes", "of an unfinished frame at the begin (serial)"),
    "pending_after": ("bytes", "of an unfinished frame at the end (serial)"),
    "words_in": ("words", "that came"),
    "word_bytes": ("bytes", "of words"),
    "word_rows": ("rows", "of received words: types 0 to 3, 6 and 7"),
    "unknown_words": ("words", "of unknown type"),
    "rejected_words": ("words", "with impossible content"),
    "packets": ("packets", "received: rows of types 0 to 3 with direction 1"),
    "bad_parity": ("packets", "with wrong parity; stored all the same"),
    "time_rows": ("rows", "of type 4"),
    "rejected_messages": ("messages", "thrown away whole"),
    "wrong_counts": ("messages", "whose header counts other words than they hold"),
    "info_rows": ("rows", "of type 5"),
    "sent_rows": ("rows", "of words that were sent to the chips"),
    "dropped": ("rows", "that found no room at the producer"),
    "stored": ("rows", "in this file"),
}
#: Columns of the other datasets.
TABLES: Final[dict[str, dict[str, Entry]]] = {
    "messages": {
        "message": ("", "at most 64 bytes of the text; a longer one goes on in the next lines"),
        "timestamp": ("unix s", "when the message entered the data"),
        "index": ("", "number of this line"),
    },
    "configs": _CHIP | {
        "timestamp": ("unix s", "when this was known"),
        "registers": ("", "what each register was told, or said when it was not told"),
    },
    "run/info": {
        "run": ("", "run number"),
        "part": ("", "number of this file in the run, from 0"),
        "layout": ("", "1: 1.0; 2: 2.4; 3: 2.4 with a clock of 64 bits; 4: 3.0"),
        "condition": ("", "RUNNING, COMPLETE, 'COMPLETE, suspect', INCOMPLETE, INTERRUPTED, ABORTED, CONTINUED"),
        "started_ns": ("unix ns", "when the run was prepared, by the core's clock"),
        "opened_ns": ("unix ns", "when this file was opened, by the storage's clock"),
        "closed_ns": ("unix ns", "when this file was closed, by the storage's clock"),
        "rows": ("rows", "in /packets"),
        "blocks": ("blocks", "in /run/blocks"),
        "duplicate_blocks": ("blocks", "that came twice; stored once"),
        "missing_blocks": ("blocks", "that never came"),
        "begun_ns": ("unix ns", "when RUN began, by the core's clock; 0: it had not, or nobody knows"),
        "ended_ns": ("unix ns", "when RUN ended, by the core's clock; 0: not before the part was closed, or unknown"),
        "live_ns": ("ns", "for which RUN was recorded in this part, without times in which rows were dropped"),
    },
    "run/sources": {
        "producer": _SOURCE["producer"],
        "io_group": ("", "board, from 1"),
        "kind": ("", "PACMAN, Bern board, serial, IO class, fake, replay"),
        "address": ("", "network address, device, class with its arguments, or files"),
        "host": ("", "computer on which the producer runs"),
        "firmware": ("", "PACMAN: registers 0x0 to 0xC; empty: not known"),
    },
    "run/texts": {
        "name": ("", "what the text is about; the newest of a name counts"),
        "piece": ("", "number of this part of the text, from 0"),
        "text": ("", "at most 256 bytes of it"),
        "written_ns": ("unix ns", "when it was written, by the storage's clock"),
    },
    "run/producers": {"name": ("", "name of the producer")},
    "run/blocks": _SOURCE | _RANGE_NS | {
        "sequence": ("", "number of the block, from 0"),
        "first_row": ("rows", "where its rows begin in /packets"),
        "rows": ("rows", "of the block"),
        "crc32": ("", "CRC-32 of its rows as stored"),
        "first_packet": ("rows", "that the producer made before it in this run"),
        "flags": ("", "0"),
    },
    "run/ends": _SOURCE | _RANGE_NS | {
        "next": ("", "number behind its last block"),
        "how": _COUNTS["how"],
    },
    "run/configs": _SOURCE | _CHIP | {
        "sequence": ("", "block with the message that brought it"),
        "time_ns": ("unix ns", "when this was known, by the clock of the producer's computer"),
        "asic": ("", "chip generation, as --asic has it"),
        "different": ("registers", "that said something else than they were told"),
        "sent": ("", "what each register was told last"),
        "read": ("", "what each register said last"),
        "known": ("", "bit 0: it was told something; bit 1: it said something"),
    },
    "run/positions": _SOURCE | {
        "first": ("", "block with which this part begins"),
        "next": ("", "block that comes next, behind this part"),
    },
    "run/missing": _SOURCE | {
        "first": ("", "first block that never came"),
        "next": ("", "next block that came"),
        "rows": ("rows", "in between, where that is known"),
    },
    "run/checksums": {
        "name": ("", "dataset"),
        "rows": ("rows", "of the dataset"),
        "crc32": ("", "CRC-32 of all of its bytes"),
    },
    "ledger/counts": _COUNTS,
    "ledger/outside": _COUNTS,
    "ledger/gaps": _SOURCE | _RANGE_NS | {
        "sequence": ("", "block, or end, before which the rows should stand"),
        "io_group": ("", "board, from 1; 0: INFO messages"),
        "rows": ("rows", "that found no room at the producer"),
    },
    "ledger/verdicts": _SOURCE | _RANGE_NS | {
        "io_group": ("", "board, from 1"),
        "verdict": ("", "complete, suspect or lost"),
        "why": ("", "what was noticed"),
        "lost": ("packets", "at least; 0: not known"),
    },
    "ledger/unknown": _SOURCE | {
        "io_group": ("", "board, from 1"),
        "seconds": ("unix s", "of the message that held the word"),
        "reason": ("", "1 unknown word type, 2 io_channel above 255, 3 invalid packet type, 4 time stamp too wide"),
        "size": ("bytes", "of the word"),
        "raw": ("", "the word"),
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
