"""Run numbers, limits, layouts and the ledger's counters, for programs that start without numpy (schema.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Run numbers are 1 to LAST_RUN, and have RUN_DIGITS digits in the names of files.
RUN_DIGITS: Final = 7
LAST_RUN: Final = 10**RUN_DIGITS - 1
#: One more than the highest io_group: counters of a producer are an array of shape (IO_GROUPS, len(COUNTS)), dtype u8.
IO_GROUPS: Final = 256
#: Maximum number of rows of a block.
BLOCK_ROWS: Final = 16_384
#: Maximum number of bytes of a word that could not become a row.
UNKNOWN_BYTES: Final = 24
#: Layouts of rows by their code.
LAYOUT_NAMES: Final = {1: "1.0", 2: "2.4", 3: "2.4-clock64", 4: "3.0"}
#: Counters of one io_group in one run (or of run 0: what came outside a run), in the order of ``enum Count`` in
#: ext/wire.pxd. The compiled decoders add to them in place; `info_rows` to `stored` belong to producer and storage.
COUNTS: Final = (
    "messages",  # board messages that were taken apart (frames, on a serial line)
    "bytes_in",
    "header_bytes",
    "trailing_bytes",  # behind the last whole word, or behind the words that the header counts
    "rejected_bytes",  # messages thrown away whole: no header, unknown type or format
    "resync_bytes",  # serial: bytes that belong to no frame
    "pending_before",  # serial: bytes of an unfinished frame when the run began
    "pending_after",  # serial: bytes of an unfinished frame now
    "words_in",
    "word_bytes",  # words_in x size of a word (serial: 10 x frames)
    "word_rows",  # rows of types 0 to 3 with direction 1, 6 and 7
    "unknown_words",  # unknown type; kept raw
    "rejected_words",  # known type, impossible content; kept raw
    "packets",  # rows of types 0 to 3 with direction 1
    "bad_parity",  # packets among them whose parity is wrong; stored all the same
    "time_rows",  # rows of type 4
    "rejected_messages",
    "wrong_counts",  # messages whose header counts other words than they hold
    "info_rows",
    "sent_rows",  # rows of types 0 to 3 with direction 0
    "dropped",  # rows that found no room
    "stored",
)
#: Rows that these counters add up to: equation (c) of the ledger.
ROW_COUNTS: Final = ("word_rows", "time_rows", "info_rows", "sent_rows")

#: Bytes of a board without any use; fewer than these may be noise on a line.
LEAST_UNUSABLE: Final = 256


def unusable(counts: Mapping[str, int]) -> str | None:
    """In one line, when most of the words, messages or bytes that a board sent could not become rows.

    `counts` has its counters by name. One large message that is no board's does not outweigh many good ones.
    """
    refused = counts["unknown_words"] + counts["rejected_words"]
    words, messages = counts["words_in"], counts["messages"] + counts["rejected_messages"]
    stray = counts["trailing_bytes"] + counts["resync_bytes"]
    size = counts["word_bytes"] // words if words else 0
    parts = (
        (refused, words, refused * size, "words"),
        (counts["rejected_messages"], messages, counts["rejected_bytes"], "messages"),
        (stray, stray + counts["word_bytes"], stray, "bytes"),
    )
    for bad, of, bad_bytes, what in parts:
        if bad_bytes >= LEAST_UNUSABLE and 2 * bad > of:
            return f"most of the data could not be used: {bad} of {of} {what}"
    return None
