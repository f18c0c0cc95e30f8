"""Raw files of real processes: what a board sends comes back byte for byte, also when the storage is killed."""

from __future__ import annotations

import contextlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from decoder_harness import random_packets
from emulated_board import emulator
from larpix.format import rawhdf5format
from larpix_control import pacman_msg_format
from processes import LIMIT, until
from system import System, system

from larpixdaq.hdf5 import names
from larpixdaq.hdf5.reader import count_words
from larpixdaq.hdf5.verify import verify_all
from larpixdaq.operator import Operator


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def start(line: System, stack: contextlib.ExitStack, board: dict[str, dict[str, int]]) -> Operator:
    ports = [f"{group}=127.0.0.1:{port['data']}" for group, port in board.items()]
    line.launch_producer("--pacman", *ports)
    operator = stack.enter_context(Operator(line.core, timeout=LIMIT))
    line.await_kinds(operator, "storage", "producer")
    operator.prepare_run(kind="physics").result(LIMIT)
    operator.begin_run().result(LIMIT)
    return operator


def sidecars(files: list[Path]) -> list[Path]:
    """Wait for the sidecars of the raw files of these files, and return the raw files."""
    raws = [path.with_name(path.name.removesuffix(names.FINISHED) + names.RAW) for path in files]
    until(lambda: all(raw.with_suffix(".json").exists() for raw in raws), "the raw files", 3 * LIMIT)
    return raws


def finished_with(folder: Path, sent: dict[str, dict[str, int]]) -> list[Path]:
    """Return the files of the folder, in order, once no part is open and they have all words of the boards; else []."""
    if names.unfinished_parts(folder):
        return []
    files = [path for path in sorted(folder.iterdir()) if names.is_packet_file(path.name)]
    words = sum((Counter(count_words(path)) for path in files), Counter())
    return files if words == {int(group): counts["words"] for group, counts in sent.items()} else []


def test_messages_that_a_board_sends_come_back(line: System, tmp_path: Path) -> None:
    """larpix-control makes the messages, and reads them from the raw file of the run."""
    recording = tmp_path / "recorded.bin"
    dice = np.random.default_rng(1)
    sent = [
        pacman_msg_format.format(random_packets(seed, int(dice.integers(0, 9))), msg_type="DATA") for seed in range(500)
    ]
    recording.write_bytes(b"".join(struct.pack("<I", len(message)) + message for message in sent))
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(emulator("--replay", str(recording), "--lossless", "--wait-for-go"))
        line.launch_core()
        line.launch_storage("--raw", "--name-template", "packet-{tag}-{run}-{part}")
        operator = start(line, stack, board.ready)
        board.go()
        words = sum((len(message) - 8) // 16 for message in sent)
        assert board.finish()["sent"]["1"]["words"] == words
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"].startswith("COMPLETE"), ended
        (raw,) = sidecars([Path(path) for path in ended["files"]])
    found = rawhdf5format.from_rawfile(str(raw), io_version="0.0")
    assert found["msgs"] == sent
    assert set(found["msg_headers"]["io_groups"]) == {1}
    about = json.loads(raw.with_suffix(".json").read_text())
    assert (about["messages"], about["words"]) == (len(sent), words)
    assert (line.data / "packet-physics-0000001-000.h5").samefile(ended["files"][0])
    assert (line.data / about["name"]).samefile(raw)
    assert verify_all([line.data]).ok


def test_a_killed_storage_loses_no_word_of_the_raw_files(line: System) -> None:
    """The parts of both storages have raw files in the end, with all words of both boards."""
    options = ("--io-groups", "2", "--rate", "20000", "--count", "30000", "--lossless", "--wait-for-go")
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(emulator(*options))
        line.launch_core()
        line.launch_storage("--raw", "--rotate", "25krows")
        operator = start(line, stack, board.ready)
        board.go()
        until(lambda: list(line.data.glob("*_001.h5.part")), "the second part")
        until(lambda: line.status_of(operator, "storage").get("rows", 0) > 26_000, "rows in it")
        line.processes["offline_storage"].kill()
        line.restart("offline_storage")
        sent = board.finish()["sent"]
        operator.end_run().result(2 * LIMIT)  # it may end before the part is recovered
        files = until(lambda: finished_with(line.data, sent), "all words in finished files", 3 * LIMIT)
        raws = sidecars(files)
    totals = dict.fromkeys(sent, 0)
    for path, raw in zip(files, raws, strict=True):
        found = rawhdf5format.from_rawfile(str(raw))
        words = count_words(path)
        for group in sent:
            mine = [m for g, m in zip(found["msg_headers"]["io_groups"], found["msgs"], strict=True) if str(g) == group]
            assert sum((len(message) - 8) // 16 for message in mine) == words[int(group)]
            totals[group] += words[int(group)]
    assert totals == {group: counts["words"] for group, counts in sent.items()}
    assert len(files) >= 3
    assert verify_all([line.data]).ok
