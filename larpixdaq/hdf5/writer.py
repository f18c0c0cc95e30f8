"""One file (a part of a run) being written: blocks in, LArPix+HDF5 out, durable at every moment.

Rows are collected in batches. A full batch is written to /packets; then come the rows of /run/blocks for the blocks
that ended in it; then the journal is emptied. A block that has waited WAIT seconds for that goes to the journal, whole.
Every SHOW_INTERVAL seconds the rows of an unfinished batch are written to /packets as well, for readers of the growing
file. No block of /run/blocks has these rows yet, so a recovery cuts them and takes those of the journal.
So a block below `durable` is in /run/blocks or in the journal, and survives the death of this process; a power cut it
survives from publish() on, which syncs, or, with `fsync`, from the moment it is below `durable`.

The end of a file: what it says about itself, its seal, and its final name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native import hdf5_chunks
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError, ProtocolError, cause
from larpixdaq.hdf5 import layout, ledger, names, tables
from larpixdaq.hdf5.chunk_writer import Batch, WriteBack
from larpixdaq.hdf5.journal import Journal
from larpixdaq.hdf5.ledger import Account, check_block, check_content, check_end, describe
from larpixdaq.hdf5.tables import CarriedConfigurations, Held, InfoMessage, RunInfo, Tables, storable
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.runtime.file_access import copy_content, in_place, open_regular
from larpixdaq.runtime.record_file import crc32

#: A block waits at most this long, in seconds, for its batch to fill up.
WAIT: Final = 0.020
#: Seconds between two writes of an unfinished batch, for readers of the growing file.
SHOW_INTERVAL: Final = 4.0
#: A storage that rotates so long after the last row (ns) lags behind its producers.
_LAG_NS = 2 * 10**9


class CloseReport(NamedTuple):
    """What close() has to say. `reasons`: why the condition is not COMPLETE."""

    path: Path
    rows: int
    bytes: int
    condition: RunCondition
    reasons: list[str]
    stored: list[tuple[str, int, int, int]]  # producer, epoch, io_group, rows
    missing_blocks: int
    duplicate_blocks: int


class RunFile:
    def __init__(
        self,
        directory: Path,
        info: RunInfo,
        part: int = 0,
        positions: Iterable[stream.Position] = (),
        *,
        fsync: bool = False,
        configurations: CarriedConfigurations = tables.NO_CONFIGURATIONS,
    ) -> None:
        """Create NAME.h5.part and its journal; FileError in one line when that cannot be.

        `positions`: where the run's sources stand after the parts before; other sources begin at sequence 0.
        `configurations`: what was known of the chips there.
        `fsync`: what is durable survives a power cut too, at the cost of waiting for the disk.
        """
        stem = names.stem(info.run, info.started_ns, part, info.storage)
        known = {BlockOrigin(p.run, p.producer, p.epoch): p.next for p in positions if p.run == info.run}
        self._set_up(info, part, Path(directory) / (stem + names.PART), known)
        if self.final.exists():
            raise FileError(f"cannot create {self.path}: {self.final} exists")
        self._fsync = fsync
        self._journal = Journal(self.path.with_name(stem + names.JOURNAL), fsync=fsync)
        try:
            self._file = layout.create(self.path, info.layout, info.asic_version)
        except BaseException:
            self._journal.close(remove=True)
            raise
        self._batch = Batch(self._file["packets"], info.layout.dtype.itemsize)
        self._tables = Tables(self._file, self._flush)
        try:
            self._try(lambda: self._describe(configurations))
        except FileError:
            self.give_up()
            raise

    def _describe(self, configurations: CarriedConfigurations) -> None:
        tables.describe_run(self._file, self._tables, self.info, self.part, self._known, configurations)
        if self._fsync:
            self._flush()
            sync_path(self.path.parent)

    @classmethod
    def resume(cls, path: Path, journal: Journal, info: RunInfo, state: UnfinishedPart) -> RunFile:
        """Go on with the part of a dead writer, whose superblock has been repaired: for recovery, which has the
        journal's lock, adds what only the journal holds, and closes it. What does not belong in it is cut.

        FileError when the disk fails; part and journal are as good as before then.
        """
        self = cls.__new__(cls)
        self._set_up(info, state.info["part"], path, state.known)
        self._journal = journal
        self._file = layout.reopen(path)

        def resume() -> None:
            self._batch = Batch(self._file["packets"], info.layout.dtype.itemsize)
            self._tables = Tables(self._file, self._flush)
            self._batch.resume(state.rows)
            self._tables.resume(state.lengths, state.producers)
            self._file.flush()

        try:
            self._try(resume)
        except FileError:
            self.abandon()
            raise
        self._damaged = state.damaged
        self._accounts = dict(state.accounts)
        self.ended = {account.source: account.end for account in state.accounts.values() if account.end}
        self._missing = list(state.missing)
        self._messages = state.messages
        self.duplicate_blocks = state.info["duplicate_blocks"]
        return self

    def _set_up(self, info: RunInfo, part: int, path: Path, known: dict[BlockOrigin, int]) -> None:
        self.info = info
        self.part = part
        self.path = path
        self.duplicate_blocks = 0
        #: Next sequence per source: all below is durable. An end counts as the sequence it names.
        self.durable: dict[BlockOrigin, int] = {}
        self.ended: dict[BlockOrigin, stream.End] = {}
        self._write_back = WriteBack(path)
        #: The name that publish() gives it.
        self.final = path.with_name(path.name.removesuffix(names.PART) + names.FINISHED)
        self._known = known
        self._accounts: dict[BlockOrigin, Account] = {}
        self._held: deque[Held] = deque()
        #: When a rotation opened this part, unix ns; 0: none did.
        self.from_ns = 0
        self._journaled = 0  # of the held ones, the first so many are in the journal
        self._oldest = 0.0  # monotonic time at which the first of the others came
        self._pending_messages: list[Held] = []  # INFO messages among the held ones whose texts are not in /messages
        self._visible_rows = 0  # rows that readers of the file can see
        self._show_time = monotonic()  # time at which these were written
        self._missing: list[tuple[int, ...]] = []
        self._messages = 0
        self._damaged: list[str] = []  # of a resumed file: what is not as it was written
        #: Why nothing can be written any more; empty while something can.
        self.failed = ""
        self._fsync = False
        self._nameless = -1  # the sealed file, when somebody has removed its name

    def positions(self) -> list[stream.Position]:
        """Where each source of the run stands now, parts before counted: for the part that follows."""
        return [stream.Position(*source, self.next(source)) for source in self._known | self._accounts]

    def configurations(self) -> CarriedConfigurations:
        """What is known of the chips now: for the part that follows."""
        waiting = [
            tables.configuration_rows(held.frame, held.account.index)
            for held in self._held
            if isinstance(held.frame, stream.Block) and held.frame.configs is not None
        ]
        table = np.concatenate([self._file["run/configs"][:], *waiting])
        return CarriedConfigurations(tables.newest_configurations(table), list(self._tables.producers))

    @property
    def rows(self) -> int:
        """Rows taken, in the file or on their way to it."""
        return self._batch.rows

    @property
    def bytes(self) -> int:
        """The size of the file now; 0 when somebody has taken it away."""
        try:
            return os.fstat(self._nameless).st_size if self._nameless >= 0 else self.path.stat().st_size
        except OSError:
            return 0

    def in_place(self) -> bool:
        """Whether part and journal have their names still: a recovery could not find them otherwise."""
        return in_place(self._descriptor(), self.path) and self._journal.in_place()

    # What comes in

    def add(self, block: stream.Block, rows: NDArray[Any]) -> None:
        """Take a block; `rows`, of the run's layout, are only borrowed.

        A block that was taken before is counted and dropped; sequences that were jumped over are counted as missing.
        ProtocolError, with nothing taken, when header and rows do not belong together (ChecksumError when the rows are
        others than were sent); FileError when the disk fails.
        """
        self._usable()
        self._check_run(block)
        check_block(block, rows, self.info.layout)
        if block.sequence < self._expected(block.source):
            self.duplicate_blocks += 1
            return
        # What is looked at from here on is our copy: nobody can change it any more.
        pieces = self._batch.stage(rows.view(np.uint8))
        check_content(block, pieces, self.info.layout)
        account = self._account(block.source)
        if account.end is not None:
            raise ProtocolError(f"{describe(block)}: comes after the end of its source")
        message = None
        if block.text is not None:
            rows = np.concatenate(pieces).view(rows.dtype)
            message = InfoMessage(self._messages, int(rows["timestamp"][0]))
            self._messages += len(stream.text_pieces(block.text, schema.MESSAGE_BYTES))
            rows["counter"] = np.arange(message.first, message.first + len(rows))
            pieces = self._batch.stage(rows.view(np.uint8))
            block = msgspec.structs.replace(block, crc32=crc32(rows.view(np.uint8)))
        if missing := account.skip(block.sequence, block.first_packet):
            self._missing.append(missing)
        account.take(block.sequence, block.first_packet + block.rows)
        account.drop((gap.io_group, gap.rows) for gap in block.gaps)
        for piece in pieces:
            hdf5_chunks.tally(piece, block.layout, account.tally)
        self._hold(held := Held(block, account, self.rows, self.rows + block.rows, message))
        if message is not None:
            self._pending_messages.append(held)
        self._try(lambda: self._batch.commit(block.rows, self._write_batch))

    def end(self, end: stream.End) -> None:
        """Take the end of a source: its totals. One that was taken before is counted and dropped."""
        self._usable()
        self._check_run(end)
        check_end(end)
        expected = self._expected(end.source)
        if end.source in self.ended or end.following == self._known.get(end.source):  # here, or in a part before
            self.duplicate_blocks += 1
            return
        if end.next < expected:
            raise ProtocolError(f"{describe(end)}: block {expected - 1} of it has been taken already")
        account = self._account(end.source)
        if missing := account.skip(end.next, None):
            self._missing.append(missing)
        account.end = end
        account.drop((gap.io_group, gap.rows) for gap in end.gaps)
        self.ended[end.source] = end
        self._hold(Held(end, account, self.rows, self.rows))

    def _check_run(self, frame: stream.Block | stream.End) -> None:
        if frame.run != self.info.run:
            raise ProtocolError(f"{describe(frame)}: this file holds run {self.info.run}")

    def _account(self, source: BlockOrigin) -> Account:
        account = self._accounts.get(source)
        if account is None:
            if not storable(source.producer):
                size = len(source.producer.encode("utf-8", "replace"))
                raise ProtocolError(f"producer {source.producer[:40]!r}: a name of {size} bytes cannot be stored")
            self._try(lambda: self._tables.add_producer(source.producer))
            account = Account(source, self._tables.producers[source.producer], self._known.get(source, 0))
            self._accounts[source] = account
        return account

    def next(self, source: BlockOrigin) -> int:
        """The sequence that comes next, durable or not; an end counts as the one it names."""
        account = self._accounts.get(source)
        return self._known.get(source, 0) if account is None else account.next

    def _expected(self, source: BlockOrigin) -> int:
        account = self._accounts.get(source)
        return self._known.get(source, 0) if account is None else account.expected

    def _flush(self) -> None:
        """Hand everything to the kernel, in order; with `fsync` wait until the disk has it."""
        self._file.flush()
        if self._fsync:
            os.fsync(self._descriptor())

    def _descriptor(self) -> int:
        return int(self._file.id.get_vfd_handle())

    def _hold(self, held: Held) -> None:
        if len(self._held) == self._journaled:
            self._oldest = monotonic()
        self._held.append(held)

    # What goes out

    def due(self) -> float | None:
        """The time.monotonic() at which work() must be called; None: not before something comes."""
        if len(self._held) > self._journaled:
            return self._oldest + WAIT
        return self._show_time + SHOW_INTERVAL if self.rows > self._visible_rows else None

    def work(self, *, pressed: bool = False) -> None:
        """Journal what has waited for WAIT; with `pressed` (half the stream's window is used) all that waits. Then show
        rows, when that is due."""
        self._usable()
        if len(self._held) > self._journaled and (pressed or monotonic() >= self._oldest + WAIT):
            waiting = [self._held[i] for i in range(self._journaled, len(self._held))]
            records = [(stream.pack(held.frame), self._batch.pieces(held.start, held.stop)) for held in waiting]
            self._try(lambda: self._journal.append(records))
            self._journaled = len(self._held)
            self._acknowledge(waiting)
        if self.rows > self._visible_rows and monotonic() >= self._show_time + SHOW_INTERVAL:
            self._try(self._show)

    def _show(self) -> None:
        for held in self._pending_messages:
            self._tables.add_message(held)
        self._pending_messages.clear()
        self._flush()  # a row of a message is not seen before its text
        self._batch.show()
        self._flush()
        self._visible_rows, self._show_time = self.rows, monotonic()

    def _acknowledge(self, done: Iterable[Held]) -> None:
        for held in done:
            self.durable[held.frame.source] = held.frame.following

    def _write_batch(self) -> None:
        stop = self._batch.write()
        done = []
        while self._held and self._held[0].stop <= stop:
            done.append(self._held.popleft())
        self._tables.write(done, self._missing)  # flushes the rows before it names a block
        self._write_back.advance(self.bytes)
        self._missing.clear()
        self._pending_messages = [held for held in self._held if held.message is not None]
        # What is left is at most one block that straddles the batch's end. It has only just come, so it is not in the
        # journal yet, and waits for the next batch or its turn there like any other.
        self._journal.clear()
        self._journaled = 0
        self._oldest = self._show_time = monotonic()
        self._visible_rows = stop
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
        self._try(lambda: tables.write_run_texts(self._tables, info))
        self.begin(info.begun_ns)

    def begin(self, begun_ns: int) -> None:
        """RUN begins, unix ns."""
        self._usable()
        self.info = self.info._replace(begun_ns=begun_ns)

        def write() -> None:
            info = self._file["run/info"][:]
            info["begun_ns"] = begun_ns
            self._file["run/info"][:] = info
            self._flush()

        self._try(write)

    def set_sources(self, connected: Iterable[stream.ConnectedBoard]) -> None:
        """Add to /run/sources what became known while the file is open."""
        self._usable()
        self._try(lambda: self._tables.add_sources(connected))
        self._try(self._flush)

    def set_text(self, name: str, text: str) -> None:
        """Add a text to /run/texts; the newest of a name counts. For what becomes known while the file is open."""
        self._usable()
        self._try(lambda: self._tables.add_text(name, text))
        self._try(self._flush)

    def close(self, **how: Any) -> CloseReport:
        """Seal and publish, which waits for the disk. `how`: as of seal()."""
        report = self.seal(**how)
        return report._replace(path=self.publish())

    def seal(
        self,
        *,
        aborted: bool = False,
        continued: bool = False,
        owed: Mapping[BlockOrigin, int] | None = None,
        texts: Mapping[str, str] | None = None,
        ended_ns: int = 0,
        until_ns: int = 0,
    ) -> CloseReport:
        """Write what is left, the totals and the condition: the file is whole then, and waits for publish().

        aborted: the run was; continued: the run goes on in another part; owed: rows that producers are known to keep
        still; texts: more for /run/texts, such as "previous part", "next part"; ended_ns: when RUN ended, unix ns, 0
        when it has not, or nobody knows; until_ns: when a rotation opened the next part, unix ns.
        FileError when the disk fails: part and journal then stay for recovery.
        """
        self._usable()
        owed = owed or {}
        accounts = list(self._accounts.values())
        condition, reasons = ledger.verdict(
            accounts,
            owed,
            self.info.required_producers,
            aborted=aborted,
            continued=continued,
            before=self._known,
            damaged=self._damaged,
        )
        missing = sum(account.missing_blocks for account in accounts)

        def finish() -> None:
            self._write_batch()
            for name, text in (texts or {}).items():
                self._tables.add_text(name, text)
            for name, lines in (("damaged", self._damaged), ("reason", reasons)):
                for line in lines:
                    self._tables.add_text(name, line)
            for account in accounts:
                self._tables.set_owed(account, owed.get(account.source, 0))
            self._tables.set_positions(self._positions())
            info = self._file["run/info"][:]
            info["condition"], info["closed_ns"] = condition, time.time_ns()
            if "ended_ns" in info.dtype.names:  # not so in a part of an earlier version that is recovered
                info["ended_ns"] = ended_ns
                info["live_ns"] = live_ns(self._file, info[0], from_ns=self.from_ns, until_ns=until_ns)
            info["rows"], info["blocks"] = self.rows, self._tables.blocks
            info["duplicate_blocks"], info["missing_blocks"] = self.duplicate_blocks, missing
            self._file["run/info"][:] = info
            if not in_place(self._descriptor(), self.path):
                self._nameless = os.dup(self._descriptor())
            seal_file(self._file)

        self._try(finish)
        self.failed = "is closed"
        stored = ledger.stored_rows(accounts)
        return CloseReport(self.path, self.rows, self.bytes, condition, reasons, stored, missing, self.duplicate_blocks)

    def publish(self) -> Path:
        """Sync the sealed file, give it its final name, and remove the journal; may be called in another thread.

        FileError when the disk fails or the name is taken: part and journal then stay.
        """
        try:
            if self._nameless >= 0:
                write_anew(self._nameless, self.path)
                self._forget_nameless()
            publish_file(self.path, self.final)
        except FileError:
            if not self.nameless:
                self.abandon()
            raise
        self.path = self.final
        self._journal.close(remove=True)
        return self.path

    @property
    def nameless(self) -> bool:
        """Whether the sealed file has no name, and only this object has it: publish() may be tried again."""
        return self._nameless >= 0

    def _forget_nameless(self) -> None:
        if self._nameless >= 0:
            os.close(self._nameless)
            self._nameless = -1

    def _positions(self) -> list[tuple[int, ...]]:
        """The rows of /run/positions: first those of which the file has known since it was opened, in their order."""
        return [
            (self._tables.producers[source.producer], source.epoch, self._known.get(source, 0), self.next(source))
            for source in self._known | self._accounts
        ]

    def discard(self) -> None:
        """Remove the file of a run that was cancelled before any row came; FileError when one has."""
        self._usable()
        if self.rows:
            raise FileError(f"{self.path} is not removed: it holds {self.rows} rows")
        self._file.close()
        self.path.unlink()
        self._journal.close(remove=True)
        self.failed = "is removed"

    def abandon(self) -> None:
        """Let go of the file as it is: part and journal stay for recovery, the lock is given back.

        Harmless when repeated, or when the disk failed before: what was acknowledged is in file and journal.
        """
        self.failed = self.failed or "is closed"
        self._forget_nameless()
        # The HDF5 library writes what its cache holds when it closes a file, if need be when this process ends: into a
        # file that has been recovered meanwhile. From here on it writes into memory.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            elsewhere = os.memfd_create("larpixdaq", os.MFD_CLOEXEC)
            try:
                os.dup2(elsewhere, self._descriptor(), inheritable=False)
            finally:
                os.close(elsewhere)
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
        if self.failed:
            raise FileError(f"{self.path} {self.failed}")

    def _try(self, do: Callable[[], None]) -> None:
        """Run what writes. After a failure nothing more is written: what is on the disk then is for recovery."""
        try:
            do()
        except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
            self.failed = f"cannot be written any more: {cause(error)}"
            raise FileError(f"{self.path} {self.failed}") from error


def live_ns(file: Any, info: Any, *, from_ns: int, until_ns: int) -> int:
    """For how long RUN was recorded in this part, ns: without the times in which rows found no room at a producer.

    `info`: the row of /run/info with all times. `from_ns`, `until_ns`: when a rotation opened this part, and when one
    opened the next; 0: none did. A part that no rotation opened begins when it was opened, or with its first block when
    that had come before; one that no rotation closed ends with RUN or with its last block.
    """
    table = file["run/blocks"]
    if not info["begun_ns"] or not table.shape[0]:
        return 0
    first, last = int(table[0]["first_ns"]), int(table[-1]["last_ns"])
    # A storage that lags behind its producers rotates between data of long before: their times count then.
    start = from_ns if from_ns and from_ns - first < _LAG_NS else min(first, int(info["opened_ns"]))
    start = max(start, int(info["begun_ns"]))
    stop = int(info["ended_ns"]) or (until_ns if until_ns and until_ns - last < _LAG_NS else last)
    gaps = np.sort(file["ledger/gaps"][:], order="first_ns")
    live, at = max(0, stop - start), start
    for begin, end in gaps[["first_ns", "last_ns"]].tolist():
        begin, end = max(begin, at), min(end, stop)
        if end > begin:
            live, at = live - (end - begin), end
    return live


def seal_file(file: Any) -> None:
    """Write /run/checksums and the time of the last change, and close the file."""
    names = [name for name in layout.CHECKED if name in file]
    sums = np.zeros(len(names), layout.CHECKSUMS)
    file.flush()
    for row, name in zip(sums, names, strict=True):
        row["name"], row["rows"], row["crc32"] = name.encode(), file[name].shape[0], layout.table_crc32(file[name])
    file["run/checksums"][:] = sums
    file["_header"].attrs.modify("modified", np.float64(time.time()))
    file.flush()
    file.close()


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or a directory's entries."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_anew(file: int, part: Path) -> None:
    """Give an open file the name again that somebody has removed, by a copy. FileError when that cannot be."""
    try:
        new = open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            copy_content(file, new)
        except OSError:
            os.unlink(part)
            raise
        finally:
            os.close(new)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{part} was removed, and cannot be written anew: {reason}") from None


def publish_file(part: Path, final: Path) -> None:
    """Sync the file and give it its final name, never over another file; FileError when the name is taken."""
    try:
        sync_path(part)
        try:
            os.link(part, final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            # A file system without hard links: take the name with an empty file, which the rename then replaces.
            os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            os.rename(part, final)
        else:
            sync_path(final.parent)
            os.unlink(part)
        sync_path(final.parent)
    except OSError as error:
        raise FileError(f"cannot rename {part} to {final.name}: {error.strerror}") from None


class UnfinishedPart(NamedTuple):
    info: dict[str, Any]  # the row of /run/info
    texts: dict[str, list[str]]
    sealed: bool  # it was closed, and lacks its final name only
    known: dict[BlockOrigin, int]  # where sources stood when it was opened
    accounts: dict[BlockOrigin, Account]
    producers: list[str]
    rows: int  # of /packets that belong to blocks
    cut: int  # further ones
    messages: int  # rows of /messages
    lengths: dict[str, int]  # of each table, the rows that belong to it
    missing: list[tuple[int, ...]]  # rows that /run/missing lacks
    owed: dict[BlockOrigin, int]
    damaged: list[str]  # rows that are not what was written and stay where they are, in one line each
    lost: list[str]  # what is cut although its writer had come to its end with it, in one line each
