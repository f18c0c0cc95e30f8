"""What an Operator asks of chips and boards, each a Request to the first producer, or to the one named."""

from __future__ import annotations

from typing import Any

from larpixdaq.control.requests import Request


class Hardware:
    """Half of an Operator."""

    def _producer(self, component: str | None, action: str, **params: Any) -> Request:
        raise NotImplementedError

    # Chips. `chip` is a chip key "io_group-io_channel-chip_id", a list of
    # them, or None for all of the board that was loaded; `registers` is a name, an address, a list, or None for all.

    def load_board(self, file: str, component: str | None = None) -> Request:
        """Which chips there are: a controller configuration file of larpix-control, on the producer's machine.

        Result: as get_boards().
        """
        return self._producer(component, "load_board", file=file)

    def configure_network(self, tries: int = 3, component: str | None = None) -> Request:
        """Bring up the hydra networks of the board that was loaded, root first, and check them (v1 chips: enforce).

        Result: as validate_configuration(), of the network's registers, and "tries".
        """
        return self._producer(component, "configure_network", tries=tries)

    def get_boards(self, component: str | None = None) -> Request:
        """The boards that are read, and the chips that are known.

        A dict: boards (a list of dicts with io_group, kind, name), board, file, asic, chips (how many), networks.
        """
        return self._producer(component, "get_boards")

    def write_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Send registers as they ought to be to the chips, which do not confirm it (see enforce_configuration).

        Result: {"chips", "registers"}, how many.
        """
        return self._chips(component, "write_configuration", chip, registers)

    def send_configuration(self, updates: dict[Any, dict[Any, Any]], component: str | None = None) -> Request:
        """Change how registers ought to be, and send those: {chip key or "all": {name or address: value}}.

        Result: {"chips", "registers"}, how many were sent.
        """
        return self._producer(component, "send_configuration", updates=updates)

    def read_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Ask the chips what their registers hold.

        Result: {"chips": {chip key: {register: value}}, "silent": [chip keys], "unanswered", "answered_twice", ...}.
        """
        return self._chips(component, "read_configuration", chip, registers)

    def validate_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Read registers and compare them with what they ought to hold.

        Result: {"ok", "chips", "registers", "different", "differences": [{"chip", "register", "address", "expected",
        "found"}, ...], "silent": [chip keys], "unanswered", "answered_twice", "contradicting", "asked_again", ...}.
        """
        return self._chips(component, "validate_configuration", chip, registers)

    def enforce_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Read registers, write those anew that differ, and read them again, three times at most.

        Result: as validate_configuration(), of how it is in the end, and "written", how many registers.
        """
        return self._chips(component, "enforce_configuration", chip, registers)

    def retrieve_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """What is known of registers, without asking the chips.

        Result: {chip key: {"wanted": {register: value}, "confirmed": {register: value last read}}}.
        """
        return self._chips(component, "retrieve_configuration", chip, registers)

    def load_pixel_layout(self, name: str, component: str | None = None) -> Request:
        """Where the channels of chips are: a layout file of larpix-geometry, on the producer's machine.

        Result: a dict: name, file, version, pitch (mm), pixels, chips, tiles (how many), x and y ([from, to], mm).
        """
        return self._producer(component, "load_pixel_layout", name=name)

    def retrieve_pixel_layout(self, chip: Any = None, component: str | None = None) -> Request:
        """Places of channels in the layout that was loaded last, of chips by their key or chip_id; of 500,000 at most.

        Result: as load_pixel_layout(), and "channels": {chip: {"x": [mm or None, by channel_id], "y": [...], "z" (mm,
        along the drift), "tile"}}. Chips are named by their keys, or by chip_id where the file knows no more.
        """
        return self._producer(component, "retrieve_pixel_layout", chip=chip)

    def _chips(self, component: str | None, action: str, chip: Any, registers: Any) -> Request:
        return self._producer(component, action, chip=chip, registers=registers)

    # Boards themselves; `io_group` is one, a list, or None for all.

    def ping(self, io_group: Any = None, component: str | None = None) -> Request:
        """Whether boards answer: {io_group: True or False}; fails when none does."""
        return self._producer(component, "ping", io_group=io_group)

    def board_status(self, io_group: Any = None, component: str | None = None, supplies: bool = True) -> Request:
        """How boards are: a list of dicts with io_group, kind, answers, error.

        Of a PACMAN also clock_locked, clock_source, clock_valid, clock_ticks, heartbeat, heartbeat_s, revision, tiles
        (those that are on), analog_power, supplies (of each of these tiles: vdda_mv, vdda_ma, vddd_mv, vddd_ma), and
        doubts: what is to be known of these numbers, or why there are none. A board of revision 4 takes 2 s a tile, in
        which nothing else can be asked of it; supplies=False does without.
        """
        return self._producer(component, "board_status", io_group=io_group, supplies=supplies)

    def power(
        self,
        on: bool,
        tiles: Any = None,
        vddd_dac: int | None = None,
        vdda_dac: int | None = None,
        io_group: Any = None,
        component: str | None = None,
        ramp: bool = False,
    ) -> Request:
        """Switch tiles (from 0; None: all) on, one by one, or off.

        The DACs (0 to 65535), which need the board's revision, are set before their tile is switched on, or with ramp
        in steps from 0 afterwards. Fails when the board reads back something else, or measures a voltage that is not
        what the DAC stands for; that tile is then switched off. Result: as board_status().
        """
        given = {"on": on, "tiles": tiles, "vddd_dac": vddd_dac, "vdda_dac": vdda_dac, "io_group": io_group}
        return self._producer(component, "power", **given, ramp=ramp)

    def reset(self, length: int = 256, io_group: Any = None, component: str | None = None) -> Request:
        """Reset all chips of boards, for `length` ticks of their clock, and wait until that is over.

        Result: {"io_groups", "length", "configuration": {io_group: "kept", "lost" or "not known"}}.
        """
        return self._producer(component, "reset", length=length, io_group=io_group)

    def set_uart_clock(
        self, ratio: int, io_channel: Any = None, io_group: Any = None, component: str | None = None
    ) -> Request:
        """Clock ticks a bit on the lines to the chips (1 to 255), of one io_channel, a list, or all.

        Fails when a board reads back something else. Result: {"ratio", "io_groups": {io_group: {io_channel: ratio}}}.
        """
        given = {"ratio": ratio, "io_channel": io_channel, "io_group": io_group}
        return self._producer(component, "set_uart_clock", **given)
