"""Configures Hydra networks with the steps of larpix-control, in the order of the network, root chips first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from larpixdaq.errors import RequestError
from larpixdaq.schema import key_of

#: Registers that define a network. A generation has some of them.
NETWORK: Final = (
    "chip_id", "enable_miso_upstream", "enable_miso_downstream", "enable_miso_differential", "enable_mosi",
    "enable_piso_upstream", "enable_piso_downstream", "enable_posi",
)  # fmt: skip

_UPSTREAM: Final = ("enable_miso_upstream", "enable_piso_upstream")
_Loaded = TypeVar("_Loaded")


def load_with_included(file: str, load: Callable[[str], _Loaded]) -> _Loaded:
    """Return load(file), where `load` reads a board file by larpix-control, and finds the files that it includes.

    larpix-control looks for them in the working directory and in its package, and laboratories keep them beside the
    file: these are found, too. Raises what `load` raises, OSError for a file that is in neither of these places.
    """
    try:
        return load(file)
    except OSError:
        path = Path(file)
        if not path.is_file():
            raise
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        return load(path.name)
    finally:
        os.chdir(before)


class _Unsent:
    """Stands in for an io and for packets, so that steps change configurations and send nothing."""

    chip_id = 0

    def send(self, packets: Any) -> None:
        pass


def plan(controller: Any) -> None:
    """Set the network of the board file in the chips' configurations. Nothing is sent."""
    original, controller.io = controller.io, _Unsent()
    chips = list(controller.chips.values())
    for chip in chips:  # because making packets takes most of the time
        chip.get_configuration_write_packets = lambda registers=None: [_Unsent()]
    try:
        for io_group, io_channel, chip_id in nodes(controller):
            controller.init_network(io_group, io_channel, chip_id)
    finally:
        controller.io = original
        for chip in chips:
            del chip.get_configuration_write_packets


def nodes(controller: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield (io_group, io_channel, chip_id) of all networks, root chips first; chip_id is a name if it is no chip."""
    for io_group, channels in controller.network.items():
        for io_channel in channels:
            for chip_id in controller.get_network_ids(io_group, io_channel):
                yield io_group, io_channel, chip_id


def bring_up(controller: Any, keys: set[str] | None, progress: Callable[[int, int], None]) -> None:
    """Send the steps for these chips (None: all), in the order of the network."""
    chosen = [node for node in nodes(controller) if keys is None or key_of(node) in keys]
    chips = sum(isinstance(chip_id, int) for _, _, chip_id in chosen)
    if not chips:
        raise RequestError("configure_network: no chips in the network of this board")
    _close(controller, chosen)
    done = 0
    for io_group, io_channel, chip_id in chosen:
        controller.init_network(io_group, io_channel, chip_id)
        done += isinstance(chip_id, int)
        progress(done, chips)


def _close(controller: Any, chosen: list[tuple[int, int, Any]]) -> None:
    """Set the lines of these chips to their power-up state, and close the lines that lead to them.

    The steps open one line after the other, because two reachable chips with the power-up id would get the same id.
    """
    fresh: Any = None
    for io_group, io_channel, chip_id in chosen:
        network = controller.network[io_group][io_channel]["miso_us"]
        for parent, _, uart in network.in_edges(chip_id, data="uart"):
            if isinstance(parent, int):
                chip = controller[io_group, io_channel, parent]
                getattr(chip.config, controller._enable_piso_upstream[chip.asic_version])[uart] = 0
        if isinstance(chip_id, int):
            config = controller[io_group, io_channel, chip_id].config
            fresh = fresh or type(config)()
            for name in NETWORK[1:]:
                if name in config.register_names and name not in _UPSTREAM:
                    setattr(config, name, list(getattr(fresh, name)))
