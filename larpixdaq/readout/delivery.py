"""The blocks of a producer until they are stored: ring, spool, blocks of predecessors, and the stream to storages."""

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
from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY, Reserved, RingFile, key
from larpixdaq.buffer.spool import AGAIN, Spool, SpoolDirectory
from larpixdaq.errors import FileError
from larpixdaq.protocol.reports import DeliveryStatus, EpochEnd
from larpixdaq.protocol.stream import End
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.file_access import has_no_locks, no_locks, remove, try_lock
from larpixdaq.runtime.units import parse_duration, parse_size
from larpixdaq.stream import Publisher

log = logging.getLogger(__name__)

#: What others of this name have left is looked for so often (seconds).
LOOK = 5.0
#: Seconds between two looks whether the files of ring and spool still have their names.
NAMES = 0.5
#: A producer that is told to end goes on delivering for so long (seconds).
DELIVER_LIMIT = 2.0
#: The spool's disk gets so long to do what it was given (seconds).
SPOOL_LIMIT = 2.0
#: Runs whose inherited totals are kept.
RUNS_KEPT = 64


class Delivery:
    """`ring` takes this producer's blocks; work() delivers them, spills them, and takes over blocks of predecessors."""

    def __init__(
        self,
        options: argparse.Namespace,
        state_dir: Path,
        epoch: int,
        socket: zmq.Socket[bytes],
        *,
        spill: bool,
        listening_ns: int,
    ) -> None:
        """`socket`: the bound ROUTER of the stream; `spill`: blocks go to the spool when the ring is full;
        `listening_ns`: unix ns when this producer began to listen to its boards.

        Raises RingError or FileError when the ring or the spool cannot be made.
        """
        self.name: str = options.name
        self.epoch = epoch
        self.worker = Worker(f"spool of {self.name}")
        path = options.spool_dir or state_dir / "spool"
        if options.spool_limit:
            _usable(path)
        self.spool = SpoolDirectory(path, key(state_dir, self.name), options.spool_limit, self.worker)
        self._predecessors = Predecessors(self.name, state_dir, options.ring_dir, self.spool, listening_ns)
        self._known = {epoch}
        self._ends: dict[int, dict[int, End]] = {}  # run -> epoch -> END of a predecessor
        self._looking = False
        self._look_at = time.monotonic() + LOOK
        self._names_at = 0.0
        self._made_anew = 0  # rings whose file somebody had removed
        #: Why something that is owed could not be kept by close(); empty when all was.
        self.failure = ""
        self._closed = False
        self._news: list[str] = []
        inherited = self._adopt(self._predecessors.look(self._known))  # before the own ring, which may need the room
        self.arena = RingFile.make(options.ring_dir, state_dir, self.name, epoch, options.ring)
        self.ring = self.arena.ring
        spools = spill and options.spool_limit
        self.own = BlockStore(self.name, epoch, self.ring, Spool(self.spool) if spools else None)
        ring = str(self.arena.path.absolute())
        self.publisher = Publisher(self.own, socket, forget_after=options.forget_after, ring=ring)
        for store in inherited:
            self.publisher.adopt(store)

    def fileno(self) -> int:
        """Polls readable while work() has something from the spool."""
        return self.worker.fileno()

    def work(self) -> None:
        while self._news:  # not before the log is there
            log.warning(self._news.pop())
        self.worker.turn()
        self.publisher.work()
        self.ring.alive(time.time_ns())
        if time.monotonic() >= self._names_at:
            self._names_at = time.monotonic() + NAMES
            self._keep_names()
        if not self._looking and time.monotonic() >= self._look_at:
            self._looking = True
            self.worker.submit(lambda: self._predecessors.look(self._known), self._found)

    def _found(self, left: list[LeftBlocks] | OSError) -> None:
        self._looking = False
        self._look_at = time.monotonic() + LOOK
        if not isinstance(left, OSError):
            for store in self._adopt(left):
                self.publisher.adopt(store)

    @property
    def _arenas(self) -> list[RingFile]:
        arenas = [*(store.arena for store in self.publisher.stores if store.arena is not None), self.arena]
        return [arena for arena in arenas if arena.held]

    def _keep_names(self) -> None:
        """Rings and spool files whose names somebody has removed get new files, because a successor could not find what
        they hold. `rm` removes names, and logind when the user's last session ends (RemoveIPC)."""
        for arena in self._arenas:
            if not arena.in_place() and not arena.moving and time.monotonic() >= arena.again_at:
                arena.moving = True
                self.worker.submit(arena.reserve, partial(self._move, arena))
        for store in self.publisher.stores:
            if store.spool is not None:
                store.spool.keep_names()

    def _move(self, arena: RingFile, new: Reserved | OSError) -> None:
        """The new file of a ring is there, or could not be made."""
        arena.moving = False
        try:
            if isinstance(new, OSError):
                raise new
            if not arena.held:  # its last block was stored meanwhile
                remove(new.file, new.path)
                os.close(new.file)
                return
            old = arena.move_to(new)
        except OSError as error:
            arena.again_at = time.monotonic() + AGAIN
            if arena.nameless != (text := error.strerror or str(error)):
                arena.nameless = text
                log.error(
                    "%s: somebody has removed the ring's file, and there is no new one yet: %s; what the ring holds "
                    "would be lost if this process were killed; tried again every %g s", arena.path, text, AGAIN,
                )  # fmt: skip
            return
        self.worker.submit(lambda: os.close(old), lambda _: None)
        arena.nameless = ""
        self._made_anew += 1
        if arena is self.arena:
            self.publisher.ring_moved()
        log.warning("%s: somebody has removed the ring's file: it was made anew, nothing is lost", arena.path)

    def _save_names(self) -> None:
        """The last chance for what has no name: the ring's own directory, then that of the spool."""
        self.arena.grows = False
        for arena in self._arenas:
            arena.again_at = 0.0
        for store in self.publisher.stores:
            if store.spool is not None:
                store.spool.try_names_again()
        self._keep_names()
        self.worker.settle(SPOOL_LIMIT)
        for arena in self._arenas:
            if not arena.in_place():
                path = self.spool.path / arena.path.name
                try:
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    os.close(arena.move_to(arena.reserve(path)))
                    log.warning("the ring's file was removed: what it holds is kept in %s", path)
                except OSError as error:
                    text = error.strerror or str(error)
                    self.failure = f"{arena.path} was removed, and what it holds could not be kept in {path}: {text}"
        for store in self.publisher.stores:
            if store.spool is not None and store.spool.nameless:
                self.failure = f"a file of the spool was removed, and could not be written anew: {store.spool.nameless}"

    def _adopt(self, left: list[LeftBlocks]) -> list[BlockStore]:
        """Note the end records of predecessors; returns their blocks that are not stored yet."""
        found = []
        for epoch, arena, files, ends in left:
            self._known.add(epoch)
            store = BlockStore.inherited(self.name, epoch, arena, Spool(self.spool, files) if files else None)
            if owed := store.owed():
                self._news.append(f"{self.name}: taking over {owed} pending blocks of a predecessor (epoch {epoch:x})")
                found.append(store)
            else:
                store.close()
            for run, end in ends.items():
                self._ends.setdefault(run, {})[epoch] = end
        while len(self._ends) > RUNS_KEPT:
            del self._ends[min(self._ends)]
        return found

    def inherited(self, run: int) -> list[EpochEnd]:
        """Return the totals of predecessors in a run, from the end records that were in their rings."""
        return [EpochEnd.of(end) for end in self._ends.get(run, {}).values()]

    def close(self, *, leave: bool = False) -> None:
        """Deliver what is owed, for DELIVER_LIMIT at most; what is left then is kept for the next of this name.

        leave: nothing is delivered any more, all is kept.
        """
        if self._closed:
            return
        self._closed = True
        publisher = self.publisher
        deadline = time.monotonic() + (0 if leave else DELIVER_LIMIT)
        # A storage that is not subscribed now may be on its way back.
        while publisher.owed() and time.monotonic() < deadline:
            publisher.socket.poll(20)
            self.worker.turn()
            publisher.work()
        self.worker.settle(SPOOL_LIMIT)
        owed = publisher.owed()
        if owed or leave:
            self._save_names()
        if owed and not leave and not self.failure:
            log.error(
                "%s ends; %d blocks are not stored yet: they are kept, the next start under this name delivers them",
                self.name, owed,
            )  # fmt: skip
        if leave or self.own.owed():
            self.arena.leave()
        else:
            self.own.close()
            self.arena.close()
        # A thread that hangs with its disk may still close these files by itself: then they go with the process.
        if self.worker.close(SPOOL_LIMIT):
            for store in self.publisher.stores:
                store.leave()

    def status(self) -> DeliveryStatus:
        stores = self.publisher.stores
        spools = [store.spool for store in stores if store.spool is not None]
        return DeliveryStatus(
            ring=round(self.ring.fill, 4),
            owed_blocks=self.publisher.owed(),
            inherited=self.publisher.inherited(),
            spooled_blocks=sum(store.spooled() for store in stores),
            spooled_bytes=self.spool.bytes,
            nameless=[f"{arena.path}: {arena.nameless}" for arena in self._arenas if arena.nameless]
            + [spool.nameless for spool in spools if spool.nameless],
            made_anew=self._made_anew,
            kept_aside=[str(path) for path in self._predecessors.aside],
            forgotten=sorted(self.publisher.forgotten),
            subscribers=sorted(s.name for s in self.publisher.subscribers.values()),
        )


def _usable(path: Path) -> None:
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
                raise no_locks(path, error, "--spool-dir") from None
            raise FileError(f"--spool-dir {path}: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ring, spool and stream."""
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
        help="blocks that another storage of the run has are no longer kept for a storage that has been disconnected "
        "for this long: 30s, 5min, 2h (default: %(default)s)",
    )  # fmt: skip
