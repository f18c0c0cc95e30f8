"""Registers of many chips at once, by names that are the same for all generations of chips."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Seconds to read the registers of a chip through an IO without a producer.
_PER_CHIP: Final = 0.05
#: Name here -> names of the register in larpix-control's Configuration classes.
NAMES: Final = {
    "threshold": ("threshold_global", "global_threshold"),
    "trim": ("pixel_trim_dac", "pixel_trim_thresholds"),
    "mask": ("channel_mask",),
    "periodic_reset": ("enable_periodic_reset", "periodic_reset"),
    "periodic_trigger": ("enable_periodic_trigger",),
    "periodic_trigger_cycles": ("periodic_trigger_cycles",),
    "periodic_trigger_mask": ("periodic_trigger_mask",),
    "rolling_trigger": ("enable_rolling_periodic_trigger",),
    "external_trigger_mask": ("external_trigger_mask",),
    "hit_veto": ("enable_hit_veto",),
    "burst": ("adc_burst_length",),
    "cross_trigger": ("enable_cross_trigger", "cross_trigger_mode"),
    "testpulse_enable": ("csa_testpulse_enable",),
    "testpulse_dac": ("csa_testpulse_dac", "csa_testpulse_dac_amplitude"),
    "vref": ("vref_dac",),
    "vcm": ("vcm_dac",),
}
#: Commands to boards from which pulse() waits until the boards have accepted them.
_POSTED: Final = 200
#: Counts of the chips' 8-bit DACs, and of the ADC of v2 chips.
COUNTS: Final = 256
#: Register values that switch off all triggers but natural ones, and bursts, so that each trigger is one packet.
_UNTRIGGERED: Final = {
    "periodic_trigger": 0,
    "rolling_trigger": 0,
    "cross_trigger": 0,
    "external_trigger_mask": 1,
    "burst": 0,
}


class Chips:
    """Registers of the chips `keys` (a chip key, several, or None: all chips of the Controller).

    set() changes registers in the Controller and in the chips at once; restore() undoes all changes. KeyError for a
    chip that the Controller does not have.
    """

    def __init__(self, controller: Any, keys: Sequence[str] | str | None = None) -> None:
        loaded = [str(key) for key in controller.chips]
        requested = [keys] if isinstance(keys, str) else loaded if keys is None else [str(key) for key in keys]
        unknown = sorted(set(requested) - set(loaded))
        if unknown:
            raise KeyError(f"no chip {', '.join(unknown)}; load_board(file) loads chips ({len(loaded)} are loaded)")
        if not requested:
            raise ValueError("no chips: load_board(file) loads them")
        self.controller = controller
        self.keys = requested
        self._configs = [controller[key].config for key in requested]
        self._sent = self._data()
        self._original: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def channels(self) -> int:
        """Number of channels of a chip."""
        return len(self.get("mask")[0])

    @property
    def registers(self) -> int:
        """Number of registers of a chip."""
        return int(self._sent.shape[1])

    @property
    def adc_counts(self) -> int:
        """Number of ADC counts: 256 of v2 chips, which alone have vcm_dac, 1,024 of others."""
        return COUNTS if self.has("vcm") else 1024

    def has(self, what: str) -> bool:
        """Whether these chips have a register of this name, one of NAMES."""
        return any(hasattr(self._configs[0], name) for name in NAMES[what])

    def get(self, what: str) -> NDArray[np.int64]:
        """Return the values in the Controller, shape (chips,) or (chips, channels)."""
        return np.array([getattr(config, self._name(what)) for config in self._configs], np.int64)

    def set(self, **values: Any) -> None:
        """Set registers by name: one value for all chips, one for each chip, or one for each channel of each chip."""
        self._set(values)

    def _set(self, values: dict[str, Any], *, resend: bool = False) -> None:
        """`resend`: send these registers even if the chips should have the values already."""
        for what, new in values.items():
            name = self._name(what)
            current = self.get(what)
            self._original.setdefault(name, current.tolist())
            new = np.asarray(new, np.int64)  # v1 configurations take no bool
            if new.ndim == 1 and current.ndim == 2:
                new = new[:, None]
            self._put(name, np.broadcast_to(new, current.shape).tolist())
        self._send([self._name(what) for what in values] if resend else [])

    def off(self, leave_off: Mapping[str, Sequence[int]] | None) -> NDArray[np.bool_]:
        """Return which channels are in `leave_off` {chip: [channel, ...]}, shape (chips, channels).

        Other chips of the Controller may be in it, too. ValueError names a chip or channel that does not exist.
        """
        return left_off(leave_off, self.keys, self.channels, [str(key) for key in self.controller.chips])

    def open(self, leave_off: Mapping[str, Sequence[int]] | None) -> NDArray[np.bool_]:
        """Mask the channels in `leave_off` and unmask all others; with None leave the masks, as unmasked().

        Returns the masked channels, shape (chips, channels).
        """
        if leave_off is None:
            return self.unmasked().get("mask").astype(np.bool_)
        off = self.off(leave_off)
        self.set(mask=off)
        return off

    def raise_thresholds(self, steps: int) -> None:
        """Raise the global thresholds by `steps`, at most to 255; ValueError if it is not 0 to 255."""
        if not 0 <= steps <= 255:
            raise ValueError(f"raise_by: expected 0 to 255, found {steps}")
        if steps:
            self.set(threshold=np.minimum(self.get("threshold") + steps, 255))

    def lines(self) -> list[str]:
        """Return "io_group-io_channel" of each chip."""
        return [key.rpartition("-")[0] for key in self.keys]

    def adc_scale(self, vdda_mv: float) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return the voltage at ADC count 0 and the step of the ADC from vref_dac and vcm_dac, in mV, shape (chips, 1).

        None for chips without these registers. `vdda_mv`: the analog supply, from which the DACs make the references.
        """
        if not (self.has("vref") and self.has("vcm")):
            return None
        low, high = (self.get(what)[:, None] * vdda_mv / COUNTS for what in ("vcm", "vref"))
        return low, (high - low) / COUNTS

    def pulse(
        self, high: int, low: int, number: int, pause: float, groups: Sequence[NDArray[np.bool_]] | None = None
    ) -> None:
        """Let the test pulse DAC of chips fall from `high` to `low` and rise again, `number` times.

        The DAC must be `high`, as it is afterwards. `pause`: seconds between two pulses of a chip. `groups`: chips that
        get their pulses one group after the other, each of shape (chips,); None: all chips together.
        """
        parts = [np.ones(len(self), np.bool_)] if groups is None else groups
        risen, name = self._sent, self._name("testpulse_dac")
        self._put(name, [low] * len(self))
        fallen = self._data()
        self._put(name, [high] * len(self))
        marked = fallen != risen
        io = self.controller.io
        posted: list[int] = []
        for _ in range(number):
            for part in parts:
                for values in (fallen, risen):
                    if hasattr(io, "post_registers"):  # set() would compare all registers of all chips, and wait
                        posted += io.post_registers(self.keys, values, marked & part[:, None])
                    else:
                        self.set(testpulse_dac=np.where(part & (values is fallen), low, high))
                time.sleep(pause / len(parts))
            if len(posted) > _POSTED:
                io.await_posted(posted)
                posted = []
        if posted:
            io.await_posted(posted)

    def unmasked(self) -> Chips:
        """Return these chips; ValueError names chips of which all channels are masked."""
        masks = self.get("mask")
        silent = [key for index, key in enumerate(self.keys) if masks[index].all()]
        if silent:
            more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            raise ValueError(
                f"chip {', '.join(silent[:3])}{more}: all channels are masked, as they are at power-up; "
                f"send_configuration({{'all': {{'channel_mask': [0] * {self.channels}}}}}) unmasks them"
            )
        return self

    @contextlib.contextmanager
    def untriggered(self) -> Iterator[None]:
        """Turn off periodic, external and cross triggers and bursts inside the `with` block, and restore them after it.

        The registers are written in any case, because an aborted routine may have left other values in the chips.
        """
        off = {what: value for what, value in _UNTRIGGERED.items() if self.has(what)}
        previous = {what: self.get(what) for what in off}
        try:
            self._set(off, resend=True)
            yield
        finally:
            self._set(previous)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore all registers that set() has changed at the end of the `with` block, also after an exception."""
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Restore all registers that set() has changed."""
        for name, values in self._original.items():
            self._put(name, values)
        self._send()

    def write(self) -> None:
        """Write all registers, also those that the chips should have already."""
        self._write(np.ones(self._sent.shape, np.bool_))

    def different(self) -> dict[str, dict[str, list[int | None]]]:
        """Read all registers back; returns {chip: {register: [expected, found]}}, found None without an answer."""
        io = self.controller.io
        if not hasattr(io, "read_registers"):
            _, wrong = self.controller.verify_configuration(self.keys, timeout=1 + _PER_CHIP * len(self))
            return {
                str(key): {str(at): list(pair) for at, pair in registers.items()} for key, registers in wrong.items()
            }
        mask = np.tile(~io.registers.counted, (len(self), 1))  # without registers in which chips count themselves
        values, answered = io.read_registers(self.keys, mask)
        table: dict[str, dict[str, list[int | None]]] = {}
        for index, address in np.argwhere(mask & (~answered | (values != self._sent))).tolist():
            found = int(values[index, address]) if answered[index, address] else None
            table.setdefault(self.keys[index], {})[str(address)] = [int(self._sent[index, address]), found]
        return table

    def _name(self, what: str) -> str:
        for name in NAMES[what]:
            if hasattr(self._configs[0], name):
                return name
        raise ValueError(f"these chips have no register for {what.replace('_', ' ')}")

    def _put(self, name: str, values: Sequence[Any]) -> None:
        for config, value in zip(self._configs, values, strict=True):
            setattr(config, name, value)

    def _send(self, resend: Sequence[str] = ()) -> None:
        """Send all registers that have changed, and those named in `resend`, together.

        Without a producer `resend` has no effect, because only this Controller writes to the chips.
        """
        previous, self._sent = self._sent, self._data()
        marked = self._sent != previous
        if resend and hasattr(self.controller.io, "registers"):
            addresses = self.controller.io.registers.addresses
            marked[:, [address for name in resend for address in addresses[name]]] = True
        self._write(marked)

    def _write(self, marked: NDArray[np.bool_]) -> None:
        if hasattr(self.controller.io, "write_registers"):
            self.controller.io.write_registers(self.keys, self._sent, marked)
            return
        packets = []
        for key, changed in zip(self.keys, marked, strict=True):
            if changed.any():
                packets += self.controller[key].get_configuration_write_packets(np.flatnonzero(changed).tolist())
        if packets:
            self.controller.send(packets)

    def _data(self) -> NDArray[Any]:
        """Return the register values, (chips, registers): numbers, or texts of bits for an IO without a producer."""
        if hasattr(self.controller.io, "registers"):
            data: NDArray[np.uint8] = self.controller.io.registers.values_of_all(self._configs)
            return data
        return np.array([[bits.to01() for bits in _bits(config)] for config in self._configs])


def left_off(
    leave_off: Mapping[str, Sequence[int]] | None, keys: Sequence[str], channels: int, known: Sequence[str]
) -> NDArray[np.bool_]:
    """Return which channels are in `leave_off` {chip: [channel, ...]}, shape (keys, channels).

    ValueError names a chip that is not in `known`, or a channel that a chip does not have.
    """
    off = np.zeros((len(keys), channels), np.bool_)
    for key, listed in (leave_off or {}).items():
        if key not in known or not all(0 <= channel < channels for channel in listed):
            raise ValueError(f"leave_off: {key}: expected a chip and its channels, found {listed}")
        if key in keys:
            off[keys.index(key), list(listed)] = True
    return off


def per_channel(
    what: str, values: Mapping[str, Sequence[float | None]] | None, keys: Sequence[str], channels: int
) -> NDArray[np.float64]:
    """Return `values` {chip: [value of each channel]} as an array, shape (keys, channels), NaN where none is known.

    ValueError, with `what`, if a chip has another number of values.
    """
    result = np.full((len(keys), channels), np.nan)
    for at, key in enumerate(keys):
        row = (values or {}).get(key)
        if row is not None:
            if len(row) != channels:
                raise ValueError(f"{what}: {key}: expected {channels} values, found {len(row)}")
            result[at] = [np.nan if value is None else value for value in row]
    return result


def _bits(config: Any) -> list[Any]:
    """Return the bits of all registers, by address. (all_data() of LightPix leaves some out.)"""
    if not hasattr(config, "some_data"):  # v1
        return list(config.all_data())
    return list(config.some_data(range(config.num_registers))[1])
