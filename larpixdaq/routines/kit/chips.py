"""Registers of many chips at once, by what they are for: the generations of the chips call them differently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Seconds that a chip's registers take to come back, through an IO that is not the DAQ's.
_PER_CHIP: Final = 0.05
#: What it is for -> what larpix-control's configurations call it.
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
    "cross_trigger": ("enable_cross_trigger", "cross_trigger_mode"),
    "testpulse_enable": ("csa_testpulse_enable",),
    "testpulse_dac": ("csa_testpulse_dac", "csa_testpulse_dac_amplitude"),
}
#: The values with which channels trigger themselves alone.
_UNTRIGGERED: Final = {"periodic_trigger": 0, "rolling_trigger": 0, "cross_trigger": 0, "external_trigger_mask": 1}


class Chips:
    """`keys`: chip keys, those asked for or all that the Controller has. What set() changes goes to the chips at once;
    restore() brings back what was there in the beginning. KeyError for a chip that the Controller does not have."""

    def __init__(self, controller: Any, keys: Sequence[str] | str | None = None) -> None:
        known = [str(key) for key in controller.chips]
        asked = [keys] if isinstance(keys, str) else known if keys is None else [str(key) for key in keys]
        strangers = sorted(set(asked) - set(known))
        if strangers:
            raise KeyError(f"no chip {', '.join(strangers)}; load_board() says which there are ({len(known)} now)")
        if not asked:
            raise ValueError("no chips: load_board(file) says which there are")
        self.controller = controller
        self.keys = asked
        self._configs = [controller[key].config for key in asked]
        self._sent = self._data()
        self._before: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def channels(self) -> int:
        """Of a chip."""
        return len(self.get("mask")[0])

    def has(self, what: str) -> bool:
        """Whether these chips have a register for this."""
        return any(hasattr(self._configs[0], name) for name in NAMES[what])

    def get(self, what: str) -> NDArray[np.int64]:
        """Values as the Controller has them: shape (chips,), or (chips, channels)."""
        return np.array([getattr(config, self._name(what)) for config in self._configs], np.int64)

    def set(self, **values: Any) -> None:
        """For each thing named: one value for all, one for each chip, or one for each channel of each."""
        self._set(values)

    def _set(self, values: dict[str, Any], *, anew: bool = False) -> None:
        """`anew`: these registers are sent also if the chips ought to have the values."""
        for what, new in values.items():
            name = self._name(what)
            now = self.get(what)
            self._before.setdefault(name, now.tolist())
            new = np.asarray(new, np.int64)  # v1 configurations take no bool
            if new.ndim == 1 and now.ndim == 2:
                new = new[:, None]
            self._put(name, np.broadcast_to(new, now.shape).tolist())
        self._send([self._name(what) for what in values] if anew else [])

    def unmasked(self) -> Chips:
        """These, if each has a channel that is not masked; ValueError names those that have none."""
        masks = self.get("mask")
        silent = [key for place, key in enumerate(self.keys) if masks[place].all()]
        if silent:
            more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            raise ValueError(
                f"chip {', '.join(silent[:3])}{more}: all channels are masked, as they are at power-up; "
                f"send_configuration({{'all': {{'channel_mask': [0] * {self.channels}}}}}) opens them"
            )
        return self

    @contextlib.contextmanager
    def untriggered(self) -> Iterator[None]:
        """Periodic, external and cross triggers of these chips are off meanwhile, and as they were after that.

        The registers are written whatever they ought to hold: a routine that was ended may have left them otherwise.
        """
        off = {what: value for what, value in _UNTRIGGERED.items() if self.has(what)}
        before = {what: self.get(what) for what in off}
        try:
            self._set(off, anew=True)
            yield
        finally:
            self._set(before)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """What set() has changed is as it was after that, also when it fails."""
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        for name, values in self._before.items():
            self._put(name, values)
        self._send()

    def write(self) -> None:
        """All registers, whatever the chips have."""
        self._write(np.ones(self._sent.shape, np.bool_))

    def different(self) -> dict[str, dict[str, list[int | None]]]:
        """Reads all registers back: {chip: {register: [what it ought to hold, what it does]}}, None without an
        answer."""
        io = self.controller.io
        if not hasattr(io, "read_registers"):
            _, wrong = self.controller.verify_configuration(self.keys, timeout=1 + _PER_CHIP * len(self))
            return {str(key): {str(at): list(values) for at, values in found.items()} for key, found in wrong.items()}
        values, answered = io.read_registers(self.keys, np.ones(self._sent.shape, np.bool_))
        listed: dict[str, dict[str, list[int | None]]] = {}
        for place, address in np.argwhere(~answered | (values != self._sent)).tolist():
            found = int(values[place, address]) if answered[place, address] else None
            listed.setdefault(self.keys[place], {})[str(address)] = [int(self._sent[place, address]), found]
        return listed

    def _name(self, what: str) -> str:
        for name in NAMES[what]:
            if hasattr(self._configs[0], name):
                return name
        raise ValueError(f"these chips have no register for {what.replace('_', ' ')}")

    def _put(self, name: str, values: Sequence[Any]) -> None:
        for config, value in zip(self._configs, values, strict=True):
            setattr(config, name, value)

    def _send(self, anew: Sequence[str] = ()) -> None:
        """What the chips do not have yet, in one piece, and the registers of these names. (Through an IO that is not
        the DAQ's nobody but this Controller sends anything.)"""
        before, self._sent = self._sent, self._data()
        which = self._sent != before
        if anew and hasattr(self.controller.io, "registers"):
            addresses = self.controller.io.registers.addresses
            which[:, [address for name in anew for address in addresses[name]]] = True
        self._write(which)

    def _write(self, which: NDArray[np.bool_]) -> None:
        if hasattr(self.controller.io, "write_registers"):
            self.controller.io.write_registers(self.keys, self._sent, which)
            return
        packets = []
        for key, mine in zip(self.keys, which, strict=True):
            if mine.any():
                packets += self.controller[key].get_configuration_write_packets(np.flatnonzero(mine).tolist())
        if packets:
            self.controller.send(packets)

    def _data(self) -> NDArray[Any]:
        """What the registers hold, (chips, registers): numbers, or texts of bits with an IO that is not the DAQ's."""
        if hasattr(self.controller.io, "registers"):
            data: NDArray[np.uint8] = self.controller.io.registers.of_all(self._configs)
            return data
        return np.array([[bits.to01() for bits in _bits(config)] for config in self._configs])


def _bits(config: Any) -> list[Any]:
    """Of all registers, by address: all_data() of LightPix leaves some out."""
    if not hasattr(config, "some_data"):  # v1
        return list(config.all_data())
    return list(config.some_data(range(config.num_registers))[1])
