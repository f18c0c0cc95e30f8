"""Reads sources in tests as the producer does, and checks the ledger at every step."""

import time

import numpy as np
import pytest
import zmq
from processes import until

from larpixdaq.constants import COUNTS, IO_GROUPS

#: Sources that open_driver() has opened, for the fixture below.
OPEN_SOURCES = []


@pytest.fixture(autouse=True)
def close_sources():
    """Closes the sources of open_driver(), in test modules that import this fixture."""
    yield
    while OPEN_SOURCES:
        OPEN_SOURCES.pop().close()


def check_ledger(counts, rows, *, serial=False):
    """Check the ledger's equations (a), (b), (c). counts: shape (..., counters); rows: number of all rows."""
    c = dict(zip(COUNTS, counts.T.astype(np.int64), strict=True))
    taken = c["header_bytes"] + c["word_bytes"] + c["trailing_bytes"] + c["rejected_bytes"] + c["resync_bytes"]
    np.testing.assert_array_equal(c["pending_before"] + c["bytes_in"], taken + c["pending_after"])
    np.testing.assert_array_equal(c["words_in"], c["word_rows"] + c["unknown_words"] + c["rejected_words"])
    assert rows == sum(c[name] for name in ("word_rows", "time_rows", "info_rows", "sent_rows")).sum()
    assert (c["bad_parity"] <= c["packets"]).all()
    assert (c["packets"] <= c["word_rows"]).all()
    if serial:
        assert c["words_in"] == c["messages"]
        assert c["word_bytes"] == 10 * c["words_in"]


class Driver:
    """Reads a source as the producer does, `step` rows at a time, and checks the ledger after each step."""

    def __init__(self, source, step=1000):
        self.source = source
        self.step = step
        self.counts = np.zeros((IO_GROUPS, len(COUNTS)), np.uint64)
        self.parts = []
        self.texts = []  # (number of rows before the text, text)
        self.text_times = []
        self.problems = []
        source.start(self.counts)

    @property
    def rows(self):
        return np.concatenate([np.zeros(0, self.source.layout.dtype), *self.parts])

    @property
    def n(self):
        return sum(map(len, self.parts))

    def count(self, name, io_group=None):
        column = self.counts[:, COUNTS.index(name)]
        return int(column.sum() if io_group is None else column[io_group])

    def take(self):
        """Call read() once and decode all its rows. Returns False if there were no data."""
        if not self.source.read():
            return False
        for text, seconds in self.source.texts():
            self.texts.append((self.n, text))
            self.text_times.append(seconds)
        while True:
            rows = np.zeros(self.step, self.source.layout.dtype)
            made = self.source.decode(rows)
            assert 0 <= made <= self.step
            self.parts.append(rows[:made])
            check_ledger(self.counts, self.n)
            if made < self.step:
                return True

    def run_to_end(self):
        def finished():
            while self.take():
                pass
            return self.source.finished

        until(finished, "the source to finish", 30)
        return self.rows

    def turn(self):
        """Wait for data, at most 20 ms or until the source is due, and decode all of them."""
        poller = zmq.Poller()
        for socket in self.source.sockets:
            poller.register(socket, zmq.POLLIN)
        due = self.source.due()
        poller.poll(20 if due is None else min(20, max(0, int((due - time.monotonic()) * 1000) + 1)))
        while self.take():
            pass
        self.problems += self.source.problems()

    def until(self, condition, what):
        def met():
            if condition():
                return True
            self.turn()
            return bool(condition())

        until(met, what)


def open_driver(source, step=1000):
    source.open()
    OPEN_SOURCES.append(source)
    return Driver(source, step)


def assert_same_rows(found, expected, *, but=()):
    """Check that two arrays of rows are equal, in all columns except `but`."""
    assert len(found) == len(expected)
    for name in found.dtype.names:
        if name not in but:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
