"""What the registers of each chip generation are: names, places and power-up values, as larpix-control has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: How larpix-control calls the chip generations.
VERSIONS: Final[dict[str, Any]] = {"1": 1, "2": 2, "2b": "2b", "lightpix-1": "lightpix-v1.0", "3": "2b"}
#: Where v2 and v2b have one thing under two names, or v1 has its own, the names used here.
_NAMES: Final = {
    "enable_miso_upstream": "enable_piso_upstream",
    "enable_miso_downstream": "enable_piso_downstream",
    "enable_mosi": "enable_posi",
    "pixel_trim_thresholds": "pixel_trim_dac",
    "global_threshold": "threshold_global",
    "csa_testpulse_dac_amplitude": "csa_testpulse_dac",
    "cross_trigger_mode": "enable_cross_trigger",
    "periodic_reset": "enable_periodic_reset",
    "reset_cycles": "periodic_reset_cycles",
}


class Field(NamedTuple):
    """Bits `low` to `high` of all registers, bit 0 first; `items` equal parts of a list, 0: one number."""

    low: int
    high: int
    items: int = 0

    def values(self, registers: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Of registers of shape (chips, 256): shape (chips,) or (chips, items)."""
        first = self.low // 8
        part = np.ascontiguousarray(registers[:, first : (self.high + 7) // 8])
        bits = np.unpackbits(part, axis=1, bitorder="little")[:, self.low - 8 * first : self.high - 8 * first]
        parts = bits.reshape(len(bits), max(self.items, 1), -1).astype(np.int64)
        found: NDArray[np.int64] = parts @ (1 << np.arange(parts.shape[2]))
        return found if self.items else found[:, 0]


@dataclass(frozen=True)
class RegisterMap:
    """`defaults`: shape (256,), power-up values; registers from `count` on do not exist."""

    count: int
    channels: int
    defaults: NDArray[np.uint8]
    fields: dict[str, Field]

    def address(self, name: str) -> int:
        """The first register that holds (a part of) this."""
        return self.fields[name].low // 8


@cache
def register_map(asic: str) -> RegisterMap:
    """Of a chip generation, one of `schema.ASICS`. v3 has v2b's: larpix-control does not know v3."""
    from larpix import Chip  # here, because it takes a second

    chip: Any = Chip("1-1-1", version=VERSIONS[asic])
    config = chip.config
    defaults = np.zeros(256, np.uint8)
    for packet in chip.get_configuration_write_packets():  # all_data() of LightPix leaves two registers out
        defaults[packet.register_address] = packet.register_data
    fields = {}
    for name, (low, high) in (_v1_bits(config) if asic == "1" else config.bit_map).items():
        value = getattr(config, name)
        fields[_NAMES.get(name, name)] = Field(low, high, len(value) if isinstance(value, list) else 0)
    return RegisterMap(config.num_registers, config.num_channels, defaults, fields)


def _v1_bits(config: Any) -> dict[str, tuple[int, int]]:
    """Its class has addresses under names of their own, and no bits for those that share a register."""
    shared = 8 * config.test_mode_xtrig_reset_diag_address
    bits = {"cross_trigger_mode": (shared + 2, shared + 3), "periodic_reset": (shared + 3, shared + 4)}
    for name in config.register_names:
        address = getattr(config, f"{name}_address", None)
        addresses = [address] if address is not None else getattr(config, f"{name}_addresses", None)
        if name == "pixel_trim_thresholds":
            addresses = config.pixel_trim_threshold_addresses
        elif name == "global_threshold":
            addresses = [config.global_threshold_address]
        if addresses:
            bits[name] = (8 * addresses[0], 8 * addresses[-1] + 8)
    return bits
