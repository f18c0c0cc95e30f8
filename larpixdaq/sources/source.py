"""Sources of packets: the base class by which the producer reads boards and recorded files. Each kind has a file here.

A source owns the connection to one board (or recorded files) and the decoder of its bytes. It never blocks, never
sleeps, and writes rows only into the memory of its caller::

    source.open()
    source.start(counts)                  # the ledger's counters: of a run, or of data outside of runs
    ...  when `sockets` are readable, or the time of `due()` has come:
    while source.read():                  # one batch from the board into the decoder
        for text, seconds in source.texts(): ...   # INFO texts before the batch's rows
        while (n := source.decode(rows)) == len(rows):   # full: pass free rows
            rows = ...
    source.close()
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import BernDecoder, PacmanDecoder, SerialDecoder
from larpixdaq.protocol.stream import LossVerdict
from larpixdaq.schema import NOTICES, RowLayout
from larpixdaq.sources.command_channel import Channel
from larpixdaq.sources.data_quality import ClockReading, Presence, setup_findings, verdicts

Decoder = PacmanDecoder | BernDecoder | SerialDecoder
_FULL: Final = NOTICES.index("full")


class BoardStatus(NamedTuple):
    """State of one board of a source, also between runs."""

    io_group: int
    name: str
    away_ns: int = 0  # unix ns of the loss of the connection; 0: connected
    problem: str = ""  # reason why it is not connected, if known
    setup: tuple[LossVerdict, ...] = ()  # findings that contradict the producer's options
    refusal: str = ""  # reason why no run can be prepared with this board, in one line
    clock: ClockReading | None = None
    fifo_full: int = 0  # packets with the flag of a full FIFO since start()


class Source(ABC):
    """Base of all sources. Subclasses implement the abstract methods and change the attributes that differ."""

    #: `kind` and `address` as in stream.ConnectedBoard.
    kind: str
    address: str
    #: Sources that can wait for room in the ring (replay, fake, serial). Boards publish without waiting.
    waits = True
    #: Recorded files: read only in the state RUN, and from their beginning in each run.
    recorded = False
    #: No more data will come (the end of a replay).
    finished = False
    #: The last read() took all data that had arrived; False: more data wait.
    drained = True
    #: Data that arrive in 20 ms at the full rate may not fit into the kernel's buffer.
    small_buffer = False
    #: Command channels to the boards and their chips; (): the source takes no commands.
    channels: tuple[Channel, ...] = ()
    #: Sockets or file descriptors to poll for reading. They may change after read(), because a board was lost or found.
    sockets: tuple[Any, ...] = ()

    def __init__(self, name: str, layout: RowLayout, io_groups: tuple[int, ...], silence: float = 0.0) -> None:
        """`name`: for log lines and errors, such as "PACMAN io_group 1 at tcp://127.0.0.1:5556". `silence`: seconds
        within which a board sends at least one message; 0: it may be silent."""
        self.name = name
        self.layout = layout
        self.io_groups = io_groups
        self._presence = Presence(int(silence * 1e9))
        self._disconnection = ""  # its reason
        self._lost_at = 0.0  # monotonic seconds; 0: connected, or never lost
        self._problems: list[str] = []

    @abstractmethod
    def open(self) -> None:
        """Connect. ConfigError or FileError, in one line, when that is impossible; a disconnected board is no error.

        The caller closes the source also after an error.
        """

    @abstractmethod
    def close(self) -> None: ...

    def start(self, counts: NDArray[np.uint64]) -> None:
        """Count in `counts` from now on, shape (IO_GROUPS, len(Count)), dtype u8, and forget kept unknown words."""
        self._presence.start(time.time_ns())

    @abstractmethod
    def due(self) -> float | None:
        """Time of the next read() without a readable socket, in seconds of time.monotonic(); None: no such time."""

    @abstractmethod
    def read(self) -> bool:
        """Take one batch of data without waiting. Returns False when there were none."""

    def hold(self, held: bool) -> None:  # noqa: B027
        """Leave data where they arrive without taking notice of them (True) until they are many, or hold(False)."""

    def texts(self) -> list[tuple[str, int]]:
        """Return the INFO texts before the rows of the last batch, in order, each with its time (unix seconds).

        Only recorded files have texts, and each text is returned once. The recorder makes and counts their rows
        (type 5), because it sends the texts together with the rows."""
        return []

    @abstractmethod
    def decode(self, rows: NDArray[Any]) -> int:
        """Fill `rows`, dtype `layout.dtype`. Returns the number of rows; fewer than len(rows): the batch is empty."""

    @abstractmethod
    def take_unknown(self) -> NDArray[Any]:
        """Return and forget the unknown and rejected words kept since start(), dtype schema.UNKNOWN_WORD."""

    def problems(self) -> list[str]:
        """Return warnings since the last call, one line each (board silent, device disconnected), for the log."""
        problems, self._problems = self._problems, []
        return problems

    def evidence(self, now: int) -> list[LossVerdict]:
        """Return verdicts on the data of each io_group since start(), at least one line for each.

        `now`: unix ns, or the time at which end_run was requested."""
        return [
            line
            for io_group in self.io_groups
            for line in verdicts(io_group, self._noticed(io_group), self._presence.findings(io_group, now))
        ]

    def boards(self) -> list[BoardStatus]:
        """Return the state of the boards, one for each io_group."""
        away_ns, problem = self._presence.away_ns, self._disconnection
        found = []
        for group in self.io_groups:
            noticed = self._noticed(group)
            full = int(noticed["amount"][_FULL])
            setup = tuple(setup_findings(group, noticed))
            found.append(BoardStatus(group, self.name, away_ns, problem, setup, fifo_full=full))
        return found

    def delivered(self, made: int, stored: int, now: int) -> None:
        """Note how many blocks of the producer were made and stored until now (unix ns). Called about once a second."""
        self._presence.delivered(made, stored, now)

    def _problem(self, text: str) -> None:
        self._problems.append(f"{self.name}: {text}")

    def _note_connection(self) -> None:
        if self._lost_at:
            self._problem(f"connected again after {time.monotonic() - self._lost_at:.1f} s")
        self._lost_at, self._disconnection = 0.0, ""
        self._presence.connected(time.time_ns())

    def _note_loss(self, reason: str, warning: str) -> None:
        self._lost_at, self._disconnection = time.monotonic(), reason
        self._presence.lost(time.time_ns())
        self._problem(warning)

    @abstractmethod
    def _noticed(self, io_group: int) -> NDArray[Any]:
        """Return the notices of an io_group's decoder since start(), dtype schema.NOTICE."""


class LiveSource(Source):
    """Base of the sources of one live board, with its decoder. Subclasses add open, close, due and read."""

    _decoder: Decoder

    def __init__(self, name: str, layout: RowLayout, io_group: int, decoder: Decoder, silence: float = 0.0) -> None:
        super().__init__(name, layout, (io_group,), silence)
        self._decoder = decoder

    def start(self, counts: NDArray[np.uint64]) -> None:
        super().start(counts)
        self._decoder.start(counts[self.io_groups[0]])

    def decode(self, rows: NDArray[Any]) -> int:
        return self._decoder.decode(rows)

    def take_unknown(self) -> NDArray[Any]:
        return self._decoder.take_unknown()

    def _noticed(self, io_group: int) -> NDArray[Any]:
        return self._decoder.noticed()
