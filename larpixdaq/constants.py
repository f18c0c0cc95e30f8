"""Names and limits that several processes share: run states and conditions, time limits, actions, and counters.

This module does not import numpy (see schema.py), so that programs without numpy start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum, IntEnum
from operator import itemgetter
from typing import Annotated, Final

from msgspec import Meta

#: Names of components, actions and keys, without control characters, because they are written into lines of text.
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
STOP: Final = "STOP"
READY: Final = "READY"
RUN: Final = "RUN"
#: Kinds of components.
PRODUCER: Final = "producer"
RUN_DATA: Final = "run_data"
STORAGE: Final = "storage"
LOG: Final = "log"
SUPERVISOR: Final = "supervisor"
# Phases of a run in the catalogue. The core writes a phase before it instructs the components, so that after its death
# the next core knows the step that was not finished.
PREPARING: Final = "PREPARING"
BEGINNING: Final = "BEGINNING"
ENDING: Final = "ENDING"
#: READY and RUN are phases too; ENDED and CANCELLED are final.
ENDED: Final = "ENDED"
CANCELLED: Final = "CANCELLED"


class RunCondition(str, Enum):
    """Condition of a run or of a part, with the text in files, messages and the catalogue.

    COMPLETE to ABORTED are in order, from best to worst.
    """

    #: The run or part has not ended.
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
    condition for condition in RunCondition if condition not in (RunCondition.RUNNING, RunCondition.CANCELLED)
]
#: Actions of a producer that report the state of chips and boards, and send no words to chips.
HARDWARE_QUERIES: Final = (
    "board_status",
    "compare_snapshot",
    "disabled_channels",
    "get_boards",
    "ping",
    "read_board",
    "retrieve_configuration",
    "retrieve_pixel_layout",
    "retrieve_snapshot",
)
#: Actions of a producer that change chips or boards, or send words to chips.
HARDWARE_CHANGES: Final = (
    "configure_network",
    "disable_channels",
    "discover_network",
    "enforce_configuration",
    "load_board",
    "load_pixel_layout",
    "load_snapshot",
    "power",
    "power_up",
    "read_configuration",
    "reset",
    "send_configuration",
    "set_trigger",
    "set_uart_clock",
    "set_uarts",
    "validate_configuration",
    "write_board",
    "write_configuration",
)
HARDWARE_ACTIONS: Final = HARDWARE_QUERIES + HARDWARE_CHANGES
#: Actions of a monitor.
MONITOR_QUERIES: Final = ("summary", "packet_rate", "pixel_map", "pixel", "adc_histogram", "packets", "messages")
#: Actions of components that change nothing and need no control. All other actions need control.
QUERIES: Final = frozenset({"list_routines", "records", "run_info", *MONITOR_QUERIES, *HARDWARE_QUERIES})
#: Actions of components that only the core itself may request.
RUN_ACTIONS: Final = frozenset(
    {"prepare_run", "begin_run", "end_run", "abort_run", "cancel_run", "report_run", "add_comments"}
)
#: Levels of log records, from the least important.
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: Seconds between heartbeats.
HEARTBEAT: Final = 0.25
#: Seconds without a heartbeat until a component is lost.
LOST: Final = 1.0
#: Seconds without progress, while work is queued, until a component is stuck.
STUCK: Final = 1.0
#: Seconds from the disappearance of an Operator until its control is free.
CONTROL_FREE: Final = 5.0
#: Seconds for which a component tries to register while its name is in use or no core answers.
REGISTER_LIMIT: Final = 5.0
#: Seconds without a message of the core until requests of Operators fail with NoCore.
NO_CORE: Final = 2.0
#: Minimum free bytes on the disk of each storage when a run is prepared.
MIN_FREE: Final = 64 << 20
#: Maximum bytes of a file that is attached to a run.
MAX_ATTACHMENT: Final = 64 << 20
#: Digits of a run number in file names, and the highest run number.
RUN_DIGITS: Final = 7
LAST_RUN: Final = 10**RUN_DIGITS - 1
#: Number of possible io_groups. The counters of a producer are an array of shape (IO_GROUPS, len(Count)), dtype u8.
IO_GROUPS: Final = 256
#: Maximum number of rows of a block.
BLOCK_ROWS: Final = 16_384
#: Maximum number of bytes that are kept of a word that could not become a row.
UNKNOWN_BYTES: Final = 24
#: Layouts of rows by their code.
LAYOUT_NAMES: Final = {1: "1.0", 2: "2.4", 3: "2.4-clock64", 4: "3.0"}
#: Minimum unusable bytes for unusable(), because fewer may be noise on a line.
MIN_UNUSABLE: Final = 256


class Count(IntEnum):
    """Index of each counter of one io_group in one run, or in run 0 for data outside of runs.

    The order is that of the enum in ext/row_structs.pxd, because the compiled decoders add to the counters in place.
    Producer and storage add to the counters from INFO_ROWS on.
    """

    MESSAGES = 0  # decoded board messages (frames, on a serial line)
    BYTES_IN = 1
    HEADER_BYTES = 2
    TRAILING_BYTES = 3  # after the last whole word, or after the words that the header counts
    REJECTED_BYTES = 4  # of whole messages: no header, unknown type or format
    RESYNC_BYTES = 5  # serial: outside of frames
    PENDING_BEFORE = 6  # serial: of an unfinished frame when the run began
    PENDING_AFTER = 7  # serial: of an unfinished frame now
    WORDS_IN = 8
    WORD_BYTES = 9  # words_in x size of a word (serial: 10 x frames)
    WORD_ROWS = 10  # rows of types 0 to 3 with direction 1, 6 and 7
    UNKNOWN_WORDS = 11  # unknown type; their bytes are kept
    REJECTED_WORDS = 12  # known type, impossible content; their bytes are kept
    PACKETS = 13  # rows of types 0 to 3 with direction 1
    BAD_PARITY = 14  # packets with wrong parity, which are stored too
    TIME_ROWS = 15  # rows of type 4
    REJECTED_MESSAGES = 16
    WRONG_COUNTS = 17  # messages whose header has a wrong number of words
    INFO_ROWS = 18
    SENT_ROWS = 19  # rows of types 0 to 3 with direction 0
    DROPPED = 20  # rows of gaps
    STORED = 21


#: Names of the counters in files and messages, in the order of Count.
COUNTS: Final = tuple(count.name.lower() for count in Count)


_rows: Final = itemgetter(Count.WORD_ROWS, Count.TIME_ROWS, Count.INFO_ROWS, Count.SENT_ROWS)


def rows_made(counts: list[int]) -> int:
    """Return the sum of rows in these counters, in the order of Count: equation (c) of the ledger."""
    return sum(_rows(counts))


def worst(reasons: Mapping[RunCondition, object], reported: str = RunCondition.COMPLETE) -> RunCondition:
    """Return the worst of the reported condition and the conditions with a true value in `reasons`.

    A reported text that is no condition of an ended run or part counts as INTERRUPTED.
    """
    known = RunCondition(reported) if reported in _ENDED else RunCondition.INTERRUPTED
    return max([known, *(condition for condition, reason in reasons.items() if reason)], key=_ENDED.index)


def best(conditions: Iterable[RunCondition]) -> RunCondition:
    """Return the best of these conditions, which is that of a run with copies in several storages."""
    return min(conditions, key=_ENDED.index, default=RunCondition.INTERRUPTED)


def unusable(counts: Mapping[str, int]) -> str | None:
    """Return one line of text if most words, messages or bytes of a board could not become rows, else None.

    `counts`: counters by name. One large message of another program does not outweigh many valid messages.
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
    for bad, total, bad_bytes, unit in parts:
        if bad_bytes >= MIN_UNUSABLE and 2 * bad > total:
            return f"most of the data could not be used: {bad} of {total} {unit}"
    return None
