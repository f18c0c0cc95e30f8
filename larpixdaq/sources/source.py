"""What a source of packets is: the protocol that the producer drives. A new kind of board is one file beside this one.

A source owns the connection to one board (or one file) and the decoder of its bytes. It never blocks, never sleeps, and
makes rows only in the memory that it is given::

    source.open()
    source.start(counts)                  # the ledger's counters: of a run, or of what comes outside of runs
    ...  when `sockets` are readable, or `due()` has come:
    while source.read():                  # one batch from the board into the decoder
        for text, seconds in source.texts(): ...   # what belongs before its rows
        while (n := source.decode(rows)) == len(rows):   # full: hand over fresh rows
            rows = ...
    source.close()
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from larpixdaq.protocol.stream import LossVerdict
from larpixdaq.schema import RowLayout
from larpixdaq.sources.command_channel import Channel
from larpixdaq.sources.data_quality import ClockReading, Presence, setup_findings, verdicts


class BoardStatus(NamedTuple):
    """One board of a source, between runs and in them."""

    io_group: int
    name: str
    away_ns: int = 0  # unix ns since when it has not been connected; 0: it is
    problem: str = ""  # why it is not connected, as far as that is known
    setup: tuple[LossVerdict, ...] = ()  # what contradicts the producer's options
    refusal: str = ""  # why no run can be prepared with it, in one line
    clock: ClockReading | None = None  # beside the host's


class Source(Protocol):
    #: One line for messages to people, such as "PACMAN io_group 1 at tcp://127.0.0.1:5556".
    name: str
    #: What it is, and where: stream.ConnectedBoard says how.
    kind: str
    address: str
    layout: RowLayout
    io_groups: tuple[int, ...]
    #: True for sources that can be made to wait (replay, fake, serial); boards that publish regardless spill instead.
    waits: bool
    #: True for files: read only in the state RUN, and from their beginning in each run.
    recorded: bool
    #: True once nothing more will ever come (the end of a replay).
    finished: bool
    #: True when the last read() took all that was there by then; False: more of it waits.
    drained: bool
    #: The ways to the boards and their chips; (): nothing can be sent there.
    channels: tuple[Channel, ...]
    #: Sockets or file descriptors to poll for reading; may change after read() (a board that was lost and came back).
    sockets: tuple[Any, ...]

    def open(self) -> None:
        """Connect. ConfigError or FileError, in one line, when that cannot work; a board that is away is no error."""

    def close(self) -> None: ...

    def start(self, counts: NDArray[np.uint64]) -> None:
        """Add from now on to these counters, shape (IO_GROUPS, len(Count)), dtype u8; forget kept unknown words."""

    def due(self) -> float | None:
        """When read() wants to be called although no socket is readable: time.monotonic() seconds; None: never."""

    def read(self) -> bool:
        """Take one batch of what is there, without waiting; False when there was nothing."""

    def texts(self) -> list[tuple[str, int]]:
        """INFO texts of a recorded file, each with its time (unix seconds), that belong before the rows of the batch
        just read, in order, once; [] for boards. Their rows (type 5) are the recorder's to make and to count, since the
        texts travel with them."""

    def decode(self, rows: NDArray[Any]) -> int:
        """Fill rows, dtype `layout.dtype`; return how many. Fewer than len(rows): the batch is used up."""

    def take_unknown(self) -> NDArray[Any]:
        """The unknown and rejected words kept since start(), dtype schema.UNKNOWN_WORD; they are then forgotten."""

    def problems(self) -> list[str]:
        """Warnings since the last call, each one line (board silent, board back, device gone); the producer logs
        them."""

    def evidence(self, now: int) -> list[LossVerdict]:
        """What became of each io_group's data since start() before they reached us: at least one line for each.

        `now`: unix ns, or when the run was told to end."""

    def boards(self) -> list[BoardStatus]:
        """How its boards are, one for each io_group."""

    def delivered(self, made: int, stored: int, now: int) -> None:
        """Blocks of the producer that were made and stored by now (unix ns); to be called about once a second."""


class Decoder(Protocol):
    """The part of the decoders in _native.decoders that sources need."""

    def start(self, counts: NDArray[np.uint64]) -> None: ...
    def decode(self, rows: NDArray[Any]) -> int: ...
    def take_unknown(self) -> NDArray[Any]: ...
    def heard(self, now_ns: int, since: float = ..., until: float = ...) -> None: ...
    def noticed(self) -> NDArray[Any]: ...
    def note(self, what: int, events: int, amount: int) -> None: ...


class LiveSource:
    """Base of the sources of one live board: decoder and presence. Subclasses add open, close, due and read."""

    waits = True
    recorded = False
    finished = False
    drained = True
    channels: tuple[Channel, ...] = ()

    _decoder: Decoder

    def __init__(self, name: str, layout: RowLayout, io_group: int, decoder: Decoder, silence: float = 0.0) -> None:
        """`silence`: seconds that the board is never silent for; 0: it may be silent."""
        self.name = name
        self.layout = layout
        self.io_groups: tuple[int, ...] = (io_group,)
        self.sockets: tuple[Any, ...] = ()
        self._decoder = decoder
        self._presence = Presence(int(silence * 1e9))
        self._problems: list[str] = []

    def start(self, counts: NDArray[np.uint64]) -> None:
        self._decoder.start(counts[self.io_groups[0]])
        self._presence.start(time.time_ns())

    def texts(self) -> list[tuple[str, int]]:
        return []

    def decode(self, rows: NDArray[Any]) -> int:
        return self._decoder.decode(rows)

    def take_unknown(self) -> NDArray[Any]:
        return self._decoder.take_unknown()

    def problems(self) -> list[str]:
        problems, self._problems = self._problems, []
        return problems

    def evidence(self, now: int) -> list[LossVerdict]:
        (io_group,) = self.io_groups
        return verdicts(io_group, self._decoder.noticed(), self._presence.findings(io_group, now))

    def delivered(self, made: int, stored: int, now: int) -> None:
        self._presence.delivered(made, stored, now)

    def boards(self) -> list[BoardStatus]:
        (io_group,) = self.io_groups
        setup = tuple(setup_findings(io_group, self._decoder.noticed()))
        return [BoardStatus(io_group, self.name, self._presence.away_ns, setup=setup)]
