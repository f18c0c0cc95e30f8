"""Delivers a producer's blocks: owns ring, spool, the blocks of predecessors, and the stream to the consumers."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import tempfile
import time
from functools import partial
from pathlib import Path

import zmq

from larpixdaq.buffer.block_store import BlockStore
from larpixdaq.buffer.crash_recovery import LeftBlocks, Predecessors
from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY, Reserved, RingFile, name_prefix
from larpixdaq.buffer.spool import RETRY_INTERVAL, Spool, SpoolDirectory
from larpixdaq.errors import FileError
from larpixdaq.keys.curve import Admission
from larpixdaq.protocol.reports import DeliveryStatus, EpochEnd
from larpixdaq.protocol.stream import End
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.file_access import has_no_locks, no_locks_error, remove, try_lock
from larpixdaq.runtime.units import parse_duration, parse_size
from larpixdaq.stream.publisher import Publisher

log = logging.getLogger(__name__)

#: Seconds between two searches for files of dead producers of this name.
LOOK_INTERVAL = 5.0
#: Seconds between two checks whether the files of ring and spool still have their names.
NAMES_INTERVAL = 0.5
#: Maximum seconds for which an ending producer still delivers pending blocks.
DELIVER_LIMIT = 2.0
#: Maximum seconds that an ending producer waits for the spool's disk.
SPOOL_LIMIT = 2.0
#: Maximum number of runs whose end records of predecessors are kept.
RUNS_KEPT = 64


class Delivery:
    """Delivers the blocks of `ring`, and those of predecessors, and moves them to the spool when the ring is full.

    All is done by work(), in the producer's loop; a thread uses the spool's disk.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        state_dir: Path,
        epoch: int,
        socket: zmq.Socket[bytes],
        *,
        spill: bool,
        listening_ns: int,
        admission: Admission | None = None,
    ) -> None:
        """`socket`: the bound ROUTER of the stream; `admission`: which consumers may subscribe (None: all).

        `spill`: blocks move to the spool when the ring is nearly full; `listening_ns`: unix ns when this producer began
        to read its boards.

        RingError or FileError when the ring or the spool cannot be made.
        """
        self.name: str = options.name
        self.epoch = epoch
        self.worker = Worker(f"spool of {self.name}")
        path = options.spool_dir or state_dir / "spool"
        if options.spool_limit:
            _check_spool_directory(path)
        self.spool = SpoolDirectory(path, name_prefix(state_dir, self.name), options.spool_limit, self.worker)
        self._predecessors = Predecessors(self.name, state_dir, options.ring_dir, self.spool, listening_ns)
        self._known_epochs = {epoch}
        self._ends: dict[int, dict[int, End]] = {}  # run -> epoch -> END of a predecessor
        self._looking = False
        self._look_at = time.monotonic() + LOOK_INTERVAL
        self._check_names_at = 0.0
        self._ring_replacements = 0  # rings whose file somebody had removed
        #: Why close() could not keep pending blocks; empty when it kept all.
        self.failure = ""
        self._closed = False
        self._messages: list[str] = []
        # Before the own ring is made, because that may need the memory which this gives back.
        inherited = self._adopt(self._predecessors.take_over(self._known_epochs))
        self.ring_file = RingFile.make(options.ring_dir, state_dir, self.name, epoch, options.ring)
        self.ring = self.ring_file.ring
        spools = spill and options.spool_limit
        self._spool_limit: int = options.spool_limit if spools else 0
        self.own = BlockStore(self.name, epoch, self.ring, Spool(self.spool) if spools else None, self.ring_file)
        self.publisher = Publisher(self.own, socket, forget_after=options.forget_after, admission=admission)
        for store in inherited:
            self.publisher.adopt(store)

    def fileno(self) -> int:
        """Polls readable while work() has results of the spool's thread to take."""
        return self.worker.fileno()

    def work(self, *, spool_ready: bool = True) -> None:
        """Take one turn: deliver blocks, note acknowledgements, check file names, look for predecessors.

        `spool_ready`: fileno() may be readable.
        """
        while self._messages:  # now, because the constructor runs before the log's connection is open
            log.warning(self._messages.pop())
        if spool_ready:
            self.worker.turn()
        self.publisher.work()
        self.ring.mark_alive(time.time_ns())
        now = time.monotonic()
        if now >= self._check_names_at:
            self._check_names_at = now + NAMES_INTERVAL
            self._renew_names()
        if not self._looking and now >= self._look_at:
            self._looking = True
            self.worker.submit(lambda: self._predecessors.take_over(self._known_epochs), self._take_over)

    def _take_over(self, left: list[LeftBlocks] | OSError) -> None:
        self._looking = False
        self._look_at = time.monotonic() + LOOK_INTERVAL
        if not isinstance(left, OSError):
            for store in self._adopt(left):
                self.publisher.adopt(store)

    @property
    def _ring_files(self) -> list[RingFile]:
        ring_files = (store.ring_file for store in self.publisher.stores)
        return [ring_file for ring_file in ring_files if ring_file is not None and ring_file.held]

    def _renew_names(self) -> None:
        """Give new files to rings and spool files whose names were removed, because a successor could not find them.

        Names are removed by `rm`, and by logind when the user's last session ends (RemoveIPC).
        """
        for ring_file in self._ring_files:
            if not ring_file.in_place() and not ring_file.moving and time.monotonic() >= ring_file.retry_at:
                ring_file.moving = True
                self.worker.submit(ring_file.reserve, partial(self._move_ring, ring_file))
        for store in self.publisher.stores:
            if store.spool is not None:
                store.spool.renew_names()

    def _move_ring(self, ring_file: RingFile, new: Reserved | OSError) -> None:
        """Move a ring to its new file, unless that could not be made."""
        ring_file.moving = False
        try:
            if isinstance(new, OSError):
                raise new
            if not ring_file.held:  # its last block was stored meanwhile
                remove(new.file, new.path)
                os.close(new.file)
                return
            old = ring_file.move_to(new)
        except OSError as error:
            ring_file.retry_at = time.monotonic() + RETRY_INTERVAL
            if ring_file.name_error != (text := error.strerror or str(error)):
                ring_file.name_error = text
                log.error(
                    "%s: the ring's file was removed, and there is no new one yet: %s; what the ring holds "
                    "would be lost if this process were killed; tried again every %g s",
                    ring_file.path, text, RETRY_INTERVAL,
                )  # fmt: skip
            return
        self.worker.submit(lambda: os.close(old), lambda _: None)
        ring_file.name_error = ""
        self._ring_replacements += 1
        if ring_file is self.ring_file:
            self.publisher.ring_moved()
        log.warning("%s: the ring's file was removed; it has been replaced, and nothing is lost", ring_file.path)

    def _save_names(self) -> None:
        """Give names, before the process ends, to files without: in the ring's own directory, else in the spool's."""
        self.ring_file.grows = False
        for ring_file in self._ring_files:
            ring_file.retry_at = 0.0
        for store in self.publisher.stores:
            if store.spool is not None:
                store.spool.retry_names()
        self._renew_names()
        self.worker.drain(SPOOL_LIMIT)
        for ring_file in self._ring_files:
            if not ring_file.in_place():
                path = self.spool.path / ring_file.path.name
                try:
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    os.close(ring_file.move_to(ring_file.reserve(path)))
                    log.warning("the ring's file was removed: what it holds is kept in %s", path)
                except OSError as error:
                    text = error.strerror or str(error)
                    old = ring_file.path
                    self.failure = f"{old} was removed, and what it holds could not be kept in {path}: {text}"
        for store in self.publisher.stores:
            if store.spool is not None and (reason := store.spool.name_error):
                self.failure = f"a file of the spool was removed, and could not be written anew: {reason}"

    def _adopt(self, left: list[LeftBlocks]) -> list[BlockStore]:
        """Note the end records of predecessors; return the stores of those with pending blocks."""
        stores = []
        for blocks in left:
            epoch = blocks.epoch
            self._known_epochs.add(epoch)
            store = BlockStore.inherited(self.name, blocks, self.spool)
            if pending := store.pending():
                text = f"{self.name}: taking over {pending} pending blocks of a predecessor (epoch {epoch:x})"
                self._messages.append(text)
                stores.append(store)
            else:
                store.close()
            for run, end in blocks.ends.items():
                self._ends.setdefault(run, {})[epoch] = end
        while len(self._ends) > RUNS_KEPT:
            del self._ends[min(self._ends)]
        return stores

    def inherited(self, run: int) -> list[EpochEnd]:
        """Return the totals of predecessors in a run, from the end records in their rings."""
        return [EpochEnd.of(end) for end in self._ends.get(run, {}).values()]

    def close(self, *, leave: bool = False) -> None:
        """Deliver pending blocks for DELIVER_LIMIT seconds, and keep the rest for the next producer of this name.

        `leave`: deliver nothing, keep all. Harmless when repeated.
        """
        if self._closed:
            return
        self._closed = True
        publisher = self.publisher
        deadline = time.monotonic() + (0 if leave else DELIVER_LIMIT)
        # Also without a subscribed storage, because one may be connecting again.
        while publisher.pending() and time.monotonic() < deadline:
            publisher.socket.poll(0 if publisher.unsent else 20)
            self.worker.turn()
            publisher.work()
        self.worker.drain(SPOOL_LIMIT)
        pending = publisher.pending()
        if pending or leave:
            self._save_names()
        if pending and not leave and not self.failure:
            log.error(
                "%s ends; %d blocks are not stored yet: they are kept, the next start under this name delivers them",
                self.name, pending,
            )  # fmt: skip
        if leave or self.own.pending():
            self.ring_file.leave()
        else:
            self.own.close()
        # If the thread hangs with its disk, it may still use these files, so they stay open until the process ends.
        if self.worker.close(SPOOL_LIMIT):
            for store in self.publisher.stores:
                store.leave()

    def status(self) -> DeliveryStatus:
        stores = self.publisher.stores
        spools = [store.spool for store in stores if store.spool is not None]
        connections, frames, limits = self.publisher.refusals()
        return DeliveryStatus(
            ring=round(self.ring.fill, 4),
            owed_blocks=self.publisher.pending(),
            inherited=self.publisher.inherited(),
            spooled_blocks=sum(store.spooled_blocks() for store in stores),
            spooled_bytes=self.spool.bytes,
            spool_limit=self._spool_limit,
            nameless=[
                f"{ring_file.path}: {ring_file.name_error}" for ring_file in self._ring_files if ring_file.name_error
            ]
            + [spool.name_error for spool in spools if spool.name_error],
            made_anew=self._ring_replacements,
            kept_aside=[str(path) for path in self._predecessors.kept_aside],
            forgotten=sorted(self.publisher.forgotten),
            subscribers=sorted(s.name for s in self.publisher.subscribers.values()),
            refused_connections=connections,
            refused_frames=frames,
            limits=limits,
        )


def _check_spool_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--spool-dir {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"--spool-dir {path}: not writable")
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise FileError(f"--spool-dir {path}: every user may remove files there (mode {stat.S_IMODE(mode):o})")
    with tempfile.TemporaryFile(dir=path) as probe:
        try:
            try_lock(probe.fileno())
        except OSError as error:
            if has_no_locks(error):
                raise no_locks_error(path, error, "--spool-dir") from None
            raise FileError(f"--spool-dir {path}: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ring, spool and stream."""
    parser.add_argument(
        "--ring", type=parse_size, default="512MiB", metavar="SIZE",
        help="memory for rows that storages have not acknowledged yet (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ring-dir", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR",
        help="where the ring's file is made; a memory file system (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--when-full", choices=("spill", "wait"),
        help="what to do when storages are slower than the boards and the ring is full: spill (the oldest blocks go to "
        "the spool on disk; when that is full too, rows are counted and dropped) or wait (stop reading); default: "
        "spill for --pacman, --bern and IO classes, which publish regardless, wait for the rest",
    )  # fmt: skip
    parser.add_argument(
        "--spool-limit", type=parse_size, default="8GiB", metavar="SIZE",
        help="disk space that the spool may take (default: %(default)s; 0: no spool)",
    )  # fmt: skip
    parser.add_argument(
        "--spool-dir",
        type=Path,
        metavar="DIR",
        help="where the spool's files are made (default: spool/ in --state-dir)",
    )
    parser.add_argument(
        "--forget-after", type=parse_duration, default="60s", metavar="TIME",
        help="blocks that another storage of the run has are no longer kept for a storage that has been disconnected, "
        "or has acknowledged nothing, for this long: 30s, 5min, 2h (default: %(default)s)",
    )  # fmt: skip
