"""Drives sources in tests the way the producer does, and checks the ledger at every step."""

import select
import time

import numpy as np
import pytest

from larpixdaq.constants import COUNTS, IO_GROUPS

#: Every source that was driven, for `closing`.
OPEN = []


@pytest.fixture(autouse=True)
def closing():
    """Import it into a module of tests: closes what its tests drove."""
    yield
    while OPEN:
        OPEN.pop().close()


class Driver:
    """One source with its counters; `step` is how many rows there is room for at a time."""

    def __init__(self, source, step=1000):
        self.source = source
        self.step = step
        self.counts = np.zeros((IO_GROUPS, len(COUNTS)), np.uint64)
        self.parts = []
        self.texts = []  # (rows before it, text)
        self.text_times = []
        OPEN.append(source)
        source.open()
        source.start(self.counts)

    @property
    def rows(self):
        return np.concatenate([np.zeros(0, self.source.layout.dtype), *self.parts])

    def count(self, name, io_group=None):
        column = self.counts[:, COUNTS.index(name)]
        return int(column.sum() if io_group is None else column[io_group])

    def take(self):
        """One read() and all of its rows; False when there was nothing."""
        if not self.source.read():
            return False
        for text, seconds in self.source.texts():
            self.texts.append((sum(map(len, self.parts)), text))
            self.text_times.append(seconds)
        while True:
            rows = np.zeros(self.step, self.source.layout.dtype)
            made = self.source.decode(rows)
            assert 0 <= made <= self.step
            self.parts.append(rows[:made])
            self.check()
            if made < self.step:
                return True

    def to_the_end(self, limit=30.0):
        end = time.monotonic() + limit
        while not self.source.finished:
            assert time.monotonic() < end, "the source does not finish"
            while self.take():
                pass
        return self.rows

    def until(self, condition, what, limit=10.0):
        """Poll the source's sockets and heed due(), as the producer's loop does."""
        end = time.monotonic() + limit
        while not condition():
            now = time.monotonic()
            assert now < end, f"not within {limit} s: {what}"
            poll = select.poll()
            for socket in self.source.sockets:
                poll.register(socket, select.POLLIN)
            due = self.source.due()
            wait = end - now if due is None else max(0.0, min(due, end) - now)
            poll.poll(wait * 1000 + 1)
            while self.take():
                pass

    def check(self):
        """The ledger's equations (a), (b) and (c) hold for the rows so far."""
        get = {name: self.counts[:, at].astype(np.int64) for at, name in enumerate(COUNTS)}
        taken = get["header_bytes"] + get["word_bytes"] + get["trailing_bytes"] + get["rejected_bytes"]
        pending = get["pending_before"] - get["pending_after"]
        np.testing.assert_array_equal(get["bytes_in"] + pending, taken + get["resync_bytes"])
        np.testing.assert_array_equal(get["words_in"], get["word_rows"] + get["unknown_words"] + get["rejected_words"])
        made = sum(get[name] for name in ("word_rows", "time_rows", "info_rows", "sent_rows"))
        assert made.sum() == sum(map(len, self.parts))


def same(found, expected, *, but=()):
    """All columns of two arrays of rows are equal, beside those named."""
    assert len(found) == len(expected)
    for name in found.dtype.names:
        if name not in but:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
