"""Frames that fit their structs but make no sense: they must end neither a storage nor a monitor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from larpixdaq import constants, schema
from larpixdaq.errors import LarpixDaqError
from larpixdaq.monitor.monitor import Monitor
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import VERDICTS, Block, Configs, End, Gap, LossVerdict, Totals, UnknownWord
from larpixdaq.runtime.record_file import crc32
from larpixdaq.storage.service import StorageService

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of sums of invalid counts

SEQUENCE, COUNT, TIME, ANY = 2**48 - 1, 2**56 - 1, 2**63 - 1, 2**64 - 1


class FrameMaker:
    """Makes frames of a few origins, with values from all over their ranges."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def number(self, most: int) -> int:
        return self.random.choice([0, 1, 2, 5, most // 2, most])

    def some(self, make: Any) -> list[Any]:
        return [make() for _ in range(self.random.choice([0, 0, 1, 3]))]

    def source(self) -> tuple[int, str, int]:
        choose = self.random.choice
        return choose([1, 1, 2, 9_999_999]), choose(["board", "board", "é" * 64]), choose([1, 1, ANY])

    def gap(self) -> Gap:
        return Gap(self.number(255), self.number(COUNT), self.number(TIME), self.number(TIME))

    def counts(self) -> list[int]:
        return [self.random.choice([0, 1, 255, 256]), *(self.number(COUNT) for _ in constants.COUNTS)]

    def unknown(self) -> UnknownWord:
        return UnknownWord(self.number(255), self.number(ANY), self.number(255), bytes(self.random.randrange(25)))

    def verdict(self) -> LossVerdict:
        why = self.random.choice(["", "\0", "é" * 500])
        numbers = (self.number(ANY) for _ in range(3))
        return LossVerdict(self.number(255), self.random.choice(VERDICTS), why, *numbers)

    def end(self) -> End:
        return End(
            *self.source(), self.number(SEQUENCE), self.random.choice(["closed", "aborted", "recovered"]),
            self.number(TIME), self.number(TIME), self.some(self.counts), self.some(self.gap), self.some(self.unknown),
            self.some(self.counts), self.some(self.verdict),
        )  # fmt: skip

    def block(self) -> tuple[Block, memoryview]:
        layout = self.random.choice([schema.LAYOUTS[1], *schema.LAYOUTS])
        n = self.random.choice([0, 1, 50])
        text = self.random.choice([None, None, "", "\0", "x" * 1000])
        rows = np.zeros(n, layout.dtype)
        if text is None:
            rows = np.frombuffer(self.random.randbytes(rows.nbytes), layout.dtype)
        else:
            rows[schema.type_column(layout.dtype)] = schema.PacketType.MESSAGE
        payload = rows.tobytes() + bytes(self.random.choice([0, 0, 0, 36]))
        configs = Configs("2", self.random.randbytes(self.number(4)), b"x") if self.random.random() < 0.1 else None
        totals = [
            Totals(group, *(self.number(COUNT) for _ in range(5))) for group in self.some(lambda: self.number(255))
        ]
        block = Block(
            *self.source(), self.number(SEQUENCE), self.number(COUNT), self.random.choice([n, n, 16_384]), layout.code,
            self.number(2**32 - 1), self.number(TIME), self.number(TIME), crc32(payload), totals,
            self.some(self.gap), text, configs,
        )  # fmt: skip
        return block, memoryview(payload)


@pytest.mark.parametrize("seed", range(3))
def test_no_frame_that_fits_its_struct_harms_storage_or_monitor(tmp_path: Path, seed: int) -> None:
    maker = FrameMaker(seed)
    storage, monitor = StorageService(tmp_path, "Offline storage", ""), Monitor()
    refused = 0
    for turn in range(100):
        frame, payload = (maker.end(), None) if turn % 4 == 0 else maker.block()
        arrived = stream.unpack_producer(stream.pack(frame), "a producer")
        storage.receive("a producer", arrived, payload)
        storage.work()
        try:
            if isinstance(arrived, Block):
                monitor.block(arrived, payload)
            else:
                monitor.end(arrived)
        except LarpixDaqError:
            refused += 1
        monitor.status()
        monitor.packet_rate()
    assert 0 < refused < 100
    assert storage.status().rows
    storage.close()
    assert list(tmp_path.glob("run0000001_*.h5"))
