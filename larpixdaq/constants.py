"""Names and limits that several processes share: run states and conditions, times of the control plane, actions, run
numbers, layouts, and the counters of the ledger.

Without numpy (see schema.py), so that the programs that need none start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum, IntEnum
from operator import itemgetter
from typing import Final

STOP: Final = "STOP"
READY: Final = "READY"
RUN: Final = "RUN"
#: Kinds of components.
PRODUCER: Final = "producer"
RUN_DATA: Final = "run_data"
STORAGE: Final = "storage"
LOG: Final = "log"
# How far a run has come, as the catalogue says it. Written before the components are told, so that a core that died in
# between finds what it was about to do.
PREPARING: Final = "PREPARING"
BEGINNING: Final = "BEGINNING"
ENDING: Final = "ENDING"
#: Also READY and RUN; these two are over.
ENDED: Final = "ENDED"
CANCELLED: Final = "CANCELLED"


class RunCondition(str, Enum):
    """The condition of a run, or of one part of it, as files, messages and the catalogue spell it.

    COMPLETE to ABORTED are in order, from best to worst.
    """

    #: The run, or the writing of the part, has not ended.
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    #: All data that reached the host are stored, but data may have been lost before.
    SUSPECT = "COMPLETE, suspect"
    #: Of a part: all data of the part are stored, and the run continues in the next part.
    CONTINUED = "CONTINUED"
    INCOMPLETE = "INCOMPLETE"
    INTERRUPTED = "INTERRUPTED"
    ABORTED = "ABORTED"
    #: The run has never been READY.
    CANCELLED = "CANCELLED"

    __str__ = str.__str__


#: The conditions of a run or part that has ended, from best to worst.
_ENDED: Final[list[RunCondition]] = [
    one for one in RunCondition if one not in (RunCondition.RUNNING, RunCondition.CANCELLED)
]
#: Actions of a producer that report the state of chips and boards, and send no words to chips.
HARDWARE_QUERIES: Final = ("board_status", "get_boards", "ping", "retrieve_configuration", "retrieve_pixel_layout")
#: Actions of a producer that change chips or boards, or send words to chips.
HARDWARE_CHANGES: Final = (
    "configure_network",
    "enforce_configuration",
    "load_board",
    "load_pixel_layout",
    "power",
    "read_configuration",
    "reset",
    "send_configuration",
    "set_uart_clock",
    "validate_configuration",
    "write_configuration",
)
HARDWARE_ACTIONS: Final = HARDWARE_QUERIES + HARDWARE_CHANGES
#: Actions of components that change nothing, and need no control. All other actions need it.
QUERIES: Final = frozenset(
    {"list_routines", "packet_rate", "packets", "messages", "adc_histogram", "run_info", *HARDWARE_QUERIES}
)
#: Actions of components that only the core itself may ask for.
RUN_ACTIONS: Final = frozenset({"prepare_run", "begin_run", "end_run", "abort_run", "cancel_run", "report_run"})
# Seconds.
HEARTBEAT: Final = 0.25
#: Unheard for this long: lost.
LOST: Final = 1.0
#: Work is queued and progress has not moved for this long: stuck.
STUCK: Final = 1.0
#: An operator who has vanished gives control back after this.
CONTROL_FREE: Final = 5.0
#: A name that still counts as living, or a core that does not answer, is tried again for this long.
PATIENCE: Final = 5.0
#: A core unheard for this long is not there: requests of Operators fail, and nobody can register under a used name.
NO_CORE: Final = 2.0
#: Storages must have at least this much room on their disk when a run is prepared, bytes.
MIN_FREE: Final = 64 << 20
#: Run numbers are 1 to LAST_RUN, and have RUN_DIGITS digits in the names of files.
RUN_DIGITS: Final = 7
LAST_RUN: Final = 10**RUN_DIGITS - 1
#: One more than the highest io_group: counters of a producer are an array of shape (IO_GROUPS, len(Count)), dtype u8.
IO_GROUPS: Final = 256
#: Maximum number of rows of a block.
BLOCK_ROWS: Final = 16_384
#: Maximum number of bytes of a word that could not become a row.
UNKNOWN_BYTES: Final = 24
#: Layouts of rows by their code.
LAYOUT_NAMES: Final = {1: "1.0", 2: "2.4", 3: "2.4-clock64", 4: "3.0"}
#: Bytes of a board without any use; fewer than these may be noise on a line.
LEAST_UNUSABLE: Final = 256


class Count(IntEnum):
    """The counters of one io_group in one run, or in run 0, which counts the data outside of runs.

    The order is that of the enum in ext/row_structs.pxd, because the compiled decoders add to the counters in place.
    Producer and storage count the members from INFO_ROWS on.
    """

    MESSAGES = 0  # board messages that were taken apart (frames, on a serial line)
    BYTES_IN = 1
    HEADER_BYTES = 2
    TRAILING_BYTES = 3  # behind the last whole word, or behind the words that the header counts
    REJECTED_BYTES = 4  # messages thrown away whole: no header, unknown type or format
    RESYNC_BYTES = 5  # serial: bytes that belong to no frame
    PENDING_BEFORE = 6  # serial: bytes of an unfinished frame when the run began
    PENDING_AFTER = 7  # serial: bytes of an unfinished frame now
    WORDS_IN = 8
    WORD_BYTES = 9  # words_in x size of a word (serial: 10 x frames)
    WORD_ROWS = 10  # rows of types 0 to 3 with direction 1, 6 and 7
    UNKNOWN_WORDS = 11  # unknown type; kept raw
    REJECTED_WORDS = 12  # known type, impossible content; kept raw
    PACKETS = 13  # rows of types 0 to 3 with direction 1
    BAD_PARITY = 14  # packets among them whose parity is wrong; stored all the same
    TIME_ROWS = 15  # rows of type 4
    REJECTED_MESSAGES = 16
    WRONG_COUNTS = 17  # messages whose header counts other words than they hold
    INFO_ROWS = 18
    SENT_ROWS = 19  # rows of types 0 to 3 with direction 0
    DROPPED = 20  # rows that found no room
    STORED = 21


#: Names of the counters in files and messages, in the order of Count.
COUNTS: Final = tuple(count.name.lower() for count in Count)


_rows: Final = itemgetter(Count.WORD_ROWS, Count.TIME_ROWS, Count.INFO_ROWS, Count.SENT_ROWS)


def rows_made(counts: list[int]) -> int:
    """Return the number of rows that these counters, in the order of Count, add up to: equation (c) of the ledger."""
    return sum(_rows(counts))


def worst(found: Mapping[RunCondition, object], reported: str = RunCondition.COMPLETE) -> RunCondition:
    """Return the worst of the conditions with something true in `found`, and of the reported one; else COMPLETE.

    A reported text that is no condition of an end counts as INTERRUPTED.
    """
    known = RunCondition(reported) if reported in _ENDED else RunCondition.INTERRUPTED
    return max([known, *(condition for condition, true in found.items() if true)], key=_ENDED.index)


def best(conditions: Iterable[RunCondition]) -> RunCondition:
    """Return the best of these conditions: the one of a run of which several storages have copies."""
    return min(conditions, key=_ENDED.index, default=RunCondition.INTERRUPTED)


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
