"""Processor load of a process."""

import time

import pytest

from larpixdaq.runtime import timing
from larpixdaq.runtime.timing import Load, load_text


def test_shares_follow_the_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SPAN", 0.2)
    outer = time.monotonic()
    load = Load()
    inner, worked = time.monotonic(), time.thread_time()
    while time.thread_time() < worked + 0.2:
        pass
    inner = time.monotonic() - inner
    shares = load.shares()
    outer, worked = time.monotonic() - outer, time.thread_time() - worked
    # A busy machine may interrupt this thread at any place.
    assert 0.2 / outer - 0.001 <= shares["loop"] <= worked / inner + 0.001
    assert shares["process"] >= shares["loop"] - 0.01


def test_text_of_the_load() -> None:
    assert load_text({"loop": 0.01, "process": 0.02}) == "CPU 2%"
    assert load_text({"loop": 0.25, "process": 0.5}) == "CPU 50%, can take at least 4.0 times this rate"
    assert load_text({"loop": 0.074, "process": 0.08}) == "CPU 8%, can take at least 13 times this rate"
    assert load_text({"loop": 0.99, "process": 1.5}) == "CPU 150%, at its limit"
