"""Two hosts, set up as docs/hosts.md says: a run with its storage on the other host, of which the wire shows nothing.

A third host has no key.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zmq
from network import Network, missing_rights
from processes import LIMIT, Process, until
from raw_sockets import Context
from system import System, rows_of
from two_hosts import NAMES, two_hosts

from larpixdaq._native.hdf5_chunks import Packer
from larpixdaq.hdf5.verify import verify
from larpixdaq.keys import credentials
from larpixdaq.keys.curve import connect_with, new_pair
from larpixdaq.operator import Operator
from larpixdaq.protocol.packed_rows import MIN_ROWS

COMMENT = "a comment that nobody else may read"
#: Texts that pass between the hosts: names, a comment, an action, an INFO message, and the name of a file. They are too
#: long to be found in encrypted bytes by chance.
TEXTS = ("Second storage", "Second monitor", "LArPix board", COMMENT, "prepare_run", "Beginning run", "run0000001")
ROWS = 20_000


def run(line: System) -> Path:
    """Take a complete run of at least ROWS packets; its file."""
    operator = line.start("--fake", "20000")
    operator.prepare_run(comment=COMMENT).result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "run_data").get("packets", 0) > ROWS, "packets at the monitor")
    ended = operator.end_run().result(LIMIT)
    assert (ended["condition"], ended["reasons"]) == ("COMPLETE", [])
    (path,) = map(Path, ended["files"])
    assert verify(path).ok, verify(path).findings
    return path


def refuse_third_host(line: System, net: Network) -> None:
    """Try to connect from a host without a key, as its user would, and with a key of its own making."""
    env = {"XDG_STATE_HOME": str(line.folder / "three")}
    where = {"prefix": net.prefix("three"), "env": env, "directory": line.folder / "out"}
    with contextlib.ExitStack() as stack:
        started = [
            (
                stack.enter_context(Process("larpixdaq.run_data", "--core", line.core, *more, **where)),
                says,
            )
            for more, says in (((), "this user has no key"), (("--insecure",), "uses keys: leave out --insecure"))
        ]
        for process, says in started:
            assert process.wait() == 1
            assert says in process.stderr
    own = credentials.find(line.core)
    assert own is not None
    with net.inside("three"):
        context = Context()
        socket = context.socket(zmq.DEALER)
        connect_with(socket, new_pair(), own.server)
        socket.connect(line.core)
        socket.send(b"hello")
    refused = f"refused a connection from {net.address('three')} with an unknown key"
    until(lambda: refused in line.processes["core"].stderr, "the refusal")
    context.destroy(0)


@pytest.mark.parametrize("insecure", [False, True])
def test_the_wire_between_two_hosts_shows_neither_texts_nor_rows(tmp_path: Path, insecure: bool) -> None:
    """With --insecure it shows the texts and the packed rows, so that the search is known to find what is there."""
    if reason := missing_rights():
        pytest.skip(reason)
    wire = tmp_path / "wire"
    with (
        contextlib.closing(Network("one", "two", "three", capture=wire)) as net,
        two_hosts(tmp_path, net, insecure=insecure) as line,
    ):
        path = run(line)
        log = tmp_path / "state" / "log.txt"
        until(lambda: all(f" {name}: " in log.read_text() for name in NAMES.values()), "records of the other host")
        if not insecure:
            refuse_third_host(line, net)
    captured = wire.read_bytes()
    rows = rows_of(path)
    assert len(captured) > rows.nbytes / 10
    found = [text for text in TEXTS if text.encode() in captured]
    assert found == (list(TEXTS) if insecure else [])
    if not insecure:  # with it, rows of small blocks are not packed
        chosen = rows[np.linspace(0, len(rows) - 1, 200).astype(int)]
        assert not any(row.tobytes() in captured for row in chosen)
    large = [block for block in blocks_of(path) if len(block) >= MIN_ROWS]
    assert len(large) > 10
    # Until the producer knows that the storage unpacks, within the first blocks, they are sent as they are. Rows of
    # time stamps are alike for a second.
    later = [block[block["packet_type"] == 0] for block in large[len(large) // 2 :]]
    assert not any(data[len(data) // 2].tobytes() in captured for data in later)
    seen = [slice_of(block) in captured for block in large]
    if insecure:
        assert sum(seen) > len(seen) / 2, "some slices are cut by the end of an IP packet"
    else:
        assert not any(seen)


def blocks_of(path: Path) -> list[np.ndarray[Any, Any]]:
    """Return the rows of each block in a file."""
    with h5py.File(path) as file:
        rows, table = file["packets"][:], file["run/blocks"][:]
    return [rows[first : first + n] for first, n in table[["first_row", "rows"]].tolist()]


def slice_of(rows: np.ndarray[Any, Any]) -> bytes:
    """Return 32 bytes from the middle of packed rows, as their producer sends them."""
    packed = Packer(len(rows), rows.itemsize).pack(np.ascontiguousarray(rows).view(np.uint8))
    middle = len(packed) // 2
    return packed[middle : middle + 32]


@pytest.mark.parametrize("everywhere", [False, True])
def test_up_at_the_address_of_a_host_opens_log_and_producer_too(tmp_path: Path, everywhere: bool) -> None:
    if reason := missing_rights():
        pytest.skip(reason)
    state, where = ("--state-dir", tmp_path / "state"), {"directory": tmp_path / "out"}
    with contextlib.closing(Network("one")) as net, net.inside("one"):
        host = "*" if everywhere else net.address("one")
        options = ("-o", tmp_path, "--fake", "10", "--ring", "16MiB")
        with Process("larpixdaq.cli", "up", "--address", f"tcp://{host}", *state, *options, **where) as up:
            assert up.wait(2 * LIMIT) == 0, up.stderr
        try:
            with Operator(f"tcp://{net.address('one')}", timeout=LIMIT) as operator:
                infos = {c["kind"]: c["info"] for c in operator.components().result(LIMIT)}
        finally:
            with Process("larpixdaq.cli", "down", *state, **where) as down:
                assert down.wait(2 * LIMIT) == 0, down.stderr
    listens = "127.0.0.1" if everywhere else net.address("one")
    assert infos["log"]["log"][0] == f"tcp://{listens}:5678"
    assert infos["producer"]["stream"][0].startswith(f"tcp://{listens}:")
    assert ("but not the producer" in up.stderr) == everywhere
