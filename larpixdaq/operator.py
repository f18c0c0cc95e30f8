"""The Operator: the Python interface that people and programs use to steer a run and to look at it.

What an Operator asks of chips and boards, each a Request to the first producer, or to the one named.
"""

from __future__ import annotations

import sys

if __spec__ is None and sys.path[0].endswith("larpixdaq"):
    # Run by its path: this very file must not shadow the standard library's operator.
    del sys.path[0]


import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from larpixdaq import config
from larpixdaq.constants import NO_CORE, PRODUCER, RUN_DATA
from larpixdaq.control.client import Connection, Request, Response
from larpixdaq.control.display import status_lines

__all__ = ["Operator", "Request", "Response"]


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


def _me() -> str:
    return "{user}@{host}".format(**config.process_identity())[:64]


class Operator(Hardware):
    """Steers and watches the data acquisition::

        o = Operator()                                  # or Operator("tcp://daq1.lab")
        o.prepare_run(comment="cosmics").result(timeout=10)
        o.begin_run().result()
        o.packet_rate()                                 # IPython shows what comes within 5 s
        o.end_run().result()["condition"]

    Every method sends its request at once and returns a Request: iterate over it to see acknowledgement, progress and
    result as they come, call `.result(timeout)` for the value, or `.readable(timeout)` for text. Looking needs nothing;
    changing needs control, which the first Operator who changes something gets, and keeps until close(), or 5 s after
    it has vanished. A request that fails and that nobody looks at says so on stderr.
    """

    def __init__(self, core: str = config.LOOPBACK, *, name: str | None = None, timeout: float = NO_CORE) -> None:
        """`core` with or without port number. NoCore when none answers within `timeout` seconds."""
        self._connection = Connection(config.address(core, config.CORE_PORT), name or _me())
        # Runs at close(), when nobody holds this Operator any more, and at exit: control is given back in all cases.
        self._finish = weakref.finalize(self, self._connection.close)
        try:
            self._connection.wait(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give control back and disconnect. Requests that are not done fail."""
        self._finish()

    def __enter__(self) -> Operator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._connection.excuse()  # the exception says enough
        self.close()

    def __repr__(self) -> str:
        told = self._connection.told
        run = f", run {told.run}" if told.run is not None else ""
        return f"<Operator {self._connection.name} at {self._connection.link.core}: {told.state}{run}>"

    def _core(self, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, "", "")

    def _monitor(self, component: str | None, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, component or "", "" if component else RUN_DATA)

    def _producer(self, component: str | None, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, component or "", "" if component else PRODUCER)

    # Looking.

    def state(self) -> Request:
        """The run state: "STOP", "READY" or "RUN"."""
        return self._core("state")

    def components(self) -> Request:
        """A list of dicts, one a component: name, kind, alive, stuck, heard_s (s ago), progress, queued, status..."""
        return self._core("components")

    def actions(self, component: str | None = None) -> Request:
        """What can be asked for: {component: [action, ...]}, the core itself among them."""
        return self._core("actions", component=component)

    def status(self) -> Request:
        """All that the core knows: state, run, last_run (with its condition), components, control, insecure, ...

        Shown in words, as by `larpixdaq status`; `.result()` gives the dict.
        """
        return self._connection.ask("status", {}, "", "", lambda found: "\n".join(status_lines(found)))

    def run_info(self, run: int | None = None) -> Request:
        """What is known of a run (default: the one going on, or the last).

        Times in unix s, condition, rows, files, reasons, comments, and file_details (storage, path, bytes, sha256,
        condition, time of each file that is closed); of the one going on also `live`, the components' own numbers.
        """
        return self._core("run_info", run=run)

    def call(self, component: str, action: str, /, **params: Any) -> Request:
        """Any action of any component, as actions() lists them."""
        return self._connection.ask(action, params, component, "")

    # Steering.

    def prepare_run(self, comment: str = "", kind: str = "") -> Request:
        """STOP -> READY: draws the run number, opens files. Result: {"run", "files", "warnings"}.

        `kind` stands in the files; by itself it is "physics", or "test" when a producer has a fake or replayed source.
        """
        return self._core("prepare_run", comment=comment, kind=kind)

    def begin_run(self) -> Request:
        """READY -> RUN. Result: {"run", "warnings"}."""
        return self._core("begin_run")

    def end_run(self) -> Request:
        """RUN or READY -> STOP, with everything stored.

        Result: {"run", "condition", "rows" (made; None: not known of all producers), "stored" (None: no storage has
        said), "files", "reasons"}.
        """
        return self._core("end_run")

    def abort_run(self) -> Request:
        """From any state to STOP, at once; what was taken is kept. Result as end_run, the condition is ABORTED."""
        return self._core("abort_run")

    prepare_physics_run = prepare_run
    begin_physics_run = begin_run
    end_physics_run = end_run

    def comment(self, text: str) -> Request:
        """Write a comment on the run that is prepared or going on into the catalogue. Result: {"run"}."""
        return self._core("comment", text=text)

    def take_control(self) -> Request:
        """Take control from whoever has it. Result: {"by", "since"} (unix s)."""
        return self._core("take_control")

    def release_control(self) -> Request:
        """Give control back. Result: who has it now, {} for nobody."""
        return self._core("release_control")

    # The online monitor (the first there is, or the one named).

    def packet_rate(self, channels: bool = True, component: str | None = None) -> Request:
        """Packets/s now and since the run began.

        A dict: run, rate, mean_rate, packets, seconds, seen (the fraction of rows that the monitor has looked at), and
        structured arrays io_groups, io_channels, chips and, unless channels=False, channels, with bad parity and FIFO
        flags.
        """
        return self._monitor(component, "packet_rate", channels=channels)

    def packets(
        self,
        count: int = 100,
        text: bool = False,
        types: Sequence[int] | None = None,
        component: str | None = None,
    ) -> Request:
        """The last packets, the newest last: a structured array as in the file, or with text=True a line each.

        types: the packet types wanted (0 data, 1 test, 2 config write, 3 config read, 4 timestamp, 5 message, 6 sync,
        7 trigger; v3 chips send data as 1), such as [0]; None: all.
        """
        wanted = None if types is None else list(types)
        return self._monitor(component, "packets", count=count, text=text, types=wanted)

    def messages(self, count: int = 100, component: str | None = None) -> Request:
        """The last INFO messages: a list of dicts with time (unix s), utc, producer, run, text."""
        return self._monitor(component, "messages", count=count)

    def adc_histogram(
        self,
        io_group: int | None = None,
        io_channel: int | None = None,
        chip: int | None = None,
        channel: int | None = None,
        component: str | None = None,
    ) -> Request:
        """How often each ADC value came in the data packets of these channels (None: of all).

        A dict: counts (counts[adc], 256 values; v1 and v3: 1024), entries, mean, std, seen, ...
        """
        where = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        return self._monitor(component, "adc_histogram", **where)

    # Routines (of the first producer, or the one named).

    def list_routines(self, component: str | None = None) -> Request:
        """The routines that can be run: a list of dicts with name, params, help; `params` is a list of dicts with name,
        type, required, default."""
        return self._producer(component, "list_routines")

    def load_routines(self, directory: str, component: str | None = None) -> Request:
        """Use the routine files of a directory on the producer's machine from now on: one of those that its option
        --routines names, or below them. The result is that of list_routines()."""
        return self._producer(component, "load_routines", directory=directory)

    def run_routine(
        self, name: str, /, *args: Any, component: str | None = None, time_limit: float | None = None, **kwargs: Any
    ) -> Request:
        """Run a routine: acknowledgement, progress, ..., result.

        It is stopped after `time_limit` seconds (None: an hour). When it raises, its traceback follows the error's
        first line.
        """
        limit = {} if time_limit is None else {"time_limit": time_limit}
        return self._producer(component, "run_routine", name=name, args=list(args), kwargs=kwargs, **limit)

    def abort_routine(self, component: str | None = None) -> Request:
        """Stop the routine that runs, or what is being done with chips: its own request fails, and this one's result is
        its name. The readout goes on."""
        return self._producer(component, "abort_routine")
