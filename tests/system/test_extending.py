"""The examples of docs/extending.md: a source that reads a socket, and a kernel. Its plot is in test_plots."""

import importlib.util
import re
import select
import socket
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from processes import LIMIT

from larpixdaq.constants import IO_GROUPS, Count
from larpixdaq.schema import PACKETS_2_4

SOURCES = Path(__file__).parents[2]


def example(name: str) -> str:
    """Return the example of the page that begins with this comment."""
    text = (SOURCES / "docs" / "extending.md").read_text()
    (found,) = re.findall(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```$", text, re.M | re.S)
    return found


def test_the_source_decodes_datagrams():
    names: dict = {}
    exec(compile(example("larpixdaq/sources/udp.py"), "udp.py", "exec"), names)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as board:
        board.bind(("127.0.0.1", 0))
        port = board.getsockname()[1]
    source = names["UdpSource"](3, port)
    counts = np.zeros((IO_GROUPS, len(Count)), np.uint64)
    try:
        source.open()
        source.start(counts)
        word = struct.pack("<cB2xI8s", b"D", 5, 123, bytes.fromhex("5004bc5e5a8023c0"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as board:
            for seconds in (1_700_000_000, 1_700_000_001):
                board.sendto(struct.pack("<cIxH", b"D", seconds, 2) + 2 * word, ("127.0.0.1", port))
        assert select.select(source.sockets, [], [], LIMIT)[0]
        rows, made = np.zeros(20, PACKETS_2_4), 0
        while source.read():
            made += source.decode(rows[made:])
        assert source.drained
        assert rows[:made]["packet_type"].tolist() == [4, 0, 0, 4, 0, 0]
        assert rows[1][["io_group", "io_channel", "chip_id", "channel_id", "dataword"]].tolist() == (3, 5, 20, 1, 35)
        assert counts[3, Count.WORDS_IN] == counts[3, Count.WORD_ROWS] == 4
        assert {board.problem for board in source.boards()} == {""}
    finally:
        source.close()


def test_the_kernel_is_compiled_and_checks_its_input(tmp_path):
    file = tmp_path / "fifo_counts.pyx"
    file.write_text(example("ext/fifo_counts.pyx"))
    cython = [sys.executable, "-m", "cython", "-3", "-I", str(SOURCES / "ext"), str(file)]
    subprocess.run(cython, check=True, timeout=LIMIT)
    library = tmp_path / f"fifo_counts{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = sysconfig.get_paths()["include"]
    compiler = ["gcc", "-O1", "-shared", "-fPIC", f"-I{include}", str(file.with_suffix(".c")), "-o", str(library)]
    subprocess.run(compiler, check=True, timeout=LIMIT)
    spec = importlib.util.spec_from_file_location("fifo_counts", library)
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    rows = np.zeros(100, PACKETS_2_4)
    rows["local_fifo"] = np.arange(100) % 4
    rows["packet_type"][:10] = 6
    counts = np.zeros(4, np.uint64)
    kernel.fifo_counts(rows, counts)
    assert counts.tolist() == np.bincount(rows["local_fifo"][10:]).tolist()
    with pytest.raises(ValueError, match="counts: expected 4, found 3"):
        kernel.fifo_counts(rows, counts[:3])
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        kernel.fifo_counts(rows[["io_group"]].copy(), counts)
