"""Offline storage: writes the blocks of a run into LArPix+HDF5 files. `larpixdaq-offline-storage -o /data`."""

import sys

if __spec__ is None:  # run by its path: its folder would shadow the standard library's `operator`
    sys.path[0:1] = []

import argparse
import functools
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq

from larpixdaq import config
from larpixdaq.control.node import Call, Node
from larpixdaq.errors import ComponentError, FileError, RequestError, UsageError
from larpixdaq.hdf5.names import highest_run
from larpixdaq.protocol.reports import StorageStatus
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import parse_whole
from larpixdaq.storage.directory_lock import Lock, await_turn
from larpixdaq.storage.limits import Limits, parse_limit
from larpixdaq.storage.service import StorageService
from larpixdaq.storage.sidecar import parse_template
from larpixdaq.stream import Consumer, jetstream
from larpixdaq.stream.subscriber import SessionCheck

if TYPE_CHECKING:
    from larpixdaq.storage.turn import Turn
    from larpixdaq.stream.downlink import Downlink

_log = logging.getLogger("larpixdaq.offline_storage")

DEFAULT_NAME = "Offline storage"
#: Maximum frames that one turn of the loop takes from the stream.
TURN_FRAMES: Final = 64
#: Maximum number of packing threads without --threads: one packs some 50 M rows/s, and the main thread takes as many.
DEFAULT_THREADS: Final = 3
MAX_THREADS: Final = 64
#: Milliseconds between two checks whether the core has answered, after the process stood still.
CHECK_MS: Final = 10


class Storage:
    """The storage process: connects a StorageService with the core, the stream and the disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.directory = _check_directory(options.output_dir)
        lock_directory.use(options.lock_dir, options.state_dir)
        name: str = options.name
        label = "" if name == DEFAULT_NAME else name
        self._lock = Lock(self.directory, label)
        self.service = StorageService(
            self.directory,
            name,
            label,
            limits=Limits.of(options.rotate),
            on_close=options.on_close,
            fsync=options.durability == "fsync",
            threads=options.threads or default_threads(),
            raw=options.raw,
            template=options.name_template,
        )
        self._info: dict[str, Any] = {"directory": str(self.directory.resolve())}
        brokers = jetstream.brokers_of(options)
        if options.standby and brokers is None:
            raise UsageError("--standby: expected --stream with it; without, a storage of the same directory waits")
        self._turn_of_name: Turn | None = None
        self._downlink: Downlink | None = None
        if brokers is not None:
            self._info["brokers"] = str(brokers)
            self._turn_of_name, self._downlink = self._at_brokers(brokers, options)
        self.node = Node(
            name,
            "storage",
            options.core,
            {
                "prepare_run": self.service.prepare_run if brokers is None else self._prepare_run(),
                "begin_run": self.service.begin_run,
                "end_run": self.service.end_run,
                "report_run": self.service.report_run,
                "cancel_run": self.service.cancel_run,
                "add_comments": self.service.add_comments,
            },
            info=self._info,
            status=self._status,
            on_name_taken=self._name_taken,
            module=options.module,
            insecure=options.insecure,
        )
        self.consumer = self._downlink or Consumer(
            name, self.node.session, "all", positions=self.service.positions, core=self.node
        )
        self._session_check = SessionCheck(self.node)
        self._may_write = True  # result of the last _check_session()
        self._frames = 0
        self._changes = -1

    def _at_brokers(self, brokers: jetstream.Brokers, options: argparse.Namespace) -> "tuple[Turn, Downlink]":
        from larpixdaq.storage.turn import Turn  # late, because other storages need no asyncio
        from larpixdaq.stream.downlink import Downlink

        service, name = self.service, options.name
        turn = Turn(brokers, name, standby=options.standby)
        downlink = Downlink(
            name,
            "all",
            brokers,
            directory=self.directory,
            newest_run=service.newest_run,
            has_run=service.has_run,
            holds=turn.holds,
        )
        return turn, downlink

    def run(self, signals: Signals) -> None:
        """Write and acknowledge blocks until a signal comes."""
        highest = 0
        if self._turn_of_name is not None:
            if not self._turn_of_name.wait(signals):
                return
            highest = self._turn_of_name.highest_run()
        if not await_turn(self._lock, signals):
            return
        highest = max(highest, highest_run(self.directory))
        self._info |= {"highest_run": highest, "free_bytes": self.service.space.free()}
        self.node.connect(signals=signals)
        self.service.resume()  # after connect(), so that errors of files reach the log
        poller, without_stream = zmq.Poller(), zmq.Poller()
        for descriptor in (signals, self.node, self.consumer, self.service.finisher):
            poller.register(descriptor.fileno(), zmq.POLLIN)
        for descriptor in (signals, self.node):
            without_stream.register(descriptor.fileno(), zmq.POLLIN)
        while not signals.stop:
            if self._may_write:
                poller.poll(0 if self.consumer.queued else self.node.wait_ms(self.service.due()))
            else:
                without_stream.poll(CHECK_MS)
            self._turn()

    def _turn(self) -> None:
        self.node.dispatch()
        self._lock.keep()
        if self.node.changes != self._changes:
            self._changes = self.node.changes
            self.consumer.session = self.node.session
            self.consumer.connect(self.node.producers)
        for _ in range(TURN_FRAMES):
            received = self.consumer.next() if self._check_session() else None
            if received is None:
                break
            self._frames += 1
            self.service.receive(*received)
            self.service.report_to(self.consumer)
        if self._check_session():
            self.service.work()
            self.service.report_to(self.consumer)
        self.consumer.rest(self.service.calm)
        self.node.report(self._frames, self.consumer.queued)

    def _check_session(self) -> bool:
        """Whether this process may write and acknowledge: after a standstill not before the core has answered, and with
        --stream only while it has the lease of its name."""
        previous, self._may_write = self._may_write, self._session_check.may_act()
        if previous and not self._may_write:
            _log.warning("stalled for %.1f s; waiting for the core to confirm", self._session_check.stall)
        if self._turn_of_name is not None and not self._turn_of_name.holds():
            if self._turn_of_name.lost_to:
                self._name_taken()
            if previous and self._may_write:
                _log.warning("writing waits: %s", self._turn_of_name.problem)
            self._may_write = False
        if self._may_write and not previous:
            self.consumer.resubscribe()
        return self._may_write

    def _prepare_run(self) -> Any:
        """Return the action prepare_run of a storage that reads its data at the brokers."""
        prepare = self.service.prepare_run
        downlink = self._downlink
        assert downlink is not None

        @functools.wraps(prepare)
        def prepare_run(call: Call, run: int, **params: Any) -> Any:
            if downlink.problem and not params.get("begun_ns"):
                raise ComponentError(downlink.problem)
            is_new = not self.service.has_run(run)
            ready = prepare(call, run, **params)
            if is_new:
                downlink.begin(run, params["producers"])
            return ready

        return prepare_run

    def _status(self) -> StorageStatus:
        status = self.service.status()
        if self._downlink is None or status.paused:
            return status
        waits = "" if self._may_write or self._turn_of_name is None else self._turn_of_name.problem
        return msgspec.structs.replace(status, paused=self._downlink.problem or waits)

    def _name_taken(self) -> None:
        self.service.supersede()
        raise RequestError(f"{self.node.name}: another storage has taken this name and continues the run")

    def close(self) -> None:
        self.service.close_parts()
        self.service.report_to(self.consumer)  # now, because checksums and commands may take 15 s
        try:
            self.service.close()
        finally:
            self.consumer.close()
        self.node.close()
        self._lock.release()
        if self._turn_of_name is not None:
            self._turn_of_name.close()


def _check_directory(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileError(f"--output-dir {directory}: no such directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise FileError(f"--output-dir {directory}: not writable")
    return directory.absolute()  # because people and programs with other working directories get the paths of files


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a storage except its directory, its name and the core's address."""
    parser.add_argument(
        "--rotate", type=parse_limit, action="append", default=[], metavar="LIMIT",
        help="begin the next file of a run at a number of rows (500krows, 100Mrows), at a size (500MB, 4GiB) or after "
        "a time (30s, 5min, 2h); may be given several times (default: one file per run)",
    )  # fmt: skip
    parser.add_argument(
        "--on-close", type=_command, default=(), metavar="COMMAND",
        help="run this command, without a shell, on every finished file, whose path is its last argument; it is killed "
        "after 600 s",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true",
        help="also make a raw file of each finished file (NAME.raw.h5): the board messages, in the raw layout of "
        "larpix-control",
    )  # fmt: skip
    parser.add_argument(
        "--name-template", type=parse_template, metavar="TEMPLATE",
        help="give each finished file a second name (hard link) in its directory, such as packet-{tag}-{start}: fields "
        "{run}, {part}, {start} (UTC), {tag} (kind of the run) and {storage}",
    )  # fmt: skip
    parser.add_argument(
        "--durability", choices=("flush", "fsync"), default="flush",
        help="acknowledged data survive the death of any process (flush), or also a power cut (fsync, which waits for "
        "the disk) (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=lambda text: parse_whole(text, 1, MAX_THREADS), metavar="N",
        help="threads that pack rows, beside the main thread (default: one less than the processors that it may use, "
        f"from 1 to {DEFAULT_THREADS})",
    )  # fmt: skip
    add_lock_dir_argument(parser)


def default_threads() -> int:
    """Return the number of packing threads for the processors that this process may use."""
    return max(1, min(len(os.sched_getaffinity(0)) - 1, DEFAULT_THREADS))


def own_options(options: argparse.Namespace) -> list[str]:
    """Make the options of add_own_arguments() again, for the command line of another process."""
    command = [f"--on-close={shlex.join(options.on_close)}"] if options.on_close else []
    locks = [f"--lock-dir={options.lock_dir}"] if options.lock_dir else []
    files = ["--raw"] if options.raw else []
    files += [f"--name-template={options.name_template}"] if options.name_template else []
    threads = [f"--threads={options.threads}"] if options.threads else []
    rotate = [f"--rotate={limit}" for limit in options.rotate]
    return [*rotate, *command, *files, f"--durability={options.durability}", *threads, *locks]


def _command(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("expected a command, found nothing")
    return words


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-offline-storage", description="Write the data of producers into LArPix+HDF5 files."
    )
    config.add_component_arguments(parser, DEFAULT_NAME)
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory for the files (default: the current one)",
    )  # fmt: skip
    config.add_state_dir_argument(parser)
    add_own_arguments(parser)
    jetstream.add_arguments(parser, "from whose streams the data are read, in place of the producers")
    parser.add_argument(
        "--standby", action="store_true",
        help="wait, while another storage of this name works anywhere, and take over from it within 5 s (needs "
        "--stream)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)

    def work() -> None:
        storage = Storage(options)
        try:
            with Signals() as signals:
                storage.run(signals)
        finally:
            storage.close()
        if lost := storage.service.finisher.lost:
            raise FileError(
                f"removed, and not written anew: {', '.join(part.name for part in lost)}; its rows are lost"
            )

    return run_main(work, log_level=options.log_level)


if __name__ == "__main__":
    sys.exit(main())
