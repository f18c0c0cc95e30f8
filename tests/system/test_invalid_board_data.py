"""Invalid data from boards during a run, with real processes: they are counted and kept, and no valid data are lost."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import zmq
from decoder_harness import data_word, legacy
from processes import LIMIT, free_port, in_thread, until
from system import System, rows_of

from larpixdaq._native import board_emulator, word_codec
from larpixdaq.hdf5.verify import verify
from larpixdaq.schema import Asic


class Board:
    """Socket that publishes messages to a subscriber. It may be closed and opened again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket: Any = None
        self.sent = 0  # bytes
        self.open()

    def open(self) -> None:
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.XPUB_NODROP, 1)
        self.socket.setsockopt(zmq.SNDTIMEO, int(LIMIT * 1000))
        self.socket.bind(f"tcp://127.0.0.1:{self.port}")

    def await_subscriber(self) -> None:
        assert self.socket.poll(int(LIMIT * 1000)), "no subscriber"
        assert self.socket.recv() == b"\1"

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)
        self.sent += sum(map(len, parts))

    def close(self) -> None:
        self.socket.close(linger=int(LIMIT * 1000))

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close(linger=0)
        self.context.term()


def good_words(n: int, seed: int) -> np.ndarray:
    words = np.zeros(n, np.uint64)
    board_emulator.PacmanBoard(Asic.V2, rate=1e5, seed=seed).packets(words)
    return words


def publish(board: Board, words: np.ndarray) -> None:
    """Send messages of up to 50 words on io_channel 1."""
    for i in range(0, len(words), 50):
        board.send(legacy([data_word(int(word), channel=1) for word in words[i : i + 50]]))


class Good(NamedTuple):
    """Content of the run's only file: rows, counts of io_group 1, unknown words, verdicts."""

    rows: np.ndarray
    counts: np.ndarray
    unknown: np.ndarray
    verdicts: np.ndarray


def good_file(ended: dict[str, Any], *, stranger: bool = False) -> Good:
    """Check that the run is suspect and its file good. Returns the content of the file.

    `stranger`: another program was at a board's address, from which unusable bytes may have come.
    """
    assert ended["condition"] in ("COMPLETE, suspect", *(["INCOMPLETE"] if stranger else [])), ended
    (path,) = ended["files"]
    report = verify(Path(path))
    assert report.ok or stranger, report.findings
    assert all("io_group 2: most of the data could not be used" in line for line in report.findings)
    with h5py.File(path, "r") as file:
        (counts,) = [row for row in file["ledger/counts"][:] if row["io_group"] == 1]
        return Good(rows_of(path), counts, file["ledger/unknown"][:], file["ledger/verdicts"][:])


def doubts(verdicts: np.ndarray, io_group: int = 1) -> list[tuple[str, str]]:
    """Return (verdict, why) of the evidence against an io_group, without the numbers."""
    lines = verdicts[(verdicts["io_group"] == io_group) & (verdicts["verdict"] != b"complete")]
    return [(line["verdict"].decode(), re.sub(r"[\d.]+", "#", line["why"].decode())) for line in lines]


def of_channel(rows: np.ndarray, channel: int) -> np.ndarray:
    """Return the words of the rows of an io_channel."""
    rows = rows[(rows["packet_type"] <= 3) & (rows["io_channel"] == channel)]
    words: np.ndarray = word_codec.encode(rows, asic=Asic.V2)
    return words


def test_invalid_messages_between_valid_messages(line: System) -> None:
    good = good_words(1000, seed=1)
    word = int(good[0])
    whole = legacy([data_word(word, channel=2)] * 3)
    unknown = b"X" + data_word(word, channel=3)[1:]
    invalid = [
        (b"",),
        (b"D",),
        (whole[:7],),  # not even a header
        (whole[:-5],),  # the last word is cut
        (whole + b"and more",),
        (legacy([data_word(word, channel=2)] * 3, count=60_000),),
        (legacy([data_word(word, channel=2)] * 3, count=1),),
        (legacy([]),),
        (legacy([data_word(word, channel=2), unknown, data_word(word, channel=2)]),),
        (b"Z" + whole[1:],),
        (b"!" + whole[1:],),
        (np.random.default_rng(1).bytes(10_000_000),),
        (whole, b"a part more", b""),  # no board sends messages in several parts
    ]
    with Board() as board:
        operator = line.start("--pacman", f"127.0.0.1:{board.port}")
        board.await_subscriber()
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        for i, parts in enumerate(invalid):
            publish(board, good[i * 50 : (i + 1) * 50])
            board.send(*parts)
        publish(board, good[len(invalid) * 50 :])
        until(lambda: line.status_of(operator, "producer").get("packets", 0) >= len(good), "the good words")
        rows, counts, kept, verdicts = good_file(operator.end_run().result(LIMIT))
        line.await_status(operator, "producer", "verdicts", {"1": "lost"})
    found = doubts(verdicts)
    assert ("lost", "# words missing in # board messages, by their headers") in found
    assert ("lost", "# board messages dropped as too large (# bytes in all)") in found
    assert ("suspect", "# bytes behind the last word of # board messages") in found
    assert ("suspect", "# invalid board messages (# bytes in all)") in found
    assert ("suspect", "# words could not be decoded") in found
    assert verdicts["lost"][verdicts["verdict"] == b"lost"].tolist() == [60_000 - 3 + 1, 1]
    assert "io_group 1 is lost: " in line.processes["producer"].stderr
    assert (of_channel(rows, 1) == good).all()
    assert set(of_channel(rows, 2)) == {word}
    assert set(rows["io_channel"][rows["packet_type"] <= 3]) == {1, 2}
    assert counts["bytes_in"] == board.sent
    assert counts["rejected_messages"] > 0
    assert counts["unknown_words"] + counts["rejected_words"] > 0
    assert unknown in [bytes(row["raw"])[:16].ljust(16, b"\0") for row in kept]
    assert "Traceback" not in line.processes["producer"].stderr


@pytest.mark.parametrize("how", ["it is switched off", "it sends an oversized message"])
def test_a_board_that_disconnects_and_connects_again(line: System, how: str) -> None:
    good = good_words(2000, seed=2)
    with Board() as board:
        operator = line.start("--pacman", f"127.0.0.1:{board.port}")
        board.await_subscriber()
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        before = time.time_ns()
        publish(board, good[:1000])
        until(lambda: line.status_of(operator, "producer").get("packets", 0) == 1000, "the words before")
        lost_at = time.time_ns()
        if how == "it is switched off":
            board.close()
        else:
            board.socket.send(bytes(70 << 20))  # too large, so that the connection is closed
        name = f"PACMAN io_group 1 at tcp://127.0.0.1:{board.port}"
        producer = line.processes["producer"]
        until(lambda: f"{name}: connection lost" in producer.stderr, "a warning that names the board")
        assert operator.state().result(LIMIT) == "RUN"
        if how == "it is switched off":
            board.open()
        else:
            assert board.socket.poll(int(LIMIT * 1000)), "the connection was not closed"
            assert board.socket.recv() == b"\0"
        board.await_subscriber()
        subscribed_at = time.time_ns()
        publish(board, good[1000:])
        until(lambda: line.status_of(operator, "producer").get("packets", 0) == 2000, "the words after")
        ended_at = time.time_ns()
        rows, counts, _, verdicts = good_file(operator.end_run().result(LIMIT))
        assert f"{name}: connected again" in producer.stderr
    assert doubts(verdicts) == [("suspect", "board disconnected: # s")]
    assert before <= verdicts["first_ns"][0] <= lost_at <= subscribed_at <= verdicts["last_ns"][0] <= ended_at
    assert (of_channel(rows, 1) == good).all()
    assert counts["bytes_in"] == board.sent


@contextlib.contextmanager
def garbage_server() -> Iterator[tuple[int, list[int]]]:
    """Server that sends random bytes to each client and disconnects. Yields its port, and the numbers of sent bytes."""
    stopping = threading.Event()
    sizes: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError, ConnectionError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(os.urandom(5000))
                        sizes.append(5000)

        with in_thread(serve, stopping.set):
            yield server.getsockname()[1], sizes


def test_an_address_without_a_board_does_not_disturb_other_boards(line: System) -> None:
    """One of two addresses sends something else than ZeroMQ while the board at the other is read."""
    good = good_words(500, seed=3)
    with Board() as board, garbage_server() as (port, sizes):
        operator = line.start("--pacman", f"1=127.0.0.1:{board.port}", f"2=127.0.0.1:{port}")
        board.await_subscriber()
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        for part in np.split(good, 5):
            publish(board, part)
            before = len(sizes)
            until(lambda before=before: len(sizes) > before, "a further connection")  # type: ignore[misc]
        until(lambda: line.status_of(operator, "producer").get("packets", 0) == len(good), "the good words")
        warning = f"PACMAN io_group 2 at tcp://127.0.0.1:{port}: the program at this address does not speak ZeroMQ"
        until(lambda: warning in line.processes["producer"].stderr, "a warning that names the address")
        rows, _, _, verdicts = good_file(operator.end_run().result(LIMIT), stranger=True)
    assert doubts(verdicts, 1) == []
    # some of the random bytes may have looked like ZeroMQ
    assert "suspect" in {verdict for verdict, _ in doubts(verdicts, 2)}
    assert (of_channel(rows, 1) == good).all()
    assert np.count_nonzero(rows["packet_type"] <= 3) == len(good)


def test_replay_of_a_recorded_file_gives_the_same_rows(line: System) -> None:
    """INFO texts of the recording are in their places, between those of the new run."""
    operator = line.start("--fake", "20000", "--io-groups", "2")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > 2000, "2000 packets")
    (first,) = operator.end_run().result(LIMIT)["files"]
    line.processes["producer"].stop()
    line.launch_producer("--replay", first, "--speed", "max", "--name", "Replay")

    def there() -> bool:
        return any(c["alive"] and c["name"] == "Replay" for c in operator.components().result(LIMIT))

    until(there, "the replay")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)

    def finished() -> bool:
        (status,) = [c["status"] for c in operator.components().result(LIMIT) if c["name"] == "Replay"]
        return bool(status.get("finished"))

    until(finished, "the end of the file")
    ended = operator.end_run().result(LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    (second,) = ended["files"]
    assert verify(Path(second)).ok
    old, new = rows_of(first), rows_of(second)[1:-1]
    info = old["packet_type"] == 5
    assert info.sum() == 2
    for name in old.dtype.names:
        same = old[name] == new[name]
        # INFO messages are numbered anew in each run
        assert (same | info if name == "counter" else same).all(), name
    assert list(new["counter"][info]) == [1, 2]
    with h5py.File(second, "r") as file:
        texts = [text.decode() for text in file["messages"]["message"]]
    assert texts == ["Beginning run", "Beginning run", "Ending run", "Ending run"]
