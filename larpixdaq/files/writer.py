"""One file (a part of a run) being written: blocks in, LArPix+HDF5 out, durable at every moment.

Rows are collected in batches. A full batch is written to /packets; then come the rows of /run/blocks for the blocks
that ended in it; then the journal is emptied. A block that has waited WAIT seconds for that goes to the journal, whole.
So a block below `durable` is in /run/blocks or in the journal, and survives the death of this process; it survives a
power cut from close() on, which syncs.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import blocks, deflate, schema
from larpixdaq._native import chunks
from larpixdaq.blocks import Source
from larpixdaq.errors import FileError, ProtocolError
from larpixdaq.files import closing, layout, names
from larpixdaq.files.batch import Batch
from larpixdaq.files.journal import Journal
from larpixdaq.files.ledger import Account, check_block, check_end, describe
from larpixdaq.files.tables import Held, Message, Tables

#: A block waits at most this long, in seconds, for its batch to fill up.
WAIT: Final = 0.020


class RunInfo(NamedTuple):
    """What is known of a run when its file is opened."""

    run: int
    kind: str
    comment: str
    operator: str
    started_ns: int  # unix ns
    layout: schema.Layout
    asic_version: str
    storage: str = ""  # the storage's name, empty for the first or only one
    versions: Mapping[str, str] = {}
    required_producers: tuple[str, ...] = ()


class Report(NamedTuple):
    """What close() has to say. `reasons`: why the condition is not COMPLETE."""

    path: Path
    rows: int
    bytes: int
    condition: str
    reasons: list[str]
    stored: list[tuple[str, int, int, int]]  # producer, epoch, io_group, rows
    missing_blocks: int
    duplicate_blocks: int


class RunFile:
    def __init__(
        self, directory: Path, info: RunInfo, part: int = 0, positions: Iterable[blocks.Position] = ()
    ) -> None:
        """Create NAME.h5.part and its journal; FileError in one line when that cannot be.

        `positions`: where the run's sources stand after the parts before; other sources begin at sequence 0.
        """
        self.info = info
        self.part = part
        stem = names.stem(info.run, info.started_ns, part, info.storage)
        self.path = Path(directory) / (stem + names.PART)
        self.duplicate_blocks = 0
        #: Next sequence per source: all below is durable. An end counts as the sequence it names.
        self.durable: dict[Source, int] = {}
        self.ended: dict[Source, blocks.End] = {}
        self._known = {Source(p.run, p.producer, p.epoch): p.next for p in positions if p.run == info.run}
        self._accounts: dict[Source, Account] = {}
        self._producers: dict[str, int] = {}
        self._held: deque[Held] = deque()
        self._journaled = 0  # of the held ones, the first so many are in the journal
        self._oldest = 0.0  # monotonic time at which the first of the others came
        self._missing: list[tuple[int, ...]] = []
        self._messages = 0
        self._failed = ""

        self._final = self.path.with_name(stem + names.FINISHED)
        if self._final.exists():
            raise FileError(f"cannot create {self.path}: {self._final} exists")
        self._journal = Journal(self.path.with_name(stem + names.JOURNAL))
        try:
            self._file = layout.create(self.path, info.layout, info.asic_version)
        except BaseException:
            self._journal.close(remove=True)
            raise
        self._batch = Batch(self._file["packets"], info.layout.dtype.itemsize)
        self._tables = Tables(self._file)
        try:
            self._try(self._describe)
        except FileError:
            self.give_up()
            raise

    def _describe(self) -> None:
        info = np.zeros(1, layout.INFO)
        info["run"], info["part"], info["layout"] = self.info.run, self.part, self.info.layout.code
        info["condition"] = layout.RUNNING
        info["started_ns"], info["opened_ns"] = self.info.started_ns, time.time_ns()
        self._file["run/info"][:] = info
        self._tables.text("layout", self.info.layout.name)
        self._tables.text("compression", deflate.NAME)
        self._tell()
        self._file.flush()

    def _tell(self) -> None:
        """What people want to know of the run, into /run/texts."""
        for name in ("kind", "comment", "operator", "storage", "asic_version"):
            self._tables.text(name, getattr(self.info, name))
        for name, version in self.info.versions.items():
            self._tables.text(f"version {name}", version)
        for name in self.info.required_producers:
            self._tables.text("required producer", name)

    @property
    def rows(self) -> int:
        """Rows taken, in the file or on their way to it."""
        return self._batch.rows

    @property
    def bytes(self) -> int:
        """The size of the file now; 0 when somebody has taken it away."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    # What comes in

    def add(self, block: blocks.Block, rows: NDArray[Any]) -> None:
        """Take a block; `rows`, of the run's layout, are only borrowed.

        A block that was taken before is counted and dropped; sequences that were jumped over are counted as missing.
        ProtocolError, with nothing taken, when header and rows do not belong together; FileError when the disk fails.
        """
        self._usable()
        self._check(block, rows)
        account = self._account(block.source)
        if block.sequence < account.expected:
            self.duplicate_blocks += 1
            return
        if account.end is not None:
            raise ProtocolError(f"{describe(block)}: comes after the end of its source")
        message = None
        if block.text is not None:
            message = Message(self._messages, int(rows["timestamp"][0]))
            self._messages += len(blocks.text_pieces(block.text, layout.MESSAGE_BYTES))
            rows = rows.copy()
            rows["counter"] = message.first
            block = msgspec.structs.replace(block, crc32=deflate.crc32(rows.view(np.uint8)))
        if missing := account.skip(block.sequence, block.first_packet):
            self._missing.append(missing)
        account.take(block)
        data = rows.view(np.uint8)
        chunks.tally(data, block.layout, account.tally)
        self._hold(Held(block, account, self.rows, self.rows + block.rows, message))
        self._try(lambda: self._batch.put(data, self._write_batch))

    def end(self, end: blocks.End) -> None:
        """Take the end of a source: its totals. One that was taken before is counted and dropped."""
        self._usable()
        self._check_run(end)
        check_end(end)
        account = self._account(end.source)
        if account.end is not None:
            self.duplicate_blocks += 1
            return
        if end.next < account.expected:
            raise ProtocolError(f"{describe(end)}: block {account.expected - 1} of it has been taken already")
        if missing := account.skip(end.next, None):
            self._missing.append(missing)
        account.end = end
        self.ended[end.source] = end
        self._hold(Held(end, account, self.rows, self.rows))

    def _check_run(self, frame: blocks.Block | blocks.End) -> None:
        if frame.run != self.info.run:
            raise ProtocolError(f"{describe(frame)}: this file holds run {self.info.run}")

    def _check(self, block: blocks.Block, rows: NDArray[Any]) -> None:
        self._check_run(block)
        check_block(block, self.info.layout.code)
        if rows.dtype != self.info.layout.dtype or rows.shape != (block.rows,):
            raise ProtocolError(
                f"{describe(block)}: expected {block.rows} rows of layout {self.info.layout.name},"
                f" found shape {rows.shape} of {rows.dtype.itemsize} bytes each"
            )
        if not rows.flags.c_contiguous:
            raise ProtocolError(f"{describe(block)}: its rows are not contiguous")
        crc = deflate.crc32(rows.view(np.uint8))
        if crc != block.crc32:
            raise ProtocolError(f"{describe(block)}: expected CRC-32 {block.crc32:08x}, found {crc:08x}")
        if block.text is not None:
            kinds = rows[layout.type_column(rows.dtype)]
            if not len(kinds) or np.any(kinds != schema.PacketType.MESSAGE):
                raise ProtocolError(f"{describe(block)}: has a text, but not rows of messages")

    def _account(self, source: Source) -> Account:
        account = self._accounts.get(source)
        if account is None:
            name = source.producer.encode("utf-8", "replace")
            if not 0 < len(name) <= layout.PRODUCERS["name"].itemsize or b"\0" in name:
                raise ProtocolError(f"producer {source.producer[:40]!r}: a name of {len(name)} bytes cannot be stored")
            if source.producer not in self._producers:
                self._try(lambda: self._tables.append("run/producers", [(name,)]))
                self._producers[source.producer] = len(self._producers)
            account = Account(source, self._producers[source.producer], self._known.get(source, 0))
            self._accounts[source] = account
        return account

    def _hold(self, held: Held) -> None:
        if len(self._held) == self._journaled:
            self._oldest = monotonic()
        self._held.append(held)

    # What goes out

    def due(self) -> float | None:
        """The time.monotonic() at which work() must be called; None: not before something comes."""
        return self._oldest + WAIT if len(self._held) > self._journaled else None

    def work(self, *, pressed: bool = False) -> None:
        """Journal what has waited for WAIT; with `pressed` (half the stream's window is used) all that waits."""
        self._usable()
        due = self.due()
        if due is not None and (pressed or monotonic() >= due):
            waiting = [self._held[i] for i in range(self._journaled, len(self._held))]
            records = [(blocks.pack(held.frame), self._batch.pieces(held.start, held.stop)) for held in waiting]
            self._try(lambda: self._journal.append(records))
            self._journaled = len(self._held)
            self._acknowledge(waiting)

    def _acknowledge(self, done: Iterable[Held]) -> None:
        for held in done:
            frame = held.frame
            self.durable[frame.source] = frame.sequence + 1 if isinstance(frame, blocks.Block) else frame.next + 1

    def _write_batch(self) -> None:
        stop = self._batch.write()
        self._file.flush()
        done = []
        while self._held and self._held[0].stop <= stop:
            done.append(self._held.popleft())
        self._tables.write(done, self._missing)
        self._missing.clear()
        # What is left is at most one block that straddles the batch's end. It has only just come, so it is not in the
        # journal yet, and waits for the next batch or its turn there like any other.
        self._journal.clear()
        self._journaled = 0
        self._oldest = monotonic()
        self._acknowledge(done)

    # Metadata and the close

    def announce(self, info: RunInfo) -> None:
        """Take over what became known of the run while its file was open already; its name and layout stay.

        ProtocolError when the run has another layout, FileError when the disk fails.
        """
        self._usable()
        if info.run != self.info.run or info.layout != self.info.layout:
            raise ProtocolError(
                f"{self.path} holds run {self.info.run} in layout {self.info.layout.name}, asked for is run {info.run}"
                f" in layout {info.layout.name}"
            )
        self.info = info
        self._try(self._tell)
        self._try(self._file.flush)

    def set_text(self, name: str, text: str) -> None:
        """Add a text to /run/texts; the newest of a name counts. For what becomes known while the file is open."""
        self._usable()
        self._try(lambda: self._tables.text(name, text))
        self._try(self._file.flush)

    def set_comment(self, comment: str) -> None:
        self.set_text("comment", comment)

    def close(self, *, aborted: bool = False, owed: Mapping[Source, int] | None = None) -> Report:
        """Write what is left, the totals and the condition, and give the file its final name.

        aborted: the run was; owed: rows that producers are known to keep still.
        FileError when the disk fails or the final name is taken: part and journal then stay.
        """
        self._usable()
        owed = owed or {}
        accounts = list(self._accounts.values())
        condition, reasons = closing.verdict(accounts, owed, self.info.required_producers, aborted=aborted)
        missing = sum(account.missing_blocks for account in accounts)

        def finish() -> None:
            self._write_batch()
            for reason in reasons:
                self._tables.text("reason", reason)
            for account in accounts:
                self._tables.set_owed(account, owed.get(account.source, 0))
            info = self._file["run/info"][:]
            info["condition"], info["closed_ns"] = condition, time.time_ns()
            info["rows"], info["blocks"] = self.rows, self._tables.blocks
            info["duplicate_blocks"], info["missing_blocks"] = self.duplicate_blocks, missing
            self._file["run/info"][:] = info
            closing.seal(self._file)

        self._try(finish)
        try:
            closing.publish(self.path, self._final)
        except FileError:
            self.abandon()
            raise
        self.path = self._final
        self._journal.close(remove=True)
        self._failed = "is closed"
        stored = closing.stored(accounts)
        return Report(self.path, self.rows, self.bytes, condition, reasons, stored, missing, self.duplicate_blocks)

    def discard(self) -> None:
        """Remove the file of a run that was cancelled before any row came; FileError when one has."""
        self._usable()
        if self.rows:
            raise FileError(f"{self.path} is not removed: it holds {self.rows} rows")
        self._file.close()
        self.path.unlink()
        self._journal.close(remove=True)
        self._failed = "is removed"

    def abandon(self) -> None:
        """Let go of the file as it is: part and journal stay for recovery, the lock is given back.

        Harmless when repeated, or when the disk failed before: what was acknowledged is in file and journal.
        """
        self._failed = self._failed or "is closed"
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._file.close()
        self._journal.close()

    def give_up(self) -> None:
        """abandon() after a failure. Where nothing was acknowledged there is nothing to recover: both files go."""
        self.abandon()
        if not self.durable:
            for path in (self.path, self._journal.path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _usable(self) -> None:
        if self._failed:
            raise FileError(f"{self.path} {self._failed}")

    def _try(self, do: Callable[[], None]) -> None:
        """Run what writes. After a failure nothing more is written: what is on the disk then is for recovery."""
        try:
            do()
        except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
            self._failed = f"cannot be written any more: {error}"
            raise FileError(f"{self.path} {self._failed}") from error
