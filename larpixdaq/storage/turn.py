"""The turn of a storage that reads its data at the brokers: of all storages of one name, the one with the lease works.

The lock of a directory (directory_lock.py) holds on one host. The lease holds on all hosts: another storage of the same
name waits for it, and takes over when its holder has died or is cut off. A holder that cannot write the lease stops
writing files before another one can have it, because it counts the time by its own clock (stream/lease.py).
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time
from typing import Final

from larpixdaq.errors import BrokerError, LarpixDaqError, RequestError
from larpixdaq.runtime.event_loop import Signals
from larpixdaq.stream import downlink, jetstream
from larpixdaq.stream.jetstream import Brokers
from larpixdaq.stream.lease import SECONDS, Bucket, Lease, NoMajority

_log = logging.getLogger(__name__)
#: Seconds for which a storage without --standby waits for the lease: that of a predecessor that was killed ends first.
_PATIENCE: Final = 2 * SECONDS
_INTERVAL: Final = 0.25
#: Seconds for which it tries to reach a broker at all.
_BROKER_LIMIT: Final = 12.0


class Turn:
    """The lease of a storage's name. wait() takes it; holds() says whether this process may write."""

    def __init__(self, brokers: Brokers, name: str, *, standby: bool) -> None:
        self.name = name
        self._brokers, self._standby = brokers, standby
        self._bucket: Bucket | None = None
        self._lease: Lease | None = None
        self._term: int | None = None
        #: Where the storage is that has taken the lease from this one; empty as long as none has.
        self.lost_to = ""

    def wait(self, signals: Signals) -> bool:
        """Wait for the lease; False when a signal comes first.

        BrokerError when no broker answers; RequestError when another storage of this name is at work, unless this one
        is a standby. Without a majority of the brokers it waits: the other hosts may be started later.
        """
        self._open_bucket(signals)
        if self._bucket is None:
            return False
        about = {"host": socket.gethostname()}
        lease = self._lease = Lease(self._bucket, f"storage.{jetstream.stream_token(self.name)}", about=about)
        limit = time.monotonic() + _PATIENCE
        warned = troubled = False
        while not signals.stop:
            lease.clear()
            self._term = lease.term
            if self._term is not None:
                if warned:
                    _log.warning("%s takes over", self.name)
                return True
            if lease.rival is not None:
                where = _where(lease)
                if not self._standby and time.monotonic() > limit:
                    raise RequestError(
                        f"{self.name}: another storage of this name is at work on {where}; --standby waits for it"
                    )
                if not warned:
                    _log.warning("another storage of this name is at work on %s: waiting", where)
                warned = True
            elif lease.problem and time.monotonic() > limit and not troubled:
                _log.warning("the lease of %s cannot be had: %s", self.name, lease.problem)
                troubled = True
            select.select([signals.fileno(), lease.fileno()], [], [], _INTERVAL)
        return False

    def _open_bucket(self, signals: Signals) -> None:
        limit = time.monotonic() + _BROKER_LIMIT
        warned = False
        while self._bucket is None and not signals.stop:
            try:
                self._bucket = Bucket(self._brokers, f"{self.name} lease", limit=_INTERVAL)
            except NoMajority as error:
                if not warned:
                    _log.warning("%s: waiting for a majority of the brokers", error)
                warned = True
                select.select([signals.fileno()], [], [], _INTERVAL)
            except BrokerError:
                if not warned and time.monotonic() > limit:
                    raise
                select.select([signals.fileno()], [], [], _INTERVAL)

    def holds(self) -> bool:
        """Whether this process has had the lease without a break since wait(), and has it now."""
        lease = self._lease
        assert lease is not None
        term = lease.term
        if term is not None and term != self._term:
            self.lost_to = "another host"
        elif term is None and not lease.is_own:
            self.lost_to = _where(lease)
        return term is not None and not self.lost_to

    @property
    def problem(self) -> str:
        """Why the lease is not held, in one line."""
        assert self._lease is not None
        why = self._lease.problem or "it was not written in time"
        return f"the lease of this storage's name cannot be renewed: {why}"

    def highest_run(self) -> int:
        """Return the highest run in the streams of the brokers, so that no further run gets its number; 0 if they do
        not say."""
        try:
            return asyncio.run(downlink.highest_run(self._brokers, self.name))
        except LarpixDaqError as error:
            _log.warning("the runs in the streams are not known: %s", error)
            return 0

    def close(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            self._lease.close()
        if self._bucket is not None:
            self._bucket.close()


def _where(lease: Lease) -> str:
    return (lease.owner.about.get("host") if lease.owner is not None else None) or "another host"
