"""Bern source: the messages of the board's documentation, over a real socket."""

from __future__ import annotations

import pytest
import zmq
from emulated_board import context
from source_driver import Driver

from larpixdaq import schema
from larpixdaq.sources import bern
from larpixdaq.sources.bern import BernSource


def test_messages_of_all_types_become_rows(monkeypatch):
    monkeypatch.setattr(bern, "SILENCE", 0.3)
    with context() as ctx:
        out = ctx.socket(zmq.XPUB)
        port = out.bind_to_random_port("tcp://127.0.0.1")
        source = BernSource(2, "127.0.0.1", port)
        assert source.layout.name == "2.4"
        source.open()
        try:
            driver = Driver(source)
            assert out.poll(10_000), "no subscription came"
            out.recv()
            out.send(bytes.fromhex("0100540000000000") + (1_700_000_000).to_bytes(8, "little"))
            out.send(bytes.fromhex("0100484842000000"))
            out.send(bytes.fromhex("0100440400000000") + bytes.fromhex("5004bc5e5a8023c0") * 3)
            out.send(b"garbage")
            driver.until(lambda: driver.count("rejected_messages", 2) == 1, "four messages")
            rows = driver.rows
            assert rows["packet_type"].tolist() == [4, 0, 0, 0]
            assert rows["timestamp"].tolist() == [1_700_000_000] + [5_922_492] * 3
            assert rows["io_channel"].tolist() == [0, 4, 4, 4]
            assert set(rows["io_group"].tolist()) == {2}
            assert driver.count("bytes_in", 2) == 16 + 8 + 32 + 7
            driver.until(lambda: driver.problems, "the silence")
            assert driver.problems == [f"Bern board io_group 2 at tcp://127.0.0.1:{port}: silent for 0.3 s"]
        finally:
            source.close()


@pytest.mark.parametrize("asic", [schema.Asic.V1, schema.Asic.V3])
def test_layouts(asic):
    assert BernSource(1, "127.0.0.1", asic=asic).layout == schema.layout_of(asic)
