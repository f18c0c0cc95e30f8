"""Check raw files (`rawhdf5format`), also those of other programs: their structure, and every message and word in them.

The messages go through the decoder of the boards, and what it counts as unusable is a fault of the file. What only
shows that data may have been lost before (a full FIFO, missing heartbeats) is a note, as in the verdicts of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import COUNTS, IO_GROUPS, Count
from larpixdaq.errors import FileError
from larpixdaq.hdf5.chunk_reader import ForeignFile, RawMessages
from larpixdaq.runtime.units import utc_iso
from larpixdaq.schema import NOTICES, Asic, layout_of
from larpixdaq.sources.data_quality import COMPLETE, LOST, verdicts
from larpixdaq.sources.replay import message_times
from larpixdaq.sources.replay_batches import Decoders

#: Rows that are decoded at once.
_ROWS: Final = 1 << 16
#: Maximum lines of findings.
_MOST: Final = 100
#: Notices that the counters tell more exactly, or that are about the time of arrival.
_COUNTED: Final = ("short", "trailing", "rejected", "unknown", "resync", "oversized", "ahead", "holes")


class RawCheck(NamedTuple):
    """Result for one raw file. `boards`: for each io_group the counters of the ledger, and first and last unix s."""

    path: Path
    messages: int
    words: int
    findings: list[str]  # faults, one line each
    notes: list[str]
    boards: dict[int, dict[str, int]]

    @property
    def ok(self) -> bool:
        return not self.findings


class _Checker:
    def __init__(self, asic: Asic, clock64: bool) -> None:
        self._decoders = Decoders(asic, format="auto", clock64=clock64)
        self._counts = np.zeros((IO_GROUPS, len(Count)), np.uint64)
        self._decoders.start(self._counts)
        self._rows = np.empty(_ROWS, layout_of(asic, clock64=True).dtype)
        self.times: dict[int, tuple[int, int]] = {}
        self.findings: list[str] = []
        self.more = 0

    def fault(self, line: str) -> None:
        if len(self.findings) < _MOST:
            self.findings.append(line)
        else:
            self.more += 1

    def add(self, data: NDArray[np.uint8], spans: NDArray[Any], groups: NDArray[np.uint8]) -> None:
        seconds, _ = message_times(data, spans)
        for group in np.unique(groups).tolist():
            which = groups == group
            decoder = self._decoders.decoder(group)
            decoder.feed(data, spans if which.all() else spans[which])
            while decoder.decode(self._rows) == len(self._rows):
                pass
            known = seconds[which & (seconds >= 0)]
            if len(known):
                first, last = self.times.get(group, (int(known[0]), 0))
                self.times[group] = first, max(last, int(known.max()))

    def boards(self) -> dict[int, dict[str, int]]:
        found = {}
        for group in np.flatnonzero(self._counts.any(axis=1)).tolist():
            first, last = self.times.get(group, (0, 0))
            counts = dict(zip(COUNTS, self._counts[group].tolist(), strict=True))
            found[group] = {"first_s": first, "last_s": last, **{name: n for name, n in counts.items() if n}}
        return found

    def judge(self, notes: list[str]) -> None:
        """Add what the counters and the decoders say of each board."""
        for group in np.flatnonzero(self._counts.any(axis=1)).tolist():
            counts = dict(zip(COUNTS, self._counts[group].tolist(), strict=True))
            for name, text in (
                ("rejected_messages", f"{{}} messages with {counts['rejected_bytes']} bytes are not those of a PACMAN"),
                ("wrong_counts", "{} messages have another number of words than their headers say"),
                ("trailing_bytes", "{} bytes behind the last word of a message"),
                ("unknown_words", "{} words of unknown type"),
                ("rejected_words", "{} words with impossible content"),
            ):
                if counts[name]:
                    self.fault(f"io_group {group}: {text.format(counts[name])}")
            if counts["bad_parity"]:
                notes.append(
                    f"io_group {group}: {counts['bad_parity']} of {counts['packets']} packets have wrong parity"
                )
            noticed = self._decoders.noticed(group)
            noticed[[NOTICES.index(name) for name in _COUNTED]] = 0
            for verdict in verdicts(group, noticed):
                if verdict.verdict == LOST:
                    self.fault(f"io_group {group}: {verdict.why}")
                elif verdict.verdict != COMPLETE:
                    notes.append(f"io_group {group}: {verdict.why.replace('start the producer with', 'give')}")


def check_raw(path: Path, asic: Asic = Asic.V2, *, clock64: bool = False) -> RawCheck:
    """Check one raw file. Nothing is raised: that it cannot be read is a finding too.

    `asic`: the chips whose packets are in it, which raw files do not say. `clock64`: legacy firmware with that clock.
    """
    checker, notes = _Checker(asic, clock64), list[str]()
    total, found = 0, 0
    try:
        with ForeignFile(path) as file:
            if "msgs" not in file.guard("/", lambda: set(file.hdf5)):
                raise FileError(f"{path}: has no /msgs, so it is no raw file")
            if file.why:
                checker.fault(f"it {file.why} (larpixdaq recover)")
            _check_meta(file, checker.fault, notes)
            messages = RawMessages(file)
            total = messages.messages
            if messages.headers is None:
                notes.append("it has no /msg_headers: all messages count as those of io_group 1")
            elif messages.headers != total:
                checker.fault(f"{total} messages in /msgs, but {messages.headers} io_groups in /msg_headers")
            for data, spans, groups in messages.pieces(1, checker.fault):
                found += len(spans)
                checker.add(data, spans, groups)
            file.check_unchanged()
    except FileError as error:
        checker.fault(str(error))
    checker.judge(notes)
    boards = checker.boards()
    words = sum(counts.get("words_in", 0) for counts in boards.values())
    if not checker.findings and not total:
        notes.append("it has no messages")
    findings = checker.findings + ([f"and {checker.more} more"] if checker.more else [])
    return RawCheck(path, found, words, findings, notes, boards)


def _check_meta(file: ForeignFile, fault: Any, notes: list[str]) -> None:
    def read() -> dict[str, Any]:
        return dict(file.hdf5["meta"].attrs)

    try:
        meta = file.guard("attributes of /meta", read)
    except FileError as error:
        fault(str(error))
        return
    version = str(meta.get("version", ""))
    if version != "0.0":
        fault(f"/meta says version {version[:40]!r}, expected '0.0', the only one that there is")
    notes += [
        f"/meta: {name} {str(meta[name])[:200]}" for name in ("io_version", "made_from", "packet_file") if name in meta
    ]
    for name in ("created", "modified"):
        try:
            if name in meta:
                notes.append(f"/meta: {name} {utc_iso(float(meta[name]))}")
        except (TypeError, ValueError, OverflowError):
            fault(f"/meta: {name} is {str(meta[name])[:40]!r}, expected unix seconds")
