"""Names of larpix-control 2 that are gone, and what to write today. With an underscore, because it is no routine file.

A routine that uses such a name fails with an error that says today's name (`advice()`). Only PacketCollection.extract()
ignores names that no packet has, so that an old routine finds no hits and ends with "success": `refuse_unknown_names()`
makes this an error too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

#: What to write today, by former name: of the Controller and modules, of packets, of registers of v2 chips.
_TODAY: Final = {
    "get_chip": "controller[chip_key]",
    "all_chips": "controller.chips",
    "use_all_chips": "controller.chips",
    "read_channel_pedestal": "the routine pedestal of larpix-daq",
    "load_daisy_chain": "controller.load(file), with a network file",
    "larpix.quickstart": "Operator.load_board(file) and the routine quickstart of larpix-daq",
    "larpix.serial_helpers": "larpixdaq.operator for runs, and their files",
    # extract() of larpix-control 2 took the names of Packet.export()
    "adc_counts": "dataword",
    "channel": "channel_id",
    "chipid": "chip_id",
    "type": "packet_type (0 data, 1 test, 2 configuration write, 3 configuration read)",
    "type_str": "packet_type (0 data, 1 test, 2 configuration write, 3 configuration read)",
    "register": "register_address",
    "value": "register_data",
    "valid_parity": "packet.has_valid_parity()",
    "parity_bit_value": "parity",
    "fifo_half": "local_fifo_half (v1: fifo_half_flag)",
    "fifo_full": "local_fifo_full (v1: fifo_full_flag)",
    "fifo_half_flag": "local_fifo_half",
    "fifo_full_flag": "local_fifo_full",
    # registers of v1 chips, as v2 chips have them
    "pixel_trim_thresholds": "pixel_trim_dac, a list of 64",
    "global_threshold": "threshold_global",
    "csa_bypass": "csa_bypass_enable",
    "csa_testpulse_dac_amplitude": "csa_testpulse_dac",
    "test_mode": "test_mode_uart0 to test_mode_uart3",
    "cross_trigger_mode": "enable_cross_trigger",
    "periodic_reset": "enable_periodic_reset",
    "fifo_diagnostic": "enable_fifo_diagnostics",
    "reset_cycles": "periodic_reset_cycles",
    # registers of v2 chips, as v2b chips have them
    "enable_miso_upstream": "enable_piso_upstream of v2b chips",
    "enable_miso_downstream": "enable_piso_downstream of v2b chips",
    "enable_mosi": "enable_posi of v2b chips",
}
#: Class attributes with addresses of registers, such as Configuration.channel_mask_addresses.
_ADDRESS: Final = re.compile(r"(\w+)_address(?:es)?")
_UNKNOWN_REGISTER: Final = " is not a known register"


def advice(error: BaseException) -> str:
    """Return what to write in place of the name that this error misses: " (today: dataword)", or ""."""
    name = _missing_name(error)
    today = _TODAY.get(name)
    if today is None and (address := _ADDRESS.fullmatch(name)):
        register = _TODAY.get(address[1], address[1]).partition(",")[0]
        today = f"the register's name, as in write_configuration(chip_key, {register!r})"
    return f" (today: {today})" if today else ""


def _missing_name(error: BaseException) -> str:
    text = error.args[0] if error.args and isinstance(error.args[0], str) else ""  # str(error) may raise anything
    if isinstance(error, AttributeError) and error.name:
        owner = error.obj if isinstance(error.obj, type) else type(error.obj)
        return error.name if any(base.__module__.partition(".")[0] == "larpix" for base in owner.__mro__) else ""
    if isinstance(error, AttributeError):
        name, unknown, _ = text.partition(_UNKNOWN_REGISTER)
        return name if unknown else ""
    if isinstance(error, ImportError):
        quoted = re.search(r"'([\w.]+)'", text)
        return quoted[1] if quoted else ""
    return ""


def refuse_unknown_names(collection: Any, packets: Iterable[Any], names: Iterable[str] = ()) -> None:
    """Let extract() of this class of larpix-control raise AttributeError for names that no packet has.

    `packets`: one packet of each kind that a collection can hold. `names`: further names that packets can have. Only
    the first call for a class has an effect.
    """
    if collection.extract.__module__ == __name__:
        return
    known = {*names, *(name for packet in packets for name in dir(packet))}
    extract: Callable[..., list[Any]] = collection.extract

    def checked(self: Any, *names: str, **selection: Any) -> list[Any]:
        for name in (*names, *selection):
            if name not in known and not any(hasattr(packet, name) for packet in self.packets):
                raise AttributeError(f"extract: packets have no {name!r}", name=name, obj=self)
        return extract(self, *names, **selection)

    collection.extract = checked
