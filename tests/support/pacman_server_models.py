"""Models of the registers of PACMAN command servers, one class a revision, written from the servers' sources.

They are independent of larpixdaq.hardware.pacman_registers on purpose. A model has DACs and enable bits, computes the
voltages from them, and records writes and seconds slept. Requests that crash the real server raise Crash.
"""

from __future__ import annotations

import struct

from larpixdaq.protocol import hardware
from larpixdaq.schema import Asic

WORD = struct.Struct("<c3xI4xI")
#: Volts of VDDA and VDDD of a tile for each DAC count, by revision.
SLOPE = {2: 1.8 / 54_691, 3: 1 / 25_700, 4: 1 / 25_700, 5: 1 / 26_500}


class Crash(Exception):
    pass


class Model:
    revision = 0
    tiles = 8
    window = 0x1000

    def __init__(self, firmware: int = 0) -> None:
        self.fpga = {0x0: firmware, 0x10: 0, 0x14: 0, 0x1000: 0b1011, 0x1010: 2, 0x1014: 256, 0x1018: 10**9}
        self.dac = {(supply, tile): 0 for supply in "AD" for tile in range(self.tiles)}
        self.writes: list[tuple[int, int]] = []
        self.slept = 0.0
        self.i2c_broken = False
        self.stuck: dict[int, int] = {}  # FPGA registers that keep this value

    def word(self, word: bytes) -> bytes:
        kind, register, value = WORD.unpack(word)
        if kind == b"P":
            return word
        if register < 0x24000:
            if kind == b"W":
                self.writes.append((register, value))
                self.fpga[register] = self.stuck.get(register, value)
            return WORD.pack(kind, register, value if kind == b"W" else self.fpga.get(register, 0))
        if register >= 0x24000 + self.window:
            raise Crash(f"register 0x{register:x}")
        if kind == b"W":
            self.writes.append((register, value))
            if not self.i2c_broken:
                self.write(register - 0x24000, value & 0xFFFF)
            return WORD.pack(kind, register, value)
        return WORD.pack(kind, register, self.read(register - 0x24000))

    def mv(self, supply: str, tile: int) -> float:
        on = self.fpga[0x10] >> tile & 1 and (self.fpga[0x14] & 1 or self.revision == 2)
        return 1000 * self.dac[supply, tile] * SLOPE[self.revision] if on else 0.0

    def write(self, offset: int, value: int) -> None:
        raise NotImplementedError

    def read(self, offset: int) -> int:
        raise NotImplementedError


def ina219(mv: float) -> int:
    return int(mv / 4) << 19


class Rev2(Model):
    revision, tiles = 2, 1

    def write(self, offset: int, value: int) -> None:
        if offset in (0x001, 0x011):  # CODE_LOAD of the two DACs; other registers of these chips are not modelled
            self.dac["D" if offset == 0x001 else "A", 0] = value

    def read(self, offset: int) -> int:
        counts = {0x021: 100 << 16, 0x031: 0xFFF6 << 16, 0x041: 30 << 16}
        volts = {0x022: 12_000.0, 0x032: self.mv("D", 0), 0x042: self.mv("A", 0)}
        return ina219(volts[offset]) if offset in volts else counts.get(offset, 0)


class Rev3(Model):
    revision = 3
    window = 0x2000

    def write(self, offset: int, value: int) -> None:
        if 0x130 <= offset < 0x140:
            self.dac["AD"[offset & 1], (offset & 0xF) >> 1] = value

    def read(self, offset: int) -> int:
        if 0x190 <= offset < 0x1A0:
            return self.dac["AD"[offset & 1], (offset & 0xF) >> 1] << 16
        if offset < 0x100 and offset & 0xF == 2:
            return ina219(self.mv("AD"[offset >> 4 & 1], offset >> 5))
        if offset < 0x100 and offset & 0xF == 1:
            return 40 << 16
        return 0


class Rev4(Model):
    revision = 4

    def write(self, offset: int, value: int) -> None:
        if offset >> 4 in (1, 2):
            self.dac["AD"[(offset >> 4) - 1], offset & 0xF] = value

    def read(self, offset: int) -> int:
        tile = offset & 0xF
        if offset >> 4 in (4, 6):
            self.slept += 1
        return {
            3: lambda: int(self.mv("A", tile) / 4) * 4,
            4: lambda: int(self.mv("D", tile)) or 7999,  # a count just below 0
            5: lambda: 0xFFFF - 9,  # -10
            6: lambda: 400 << 12,
        }.get(offset >> 4, lambda: 0)()


class Rev5(Rev4):
    revision, tiles = 5, 10

    def word(self, word: bytes) -> bytes:
        kind, register, value = WORD.unpack(word)
        if register >= 0x24000:  # masked to 12 bits
            word = WORD.pack(kind, 0x24000 | register & 0xFFF, value)
        return super().word(word)

    def read(self, offset: int) -> int:
        tile = offset & 0xF
        return {
            3: lambda: int(self.mv("A", tile)),
            4: lambda: int(self.mv("D", tile)),
            5: lambda: 400,
            6: lambda: 800,
            0x22: lambda: (5, 2, 0xABCD)[tile] if tile < 3 else 0,
        }.get(offset >> 4, lambda: 0)()


MODELS = {2: Rev2, 3: Rev3, 4: Rev4, 5: Rev5}


class Boards:
    """Stands in for the child's ProducerPipe; a model for each board. `requests`: io_group, words, time limit (s)."""

    def __init__(self, models, configured, generation=Asic.V2, asic="2", power_settings="", uarts=0):
        self.models = models
        boards = [
            hardware.BoardInfo(group, "pacman", f"PACMAN io_group {group}", configured[group], uarts)
            for group in models
        ]
        self.setup = hardware.Setup(boards, asic, int(generation), 2, power_settings=power_settings)
        self.invalidated = []
        self.requests = []
        self.sent = []

    def ask(self, io_group, body, seconds=0.0):
        model = self.models[io_group]
        before = model.slept
        answer = b"".join(model.word(body[at : at + 16]) for at in range(0, len(body), 16))
        assert model.slept - before <= seconds, "the board sleeps longer than this request may take"
        self.requests.append((io_group, len(body) // 16, seconds))
        return answer

    def post(self, io_group, body, seconds=0.0):
        return io_group, body, seconds

    def await_answer(self, number):
        return self.ask(*number)

    def send(self, message):
        self.sent.append(message)

    def invalidate(self, io_groups):
        self.invalidated += io_groups
