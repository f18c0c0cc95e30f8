"""Write blocks into one part of a run, so that every acknowledged block survives the death of this process.

Rows are collected in batches of chunks. When a batch has chunk_writer.MOST full chunks, or some and a block has waited
for WAIT seconds, the full chunks are written to /packets. Then the blocks that end in them get their rows in
/run/blocks, and then the journal is emptied. With fewer than LEAST full chunks, blocks that have waited go to the
journal, whole.

Every SHOW_INTERVAL seconds the rows of the batch are written to /packets too, for readers of the growing file. No block
in /run/blocks refers to these rows yet, so recovery cuts them and takes the rows from the journal.

A block below the position in `durable` is therefore in /run/blocks or in the journal. It survives a power cut after
publish(), which syncs the file; with `fsync`, as soon as it is below that position.
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
from larpixdaq.errors import ChecksumError, FileError, ProtocolError, cause
from larpixdaq.hdf5 import chunk_writer, layout, ledger, metadata, names, tables
from larpixdaq.hdf5.chunk_writer import Batch, WriteBack
from larpixdaq.hdf5.journal import Journal
from larpixdaq.hdf5.ledger import Account, check_block, check_content, check_end, check_layout, describe
from larpixdaq.hdf5.tables import CarriedConfigurations, InfoMessage, RunInfo, Tables, WaitingFrame
from larpixdaq.protocol import stream
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.reports import Comment
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.runtime.file_access import copy_content, in_place, open_regular
from larpixdaq.runtime.record_file import crc32

#: Seconds that a block waits for its batch to fill up, before it goes to the journal. Until then its rows are in the
#: producer's ring, which survives the death of every process, but no power cut: with `fsync` a block waits less.
WAIT: Final = 0.100
WAIT_FSYNC: Final = 0.020
#: Seconds between two writes of an unfinished batch, for readers of the growing file.
SHOW_INTERVAL: Final = 4.0
#: One of this number of packed chunks is unpacked, to check its rows before they are acknowledged.
CHECKED_CHUNKS: Final = 16
#: Maximum ns between a part's first or last row and a rotation; above it the storage lags behind its producers.
_LAG_NS: Final = 2 * 10**9


class CloseReport(NamedTuple):
    """Result of the close of a part. `reasons`: why the condition is not COMPLETE."""

    path: Path
    rows: int
    bytes: int
    condition: RunCondition
    reasons: list[str]
    unread: int = 0  # chunks that were written as they came packed, and never unpacked


class RunFile:
    def __init__(
        self,
        directory: Path,
        info: RunInfo,
        part: int = 0,
        positions: Mapping[BlockOrigin, int] = {},
        *,
        fsync: bool = False,
        threads: int = 1,
        configurations: CarriedConfigurations = tables.NO_CONFIGURATIONS,
        stem: str = "",
    ) -> None:
        """Create NAME.h5.part and its journal. FileError in one line when they cannot be created.

        `positions`: position of each origin after the earlier parts; other origins begin at sequence 0, other runs are
        ignored.
        `configurations`: those of the chips at the end of the previous part.
        `fsync`: durable blocks survive a power cut too; each write then waits for the disk.
        `threads`: those that pack chunks.
        `stem`: the NAME, by default that of the run's part.
        """
        stem = stem or names.stem(info.run, info.started_ns, part, info.storage)
        start_positions = {origin: position for origin, position in positions.items() if origin.run == info.run}
        self._set_up(info, part, Path(directory) / (stem + names.PART), start_positions)
        if self.final.exists():
            raise FileError(f"cannot create {self.path}: {self.final} exists")
        self._fsync = fsync
        self._wait = WAIT_FSYNC if fsync else WAIT
        self._journal = Journal(self.path.with_name(stem + names.JOURNAL), fsync=fsync)
        try:
            meta = metadata.attributes(info.run, part, info.kind)
            self._file = layout.create(self.path, info.layout, info.asic_version, meta)
        except BaseException:
            self._journal.close(remove=True)
            raise
        self._batch = Batch(self._file["packets"], info.layout.dtype.itemsize, threads)
        self._tables = Tables(self._file, self._flush)
        try:
            self._try(lambda: self._describe(configurations))
        except FileError:
            self.give_up()
            raise

    def _describe(self, configurations: CarriedConfigurations) -> None:
        tables.describe_run(self._file, self._tables, self.info, self.part, self._start_positions, configurations)
        if self._fsync:
            self._flush()
            sync_path(self.path.parent)

    @classmethod
    def resume(cls, path: Path, journal: Journal, info: RunInfo, state: UnfinishedPart) -> RunFile:
        """Continue the part of a dead writer, after recovery has repaired its superblock and locked its journal.

        Rows that belong to no block are cut. Recovery then adds the blocks that only the journal has, and closes the
        part. FileError when the disk fails; nothing is lost then from part and journal.
        """
        self = cls.__new__(cls)
        self._set_up(info, state.info["part"], path, state.start_positions)
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
        self._missing = list(state.missing)
        self._messages = state.lengths["messages"]
        self.duplicate_blocks = state.info["duplicate_blocks"]
        return self

    def _set_up(self, info: RunInfo, part: int, path: Path, start_positions: dict[BlockOrigin, int]) -> None:
        self.info = info
        self.part = part
        self.path = path
        self.duplicate_blocks = 0
        #: Position of each origin below which all blocks are durable. An end counts as the sequence that it names.
        self.durable: dict[BlockOrigin, int] = {}
        self._write_back = WriteBack(path)
        #: The name that publish() gives to the file.
        self.final = path.with_name(path.name.removesuffix(names.PART) + names.FINISHED)
        self._start_positions = start_positions
        self._accounts: dict[BlockOrigin, Account] = {}
        self._waiting: deque[WaitingFrame] = deque()
        #: When a rotation opened this part, unix ns; 0: no rotation did.
        self.rotated_in_ns = 0
        self._journaled = 0  # number of waiting frames, from the first, that are in the journal
        self._unwritten_messages: list[WaitingFrame] = []  # waiting INFO messages whose texts are not in /messages
        self._visible_rows = 0  # rows that readers of the growing file can see
        self._show_time = monotonic()  # monotonic time at which these rows were written
        self._missing: list[tuple[int, ...]] = []
        self._messages = 0
        #: Producer -> chunks that may be written before the next one whose rows are checked.
        self._may_follow: dict[str, int] = {}
        #: The producer whose packed rows were damaged although their checksum is right, so that the part cannot go on.
        self.damaged_by = ""
        self._damaged: list[str] = []  # damage that recovery found in this part, one line each
        #: Why the file cannot be written any more; empty while it can.
        self.failed = ""
        self._fsync = False
        self._unlinked = -1  # descriptor of the sealed file when its name was removed; else -1

    def positions(self) -> dict[BlockOrigin, int]:
        """Return the position of each origin of the run over all parts so far, those of earlier parts first."""
        return {origin: self.next(origin) for origin in self._start_positions | self._accounts}

    def configurations(self) -> CarriedConfigurations:
        """Return the newest configurations of the chips, for the next part."""
        waiting = [
            tables.configuration_rows(entry.frame, entry.account.index)
            for entry in self._waiting
            if isinstance(entry.frame, stream.Block) and entry.frame.configs is not None
        ]
        table = np.concatenate([self._file["run/configs"][:], *waiting])
        return CarriedConfigurations(tables.newest_configurations(table), list(self._tables.producers))

    @property
    def rows(self) -> int:
        """Rows of all blocks that were added, in the file or still waiting."""
        return self._batch.rows

    @property
    def bytes(self) -> int:
        """Present size of the file; 0 when its name was removed."""
        try:
            return os.fstat(self._unlinked).st_size if self._unlinked >= 0 else self.path.stat().st_size
        except OSError:
            return 0

    def in_place(self) -> bool:
        """Whether part and journal still have their names, by which a recovery finds them."""
        return in_place(self._descriptor(), self.path) and self._journal.in_place()

    # Incoming blocks and end records

    def add(self, block: stream.Block, rows: NDArray[Any] | None, packed: PackedRows | None = None) -> None:
        """Add a block with its rows, which have the run's layout and are copied, or with its packed rows.

        Packed rows that fill a chunk of the file are written as they are, unless the journal needs the rows. They are
        checked by their own checksum and by that of the rows when they were packed, and the first chunk of a producer
        and then every CHECKED_CHUNKS-th one is unpacked to check its rows too.
        A block that the part has already is counted as a duplicate; blocks between are counted as missing.
        ProtocolError, with nothing added, when header and rows do not belong together; ChecksumError when the rows are
        not the rows that were sent; FileError when the disk fails.
        """
        self._check_usable()
        self._check_run(block)
        if packed is not None:
            check_layout(block, self.info.layout)
            has_text = block.text is not None or block.configs is not None  # check_block() checks these
            fills_chunk = block.rows == schema.CHUNK_ROWS and not has_text and self._batch.begins_chunk
            if fills_chunk and self._may_follow.get(block.producer):
                self._add_chunk(block, packed)
                self._may_follow[block.producer] -= 1
                return
            rows = packed.unpack(block.rows, self.info.layout)
        assert rows is not None
        check_block(block, rows, self.info.layout)
        if block.sequence < self._expected(block.origin):
            self.duplicate_blocks += 1
            return
        # The copy is checked, because a producer may overwrite the rows in its ring meanwhile.
        pieces = self._batch.stage(rows.view(np.uint8))
        check_content(block, pieces, self.info.layout)
        if packed is not None:
            self._may_follow[block.producer] = CHECKED_CHUNKS - 1
        account = self._open_account(block)
        message = None
        if block.text is not None:
            rows = np.concatenate(pieces).view(rows.dtype)
            message = InfoMessage(self._messages, int(rows["timestamp"][0]))
            self._messages += len(stream.text_pieces(block.text, schema.MESSAGE_BYTES))
            rows["counter"] = np.arange(message.first, message.first + len(rows))
            pieces = self._batch.stage(rows.view(np.uint8))
            block = msgspec.structs.replace(block, crc32=crc32(rows.view(np.uint8)))
        for piece in pieces:
            hdf5_chunks.tally(piece, block.layout, account.tally)
        entry = self._enqueue_block(block, account, message)
        if message is not None:
            self._unwritten_messages.append(entry)
        self._batch.commit(block.rows)
        self._write_full_batch()

    def _add_chunk(self, block: stream.Block, packed: PackedRows) -> None:
        """Add a block whose packed rows are the next chunk of the file."""
        if block.sequence < self._expected(block.origin):
            self.duplicate_blocks += 1
            return
        if not packed.is_intact():
            raise ChecksumError(f"{describe(block)}: its packed rows are not those that were sent")
        if packed.rows_crc32 != block.crc32:
            found = f"{packed.rows_crc32:08x} when it was packed"
            raise ChecksumError(f"{describe(block)}: expected CRC-32 {block.crc32:08x}, found {found}")
        account = self._open_account(block)
        account.tally += packed.tally
        self._enqueue_block(block, account)
        self._batch.add_chunk(bytes(packed.data))
        self._write_full_batch()

    def _open_account(self, block: stream.Block) -> Account:
        """Return the account of a block's origin, which must not have ended."""
        account = self._account(block.origin)
        if account.end is not None:
            raise ProtocolError(f"{describe(block)}: comes after the end of its source")
        return account

    def _enqueue_block(self, block: stream.Block, account: Account, message: InfoMessage | None = None) -> WaitingFrame:
        self._missing += account.add_block(block.sequence, block.first_packet, block.rows)
        account.drop((gap.io_group, gap.rows) for gap in block.gaps)
        entry = WaitingFrame(block, account, self.rows, self.rows + block.rows, monotonic(), message)
        self._waiting.append(entry)
        return entry

    def end(self, end: stream.End) -> None:
        """Add the end record of an origin. An end record that the part has already is counted as a duplicate."""
        self._check_usable()
        self._check_run(end)
        check_end(end)
        account = self._accounts.get(end.origin)
        # The end record is in this part, or in an earlier one.
        if (account is not None and account.end) or end.following == self._start_positions.get(end.origin):
            self.duplicate_blocks += 1
            return
        if end.next < (expected := self._expected(end.origin)):
            raise ProtocolError(f"{describe(end)}: block {expected - 1} of it has been taken already")
        account = self._account(end.origin)
        self._missing += account.skip_to(end.next)
        account.end = end
        account.drop((gap.io_group, gap.rows) for gap in end.gaps)
        self._waiting.append(WaitingFrame(end, account, self.rows, self.rows, monotonic()))

    def _check_run(self, frame: stream.Block | stream.End) -> None:
        if frame.run != self.info.run:
            raise ProtocolError(f"{describe(frame)}: this file holds run {self.info.run}")

    def _account(self, origin: BlockOrigin) -> Account:
        account = self._accounts.get(origin)
        if account is None:
            self._try(lambda: self._tables.add_producer(origin.producer))
            account = Account(origin, self._tables.producers[origin.producer], self._start_positions.get(origin, 0))
            self._accounts[origin] = account
        return account

    def next(self, origin: BlockOrigin) -> int:
        """Return the next sequence of an origin, durable or not; an end counts as the sequence that it names."""
        account = self._accounts.get(origin)
        return self._start_positions.get(origin, 0) if account is None else account.next

    def _expected(self, origin: BlockOrigin) -> int:
        account = self._accounts.get(origin)
        return self._start_positions.get(origin, 0) if account is None else account.expected

    def _flush(self) -> None:
        """Hand all data to the kernel, in order; with `fsync` wait until the disk has them."""
        self._file.flush()
        if self._fsync:
            os.fsync(self._descriptor())

    def _descriptor(self) -> int:
        return int(self._file.id.get_vfd_handle())

    # Journal and batches

    def due(self) -> float | None:
        """Return the time.monotonic() at which work() must be called; None: not before the next frame."""
        if len(self._waiting) > self._journaled:
            return self._waiting[self._journaled].came + self._wait
        return self._show_time + SHOW_INTERVAL if self.rows > self._visible_rows else None

    def work(self, *, pressed: bool = False) -> None:
        """Write blocks that have waited long enough to the journal, and rows for readers when these are due.

        `pressed`: write all waiting blocks, because half of the stream's window is used.
        """
        self._check_usable()
        if self._is_due(pressed):
            # Once, because the journal cannot have blocks of a batch with this many full chunks (Batch.pieces).
            if self._batch.full_chunks >= chunk_writer.LEAST:
                self._try(lambda: self._write_batch(self._batch.write()))
            if self._is_due(pressed):
                self._write_journal()
        if self.rows > self._visible_rows and monotonic() >= self._show_time + SHOW_INTERVAL:
            self._try(self._show)

    def _is_due(self, pressed: bool) -> bool:
        """Whether a frame that is not in the journal has waited for WAIT, or must be written at once."""
        return len(self._waiting) > self._journaled and (
            pressed or monotonic() >= self._waiting[self._journaled].came + self._wait
        )

    def _write_journal(self) -> None:
        """Write the frames that are not in the journal there."""
        waiting = [self._waiting[i] for i in range(self._journaled, len(self._waiting))]
        records = []
        try:
            for entry in waiting:
                pieces = self._batch.pieces(entry.start, entry.stop)
                if isinstance(entry.frame, stream.Block):  # because a record with damaged rows ends a recovery
                    check_content(entry.frame, pieces, self.info.layout)
                records.append((stream.pack(entry.frame), pieces))
        except ChecksumError as error:
            self.damaged_by = entry.frame.producer
            self.failed = f"cannot be written any more: {error}"
            raise FileError(f"{self.path} {self.failed}") from None
        self._try(lambda: self._journal.append(records))
        self._journaled = len(self._waiting)
        self._acknowledge(waiting)

    def _show(self) -> None:
        for entry in self._unwritten_messages:
            self._tables.add_message(entry)
        self._unwritten_messages.clear()
        self._flush()  # so that readers never see a row of a message without its text
        self._batch.show()
        self._flush()
        self._visible_rows, self._show_time = self.rows, monotonic()

    def _acknowledge(self, done: Iterable[WaitingFrame]) -> None:
        for entry in done:
            self.durable[entry.frame.origin] = entry.frame.following

    def _write_full_batch(self) -> None:
        if self._batch.full_chunks >= chunk_writer.MOST:
            # Without waiting for the last chunks to be packed, unless the journal has blocks that may end in them.
            self._try(lambda: self._write_batch(self._batch.write(wait=self._journaled > 0)))

    def _write_batch(self, stop: int) -> None:
        """Name the blocks in /run/blocks that end before row `stop`, to which the batch has just been written."""
        done = []
        while self._waiting and self._waiting[0].stop <= stop:
            done.append(self._waiting.popleft())
        self._tables.write(done, self._missing)  # flushes the rows before it names a block
        self._write_back.advance(self.bytes)
        self._missing.clear()
        self._unwritten_messages = [entry for entry in self._waiting if entry.message is not None]
        # All frames in the journal are done, because it gets frames only while fewer than LEAST chunks are full.
        self._journaled = max(0, self._journaled - len(done))
        if not self._journaled:
            self._journal.clear()
        self._show_time = monotonic()
        self._visible_rows = max(stop, self._visible_rows)
        self._acknowledge(done)

    # Metadata and the close

    def announce(self, info: RunInfo) -> None:
        """Add the core's description of the run to a file that was opened without it; name and layout stay.

        ProtocolError when run or layout differ, FileError when the disk fails.
        """
        self._check_usable()
        if info.run != self.info.run or info.layout != self.info.layout:
            raise ProtocolError(
                f"{self.path} holds run {self.info.run} in layout {self.info.layout.name}, asked for is run {info.run}"
                f" in layout {info.layout.name}"
            )
        self.info = info
        self._try(lambda: tables.write_run_texts(self._tables, info))
        self.begin(info.begun_ns)

    def begin(self, begun_ns: int) -> None:
        """Note when RUN began, unix ns. FileError when the disk fails."""
        self._check_usable()
        self.info = self.info._replace(begun_ns=begun_ns)

        def write() -> None:
            info = self._file["run/info"][:]
            info["begun_ns"] = begun_ns
            self._file["run/info"][:] = info

        self._try(write, self._flush)

    def set_sources(self, connected: Iterable[stream.ConnectedBoard]) -> None:
        """Add boards to /run/sources, unless they are there. FileError when the disk fails."""
        self._check_usable()
        self._try(lambda: self._tables.add_sources(connected), self._flush)

    def set_text(self, name: str, text: str) -> None:
        """Add a text to /run/texts, where the newest text of a name counts. FileError when the disk fails."""
        self._check_usable()
        self._try(lambda: self._tables.add_text(name, text), self._flush)

    def add_comment(self, comment: Comment) -> None:
        """Add a comment of the e-log to /run/texts. FileError when the disk fails."""
        self.set_text(layout.E_LOG, msgspec.json.encode(comment).decode())

    def close(self, **how: Any) -> CloseReport:
        """Seal and publish the file, which waits for the disk. `how`: arguments of seal()."""
        report = self.seal(**how)
        return report._replace(path=self.publish())

    def seal(
        self,
        *,
        aborted: bool = False,
        continued: bool = False,
        texts: Mapping[str, str] | None = None,
        ended_ns: int = 0,
        rotated_out_ns: int = 0,
        damaged: Iterable[str] = (),
        known: Mapping[str, int] = {},
    ) -> CloseReport:
        """Write the waiting rows, the totals and the condition; the file is then complete, and needs only publish().

        aborted: the run was aborted; continued: the run continues in another part; texts: further texts for /run/texts,
        such as "next part"; ended_ns: when RUN ended, unix ns; 0: not yet, or unknown; rotated_out_ns: when a rotation
        opened the next part, unix ns; 0: no rotation did; damaged: lines about damage of the files whose blocks were
        added; known: columns of /run/info that are taken from those files.
        FileError when the disk fails: part and journal then stay for recovery.
        """
        self._check_usable()
        self._damaged += damaged
        accounts = list(self._accounts.values())
        condition, reasons = ledger.verdict(
            accounts,
            self.info.required_producers,
            aborted=aborted,
            continued=continued,
            before=self._start_positions,
            damaged=self._damaged,
        )

        def finish() -> None:
            self._write_batch(self._batch.write_all())
            for name, text in (texts or {}).items():
                self._tables.add_text(name, text)
            if unread := self._batch.unread_chunks:
                self._tables.add_text(layout.UNREAD, str(unread))
            for name, lines in (("damaged", self._damaged), ("reason", reasons)):
                for line in lines:
                    self._tables.add_text(name, line)
            for account in accounts:
                if account.end is None:
                    self._tables.append("ledger/counts", account.counts())
            self._tables.set_positions(
                {
                    origin: (self._start_positions.get(origin, 0), position)
                    for origin, position in self.positions().items()
                }
            )
            info = self._file["run/info"][:]
            info["condition"], info["closed_ns"] = condition, time.time_ns()
            if "ended_ns" in info.dtype.names:  # absent in a part of an earlier version
                info["ended_ns"] = ended_ns
                info["live_ns"] = live_ns(
                    self._file, info[0], rotated_in_ns=self.rotated_in_ns, rotated_out_ns=rotated_out_ns
                )
            info["rows"], info["blocks"] = self.rows, self._tables.blocks
            info["duplicate_blocks"] = self.duplicate_blocks
            info["missing_blocks"] = sum(account.missing_blocks for account in accounts)
            for name, value in known.items():
                info[name] = value
            self._file["run/info"][:] = info
            if not in_place(self._descriptor(), self.path):
                self._unlinked = os.dup(self._descriptor())
            seal_file(self._file)

        self._try(finish)
        self.failed = "is closed"
        return CloseReport(self.path, self.rows, self.bytes, condition, reasons, self._batch.unread_chunks)

    def publish(self) -> Path:
        """Sync the sealed file, give it its final name, and remove the journal. May run in another thread.

        FileError when the disk fails or the name is taken: part and journal then stay.
        """
        try:
            if self._unlinked >= 0:
                restore_name(self._unlinked, self.path)
                self._close_unlinked()
            publish_file(self.path, self.final)
        except FileError:
            if not self.is_unlinked:
                self.abandon()
            raise
        self.path = self.final
        self._journal.close(remove=True)
        return self.path

    @property
    def is_unlinked(self) -> bool:
        """Whether the sealed file has lost its name; publish() restores the name, and may be called again."""
        return self._unlinked >= 0

    def _close_unlinked(self) -> None:
        if self._unlinked >= 0:
            os.close(self._unlinked)
            self._unlinked = -1

    def tally(self) -> NDArray[np.uint64]:
        """Count all rows by kind, from the rows themselves: shape (len(hdf5_chunks.TALLY),)."""
        tallies = [account.tally.sum(axis=0) for account in self._accounts.values()]
        return np.sum([np.zeros(len(hdf5_chunks.TALLY), np.uint64), *tallies], axis=0, dtype=np.uint64)

    def note_damage(self, line: str) -> None:
        """Note data that cannot come into this file, in one line; its condition is then INCOMPLETE at best."""
        self._damaged.append(line)

    def remove(self) -> None:
        """Close the file without writing to it, and remove part and journal, because all data are elsewhere too."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._journal.close(remove=True)  # after the part, which its lock protects
        self.abandon()

    def discard(self) -> None:
        """Remove the file of a cancelled run, which must have no rows (FileError)."""
        self._check_usable()
        if self.rows:
            raise FileError(f"{self.path} is not removed: it holds {self.rows} rows")
        self._file.close()
        self.path.unlink()
        self._journal.close(remove=True)
        self.failed = "is removed"

    def abandon(self) -> None:
        """Close the file without writing to it, and release the lock; part and journal stay for recovery.

        Harmless when repeated, or after a failure of the disk: acknowledged blocks are in part and journal.
        """
        self.failed = self.failed or "is closed"
        self._close_unlinked()
        # The HDF5 library writes its cache when it closes a file, at the latest when this process ends. By then the
        # file may have been recovered. So its descriptor is replaced by one of a file in memory.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            memory_file = os.memfd_create("larpixdaq", os.MFD_CLOEXEC)
            try:
                os.dup2(memory_file, self._descriptor(), inheritable=False)
            finally:
                os.close(memory_file)
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._file.close()
        self._journal.close()

    def give_up(self) -> None:
        """Call abandon() after a failure, and remove part and journal when no block was acknowledged."""
        self.abandon()
        if not self.durable:
            for path in (self.path, self._journal.path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _check_usable(self) -> None:
        if self.failed:
            raise FileError(f"{self.path} {self.failed}")

    def _try(self, *steps: Callable[[], None]) -> None:
        """Call functions that write to the disk. After a failure nothing more is written, because recovery follows."""
        try:
            for step in steps:
                step()
        except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
            self.failed = f"cannot be written any more: {cause(error)}"
            raise FileError(f"{self.path} {self.failed}") from error


def live_ns(file: Any, info: Any, *, rotated_in_ns: int, rotated_out_ns: int) -> int:
    """Compute for how long RUN was recorded in this part, ns, without the times in which rows were dropped.

    `info`: the row of /run/info with all times. `rotated_in_ns`, `rotated_out_ns`: when a rotation opened this part and
    the next part, unix ns; 0: no rotation did. A part that no rotation opened begins at its opening, or with its first
    block if that is earlier. A part that no rotation closed ends with RUN, or else with its last block.
    """
    table = file["run/blocks"]
    if not info["begun_ns"] or not table.shape[0]:
        return 0
    first, last = int(table[0]["first_ns"]), int(table[-1]["last_ns"])
    # A storage that lags behind its producers rotates between old data, so that the times of these data count.
    start = rotated_in_ns if rotated_in_ns and rotated_in_ns - first < _LAG_NS else min(first, int(info["opened_ns"]))
    start = max(start, int(info["begun_ns"]))
    stop = int(info["ended_ns"]) or (rotated_out_ns if rotated_out_ns and rotated_out_ns - last < _LAG_NS else last)
    return live_between(start, stop, file["ledger/gaps"][:])


def live_between(start: int, stop: int, gaps: NDArray[Any]) -> int:
    """Return the ns between two times without those in which rows were dropped. `gaps`: rows of /ledger/gaps."""
    live, at = max(0, stop - start), start
    for begin, end in np.sort(gaps, order="first_ns")[["first_ns", "last_ns"]].tolist():
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
    for group in {"_header", "meta"} & set(file):  # a part of an earlier version has no /meta
        file[group].attrs.modify("modified", np.float64(time.time()))
    file.flush()
    file.close()


def sync_path(path: Path) -> None:
    """Wait until the disk has the content of a file, or the entries of a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def restore_name(file: int, part: Path) -> None:
    """Copy an open file whose name was removed to that name. FileError when the copy fails."""
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
            # The file system has no hard links: an empty file takes the name, and the rename replaces it.
            os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            os.rename(part, final)
        else:
            sync_path(final.parent)
            os.unlink(part)
        sync_path(final.parent)
    except OSError as error:
        raise FileError(f"cannot rename {part} to {final.name}: {error.strerror}") from None


class UnfinishedPart(NamedTuple):
    """Content of a part whose writer died, as recovery has read it."""

    info: dict[str, Any]  # the row of /run/info
    texts: dict[str, list[str]]
    sealed: bool  # the part was closed, and only its final name is missing
    start_positions: dict[BlockOrigin, int]  # positions when the part was opened
    accounts: dict[BlockOrigin, Account]
    producers: list[str]
    rows: int  # rows of /packets that belong to blocks
    cut: int  # rows of /packets that belong to no block
    lengths: dict[str, int]  # table -> number of its rows that belong to blocks and ends
    missing: list[tuple[int, ...]]  # rows that /run/missing lacks
    damaged: list[str]  # damaged rows that stay in the file, one line each
    lost: list[str]  # data that are cut although they had been written completely, one line each
