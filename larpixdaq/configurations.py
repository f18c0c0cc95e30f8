"""Configurations of chips on their way from a producer into the file: arrays, and what carries them in a block."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.blocks import Configs
from larpixdaq.errors import ProtocolError

#: Registers of a chip here; those that it does not have are 0 and not KNOWN.
REGISTERS: Final = 256
#: Bits of `known`: the register was told a value; it said one, and was not told another since.
SENT, READ = 1, 2
#: Of registers that differ, so many are named.
_NAMED: Final = 5
#: Chips of one block: some 200 kB before they are packed.
_PIECE: Final = 256


class Configurations(NamedTuple):
    """Of N chips of one generation (`asic`, as --asic has it). Bytes, of shape (N, 3): io_group, io_channel, chip_id;
    and three of shape (N, REGISTERS)."""

    asic: str
    chips: NDArray[np.uint8]
    sent: NDArray[np.uint8]
    read: NDArray[np.uint8]
    known: NDArray[np.uint8]

    @property
    def different(self) -> NDArray[np.bool_]:
        """Registers that said something else than they had been told, shape (N, REGISTERS)."""
        differ: NDArray[np.bool_] = (self.known == SENT | READ) & (self.sent != self.read)
        return differ

    def pieces(self) -> Iterator[Configurations]:
        """As many of them as fit a block."""
        for first in range(0, len(self.chips), _PIECE):
            part = slice(first, first + _PIECE)
            yield Configurations(self.asic, *(array[part] for array in self[1:]))

    def text(self) -> str:
        """What there is, in a line."""
        keys = ["-".join(map(str, chip)) for chip in self.chips[[0, -1]].tolist()]
        which = f"chip {keys[0]}" if len(self.chips) == 1 else f"{len(self.chips)} chips, {keys[0]} to {keys[1]}"
        told, said = (int(np.count_nonzero(self.known & bit)) for bit in (SENT, READ))
        differ = int(np.count_nonzero(self.different))
        return f"Configuration of {which}: {told} registers sent, {said} read back, {differ} different"

    def differences(self) -> str:
        """Which registers said something else than they had been told, in a line; empty when none did."""
        at = np.argwhere(self.different)
        named = [
            f"{'-'.join(map(str, self.chips[chip].tolist()))} register {register} was told {self.sent[chip, register]}"
            f" and says {self.read[chip, register]}"
            for chip, register in at[:_NAMED].tolist()
        ]
        more = f", and {len(at) - _NAMED} more" if len(at) > _NAMED else ""
        return f"chip {', '.join(named)}{more}" if named else ""

    def pack(self) -> Configs:
        arrays = np.stack(self[2:])
        return Configs(self.asic, self.chips.tobytes(), zlib.compress(arrays.tobytes(), 1))


def unpack(found: Configs) -> Configurations:
    """ProtocolError when that is none."""
    n, rest = divmod(len(found.chips), 3)
    size = 3 * n * REGISTERS
    if rest or not 0 < n <= _PIECE:
        raise ProtocolError(f"configurations: expected 1 to {_PIECE} chips of 3 bytes, found {len(found.chips)} bytes")
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(found.registers, size)
    except zlib.error as error:
        raise ProtocolError(f"configurations: {error}") from None
    if len(data) != size or decoder.decompress(decoder.unconsumed_tail, 1):
        raise ProtocolError(f"configurations: expected {size} bytes for {n} chips, found {len(data)} or more")
    sent, read, known = np.frombuffer(data, np.uint8).reshape(3, n, REGISTERS)
    return Configurations(found.asic, np.frombuffer(found.chips, np.uint8).reshape(n, 3), sent, read, known)
