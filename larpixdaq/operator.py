"""The Operator: the Python interface with which people and programs control runs, chips and boards, and watch them."""

from __future__ import annotations

import sys

if __spec__ is None and sys.path[0].endswith("larpixdaq"):
    # Run by its path: this file must not shadow the standard library's operator.
    del sys.path[0]


import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from larpixdaq import config
from larpixdaq.constants import LOG, MAX_ATTACHMENT, NO_CORE, PRODUCER, RUN_DATA
from larpixdaq.control.client import Connection, Request, Response
from larpixdaq.control.display import alarm_lines, status_lines
from larpixdaq.control.prompt import show_alarms
from larpixdaq.runtime.file_access import read_regular

__all__ = ["Operator", "Request", "Response"]
#: Bytes of a piece of an attachment, and maximum seconds until the core has written it.
_PIECE: Final = 512 << 10
_PIECE_LIMIT: Final = 30.0
#: Maximum seconds until a producer has given the values of all chips, or the core a snapshot.
_SNAPSHOT_LIMIT: Final = 60.0
#: Maximum seconds for which the attribute `shifter` waits for the core.
_SHIFTER_LIMIT: Final = 5.0


def _me() -> str:
    return "{user}@{host}".format(**config.process_identity())[:64]


class Operator:
    """Controls and watches the data acquisition::

        o = Operator()                                  # or Operator("tcp://daq1.lab")
        o.prepare_run(comment="cosmics").result(timeout=10)
        o.begin_run().result()
        o.packet_rate()                                 # IPython shows the result if it comes within 5 s
        o.end_run().result()["condition"]

    Every method sends its request at once and returns a Request: iterate over it to see acknowledgement, progress and
    result as they come, call `.result(timeout)` for the value, or `.readable(timeout)` for text. Reading needs no
    control; changing does. The first Operator that changes something gets control, and keeps it until close(), or until
    5 s after it has vanished. A failed request that nobody looks at writes its error to stderr.
    """

    def __init__(
        self,
        core: str | None = None,
        *,
        name: str | None = None,
        timeout: float = NO_CORE,
        insecure: bool = False,
        supervised: bool = False,
    ) -> None:
        """Connect to the core at the address `core`, with or without a port number; None: on this machine.

        `core` may name several cores that take over from each other: "tcp://daq1,tcp://daq2".

        NoCore when no core answers within `timeout` seconds; NotAllowed when this user has no key for it. `insecure`:
        connect without a key, to a core that was started with --insecure. `supervised`: this process is started by a
        supervisor, which knows it by `name` and waits until it has connected.
        """
        address, pid = config.core_addresses(core or config.LOOPBACK), os.getpid() if supervised else 0
        self._connection = Connection(address, name or _me(), insecure=insecure, pid=pid)
        # Runs at close(), when this Operator is garbage collected, and at exit, so that control is always given back.
        self._finish = weakref.finalize(self, self._connection.close)
        try:
            self._connection.wait(timeout)
        except BaseException:
            self.close()
            raise
        show_alarms(self._connection)

    def close(self) -> None:
        """Give control back and disconnect. Unfinished requests fail."""
        self._finish()

    cleanup = close

    def __enter__(self) -> Operator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._connection.ignore_open_requests()  # the exception is enough
        self.close()

    @property
    def _controller(self) -> Any:
        raise AttributeError("the controller of version 0.2 is gone; write .state() and .components()")

    def __repr__(self) -> str:
        update = self._connection.last_update
        run = f", run {update.run}" if update.run is not None else ""
        return f"<Operator {self._connection.name} at {self._connection.link.core}: {update.state}{run}>"

    # Run control.

    def prepare_run(self, comment: str = "", kind: str = "", by: str | None = None) -> Request:
        """STOP -> READY: draw the run number, open the files. Result: {"run", "files", "warnings"}.

        `kind` is written into the files. Its default is "physics", or "test" when a producer has a fake or replayed
        source. So is `by`, the name of the shifter; its default is `shifter`.
        """
        return self._core("prepare_run", comment=comment, kind=kind, **({} if by is None else {"by": by}))

    def begin_run(self) -> Request:
        """READY -> RUN. Result: {"run", "warnings"}."""
        return self._core("begin_run")

    def end_run(self) -> Request:
        """RUN or READY -> STOP, with everything stored.

        Result: {"run", "condition", "rows" (made by all producers, None if unknown), "stored" (None if no storage has
        reported), "files", "reasons"}.
        """
        return self._core("end_run")

    def abort_run(self) -> Request:
        """Any state -> STOP, at once; the data taken are kept. Result: as end_run(), with the condition ABORTED."""
        return self._core("abort_run")

    prepare_physics_run = prepare_run
    begin_physics_run = begin_run
    end_physics_run = end_run

    def comment(self, text: str, run: int | None = None, by: str | None = None) -> Request:
        """Write a comment on a run (default: the current run, or the last one) into the e-log. Result: {"run"}.

        At any time, also without control. Of at most 10,000 characters. It goes into the catalogue, and into the open
        file or, when the run is over, into the sidecars of its files. `by`: name of the shifter, by default `shifter`.
        """
        return self._core("comment", text=text, run=run, **({} if by is None else {"by": by}))

    def attach(self, path: str | Path, run: int | None = None, by: str | None = None) -> Request:
        """Attach a file of this machine, of at most 64 MiB, to a run (default: the current run, or the last one).

        The core keeps a copy in its state directory. Returns when all but the last piece of 512 KiB has arrived there.
        Result: {"run", "name", "file" (the copy, on the core's host), "bytes", "sha256"}. `by`: as in comment().
        FileError when the file cannot be read.
        """
        path = Path(path)
        data = read_regular(path.resolve(), MAX_ATTACHMENT)
        more = {} if by is None else {"by": by}
        offset = 0
        while True:
            piece = data[offset : offset + _PIECE]
            request = self._core("attach", run=run, name=path.name, size=len(data), offset=offset, data=piece, **more)
            offset += len(piece)
            if offset >= len(data):
                return request
            run = request.result(_PIECE_LIMIT)["run"]

    @property
    def shifter(self) -> str:
        """Name of the shifter, which the core keeps: default of the comments' `by`, and written into the files of runs.

        "" when nobody is on shift. Reading and setting it waits for the core, and raises its errors.
        """
        name: str = self._core("status").result(_SHIFTER_LIMIT)["shifter"]["name"]
        return name

    @shifter.setter
    def shifter(self, name: str) -> None:
        self._core("set_shifter", name=name).result(_SHIFTER_LIMIT)

    def take_control(self) -> Request:
        """Take control from the Operator that holds it. Result: {"by", "since" (unix s)}."""
        return self._core("take_control")

    def release_control(self) -> Request:
        """Give control back. Result: {"by", "since"} of the new holder, {} if there is none."""
        return self._core("release_control")

    # Keys, for the core's own user.

    def keys(self) -> Request:
        """List who has a key.

        Result: {"members": [{"name", "role", "since" (unix s), "informed"}], "invitations": [{"name", "role",
        "expires"}], "rotates"}. `rotates`: the core has new keys from its next start on; `informed`: the member knows
        the core's newest key, so that it can connect after that start.
        """
        return self._core("keys")

    def invite(self, name: str, role: str, expires: float = 600.0, address: str = "") -> Request:
        """Invite another user or host, for `expires` seconds. Result: {"token", "expires" (unix s), "only_here"}.

        `role`: "component" (registers as `name`), "operator" or "observer". `address`: of the core for the other host.
        `only_here`: the core listens at its own host alone.
        """
        return self._core("invite", name=name, role=role, expires=expires, address=address)

    def revoke(self, name: str) -> Request:
        """Take a key, or an open invitation, back. Its connections are closed."""
        return self._core("revoke", name=name)

    def rotate(self) -> Request:
        """Make new keys for the core and its user, which count from its next start on. Result: as keys()."""
        return self._core("rotate")

    # The state of the system.

    def state(self) -> Request:
        """Get the run state: "STOP", "READY" or "RUN"."""
        return self._core("state")

    def components(self) -> Request:
        """List the components.

        Result: a list of dicts with name, kind, module ("": none), alive, stuck, heard_s (s since last heard),
        progress, queued, status...
        """
        return self._core("components")

    def actions(self, component: str | None = None) -> Request:
        """List the actions of each component, and of the core: {component: [action, ...]}."""
        return self._core("actions", component=component)

    def status(self) -> Request:
        """Get all that the core knows: state, run, last_run (with its condition), components, control, insecure, ...

        Shown as text, like `larpixdaq status`: many components in groups. `.result()` returns the dict.
        """
        return self._connection.ask("status", {}, "", "", lambda found: "\n".join(status_lines(found)))

    def alarms(self, history: bool = False, since: float = 0.0, limit: int = 1000) -> Request:
        """List the open alarms, those first that nobody has acknowledged.

        Result: {"open": [{"id", "condition", "component", "subject", "level", "text", "raised", "last" (unix s),
        "count", "acknowledged" (unix s), "by", "comment", "cleared", "as_of", "in_order"}, ...]}. `as_of`: of when
        (unix s) text and count are, if nothing was heard of the condition since a restart of the core. `in_order`:
        since when (unix s) the condition has been in order; the alarm clears after its hold-off. With history=True also
        "history": what happened to alarms since this time (unix s), the last `limit` rows (at most 10,000), oldest
        first.
        """
        params = {"history": history, "since": since, "limit": limit}
        return self._connection.ask("alarms", params, "", "", alarm_lines)

    def acknowledge_alarm(self, id: int, comment: str = "") -> Request:
        """Acknowledge an open alarm, which needs no control. Result: the alarm, as in alarms()."""
        return self._core("acknowledge_alarm", alarm=id, comment=comment)

    def run_info(self, run: int | None = None) -> Request:
        """Get the catalogue's entry of a run (default: the current run, or the last one).

        Result: times (unix s), condition, rows, files, reasons, comments, and file_details (storage, path, bytes,
        sha256, condition, time of each closed file); for the current run also `live`, the components' own numbers.
        """
        return self._core("run_info", run=run)

    def set_log_level(self, level: str, component: str | None = None) -> Request:
        """Change the level from which on a component, "core" or all (None) write log records.

        `level`: "debug", "info", "warning", "error" or "critical". It lasts until the component, or for the core the
        core, is started again; status() shows it. Needs no control. Result: {"levels": {name: level}}, as asked for.
        """
        return self._core("set_log_level", level=level, component=component)

    def log_records(self, count: int = 100, component: str | None = None) -> Request:
        """Get the last records of the log, at most `count` (1 to 1000).

        Result: {"records": [{"time" (unix s), "level", "component", "text"}, ...], "next", "process"}. `larpixdaq log`
        shows the whole file.
        """
        return self._connection.ask("records", {"count": count}, component or "", "" if component else LOG)

    # The online monitor (the first one, or the one named by `component`).

    def summary(self, component: str | None = None) -> Request:
        """Get what a display of the run shows; cheap enough for each second, some kB.

        A dict: time (unix s), run, kind, layout, rate, mean_rate, packets, seconds, seen and the table io_groups as in
        packet_rate(); channel_rates: {"edges", "channels", "silent"}, the histogram of channels over their present
        rates, packets/s; hottest, dead (up to 20 channels each, with rates) and dead_channels, their number; sync
        (SYNC rows and their intervals, by io_group); spread (how far the clock of an io_group is ahead of the others,
        ticks and s); rows_by_type, late_blocks, messages. None: not known. help(Monitor.summary) of
        larpixdaq.monitor has the details.
        """
        return self._monitor(component, "summary")

    def pixel_map(self, quantity: str = "rate", chips: bool = True, component: str | None = None) -> Request:
        """Get one byte for each channel: `values`, shape (chips, channels), and what the bytes mean.

        `quantity`: "rate" (present, of data packets), "packets" (data packets seen in the run) or "mean_adc". Byte 0:
        no packet was seen; other bytes c stand for low * (high / low) ** ((c - 1) / 254), or for c * step ("mean_adc"),
        with low, high or step in `scale`. `chips`: io_group, io_channel, chip_id of each row, whose order stays in a
        run; with chips=False only their number, `chips_known`. Also run, layout, time (unix s), seen.
        """
        return self._monitor(component, "pixel_map", quantity=quantity, chips=chips)

    def pixel(self, io_group: int, io_channel: int, chip: int, channel: int, component: str | None = None) -> Request:
        """Get the numbers of one channel.

        A dict: rate, mean_rate (data packets/s), seen_packets, mean_adc, std (ADC counts; None without entries), seen
        (the fraction of rows that the monitor has read), ...
        """
        where = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        return self._monitor(component, "pixel", **where)

    def packet_rate(self, channels: bool = True, component: str | None = None) -> Request:
        """Get packet rates (packets/s), now and averaged over the run.

        A dict: run, rate, mean_rate, packets, seconds, seen (the fraction of rows that the monitor has read), and
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
        """Get the last packets, the newest last: a structured array as in the file, or with text=True one line each.

        types: list of packet types (0 data, 1 test, 2 config write, 3 config read, 4 timestamp, 5 message, 6 sync,
        7 trigger; v3 chips send data as 1), for example [0]; None: all.
        """
        wanted = None if types is None else list(types)
        return self._monitor(component, "packets", count=count, text=text, types=wanted)

    def messages(self, count: int = 100, component: str | None = None) -> Request:
        """Get the last INFO messages: a list of dicts with time (unix s), utc, producer, run, text."""
        return self._monitor(component, "messages", count=count)

    def adc_histogram(
        self,
        io_group: int | None = None,
        io_channel: int | None = None,
        chip: int | None = None,
        channel: int | None = None,
        component: str | None = None,
    ) -> Request:
        """Get the histogram of the ADC values in the data packets of these channels (None: of all).

        A dict: counts (counts[adc], 256 values; v1 and v3: 1024), entries, mean, std, seen, ...
        """
        where = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        return self._monitor(component, "adc_histogram", **where)

    # Chips, through the first producer, or the one named by `component`. `chip` is a chip key
    # "io_group-io_channel-chip_id", a list of keys, or None for all chips of the loaded board; `registers` is a name,
    # an address, a list of these, or None for all.

    def load_board(self, file: str, component: str | None = None) -> Request:
        """Load the list of chips from a controller configuration file of larpix-control, on the producer's machine.

        Result: as get_boards().
        """
        return self._producer(component, "load_board", file=file)

    def configure_network(self, tries: int = 3, component: str | None = None) -> Request:
        """Bring up the hydra networks of the loaded board, root first, and check them (v1 chips: enforce).

        Result: as validate_configuration() for the network's registers, and "tries".
        """
        return self._producer(component, "configure_network", tries=tries)

    def discover_network(
        self,
        file: str | None = None,
        tiles: int | Sequence[int] | None = None,
        io_group: int | Sequence[int] | None = None,
        shape: str | dict[str, Any] | None = None,
        exclude: str | Sequence[str] | None = None,
        reset: bool = True,
        component: str | None = None,
    ) -> Request:
        """Find the chips of tiles and a network that leads round dead chips and broken links, and write a board file.

        file: name of the new board file, .json, on the producer's machine (None: named by the time). It is loaded, so
        that configure_network() can follow. tiles: numbers from 0 (None: those that are on). shape: "10x10", "10x16",
        "5x5", or a dict with rows, columns, roots, ... (docs/chips.md). exclude: keys of chips that are not to be used.
        reset: reset the boards' chips before and after it; False for fresh tiles beside others that are in use.

        A dict: ok (no fault), file, chips, missing, faults (one line each), state (of the chips), seconds, tiles (a
        list of dicts with io_group, tile, roots, missing, network, broken, one_way, ...). Shown as a picture.
        """
        arguments = {
            "file": file,
            "tiles": tiles if tiles is None or isinstance(tiles, int) else list(tiles),
            "io_group": io_group if io_group is None or isinstance(io_group, int) else list(io_group),
            "shape": shape,
            "exclude": exclude if exclude is None or isinstance(exclude, str) else list(exclude),
            "reset": reset,
        }
        return self._producer(component, "discover_network", **arguments)

    def get_boards(self, component: str | None = None) -> Request:
        """List the boards that are read and the known chips.

        A dict: boards (a list of dicts with io_group, kind, name, revision), board, file, asic, chips (their number),
        networks.
        """
        return self._producer(component, "get_boards")

    def write_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Write the wanted register values to the chips, which do not confirm it (see enforce_configuration).

        Result: {"chips", "registers"}, their numbers.
        """
        return self._producer(component, "write_configuration", chip=chip, registers=registers)

    def send_configuration(self, updates: dict[Any, dict[Any, Any]], component: str | None = None) -> Request:
        """Change wanted register values and write these registers: {chip key or "all": {name or address: value}}.

        Result: {"chips", "registers"}, the numbers that were written.
        """
        return self._producer(component, "send_configuration", updates=updates)

    def read_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Read registers of the chips.

        Result: {"chips": {chip key: {register: value}}, "silent": [chip keys], "unanswered", "answered_twice", ...}.
        """
        return self._producer(component, "read_configuration", chip=chip, registers=registers)

    def validate_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Read registers and compare them with the wanted values.

        Result: {"ok", "chips", "registers", "different", "differences": [{"chip", "register", "address", "expected",
        "found"}, ...], "silent": [chip keys], "unanswered", "answered_twice", "contradicting", "asked_again", ...}.
        """
        return self._producer(component, "validate_configuration", chip=chip, registers=registers)

    def enforce_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Read registers, write those that differ and read them again, three times at most.

        Result: as validate_configuration() for the final state, and "written", the number of registers written.
        """
        return self._producer(component, "enforce_configuration", chip=chip, registers=registers)

    def retrieve_configuration(self, chip: Any = None, registers: Any = None, component: str | None = None) -> Request:
        """Get the known register values, without reading the chips.

        Result: {chip key: {"wanted": {register: value}, "confirmed": {register: value last read}}}.
        """
        return self._producer(component, "retrieve_configuration", chip=chip, registers=registers)

    # Snapshots of the chips' configurations (docs/chips.md). `snapshot` is a name in the catalogue, or the path of a
    # file or folder: a Path, or a text with a / or with .json at its end.

    def save_snapshot(self, name: str, comment: str = "", component: str | None = None) -> Request:
        """Save the wanted values of all known chips in the catalogue, under a name that is not in use yet.

        Returns when the producer has given them. Needs no control. Result: {"name", "chips" (their number), "bytes"}.
        """
        from larpixdaq.control import snapshots

        found = self._producer(component, "retrieve_snapshot").result(_SNAPSHOT_LIMIT)
        data = snapshots.pack(snapshots.make(found["asic"], found["chips"]))
        number = len(found["chips"])
        return self._core("save_snapshot", name=name, asic=found["asic"], chips=number, comment=comment, data=data)

    def snapshots(self) -> Request:
        """List the snapshots in the catalogue, oldest first.

        Result: a list of dicts with name, time (unix s), asic, chips (their number), comment, operator, key.
        """
        return self._core("snapshots")

    def remove_snapshot(self, name: str) -> Request:
        """Remove a snapshot from the catalogue. It needs no control."""
        return self._core("remove_snapshot", name=name)

    def load_snapshot(self, snapshot: str | Path, skip_missing: bool = False, component: str | None = None) -> Request:
        """Make the values of a snapshot the wanted ones, and write and check them as enforce_configuration() does.

        Nothing is changed if a chip is not known here (skip_missing=True skips such chips), if the snapshot is of
        another generation, or if it is damaged. Registers of the network stay as they are. Result: as
        enforce_configuration(), and "missing" (chips of the snapshot that are not here), "moved" ({its chip key: chip
        key here}, chips on another io_channel of their tile), "unchanged" (chips here that the snapshot does not have).
        """
        return self._producer(
            component, "load_snapshot", content=self._packed_snapshot(snapshot), skip_missing=skip_missing
        )

    def compare_snapshot(
        self, snapshot: str | Path, other: str | Path | None = None, component: str | None = None
    ) -> Request:
        """Compare a snapshot with another one, or with the present wanted values, without the registers of the network.

        Result: {"same", "chips" (compared), "different", "differences": [{"chip", "register", "address", "snapshot",
        "other"}, ...], "missing", "new" (chips of only one of them), "moved"}.
        """
        content = self._packed_snapshot(snapshot)
        second = None if other is None else self._packed_snapshot(other)
        return self._producer(component, "compare_snapshot", content=content, other=second)

    def write_snapshot(self, path: str | Path, name: str | None = None, component: str | None = None) -> int:
        """Write a snapshot of the catalogue, or the present wanted values, into files of this machine, and wait for it.

        A path with .json at its end becomes one file, any other a new folder with config_CHIP.json for each chip, as
        laboratories' scripts have it. Returns the number of files. FileError if the path exists.
        """
        from larpixdaq.control import snapshots

        if name is None:
            found = self._producer(component, "retrieve_snapshot").result(_SNAPSHOT_LIMIT)
            return snapshots.write(path, snapshots.make(found["asic"], found["chips"]))
        data = self._core("snapshot", name=name).result(_SNAPSHOT_LIMIT)["data"]
        return snapshots.write(path, snapshots.unpack(data), description=name)

    def disable_channels(self, channels: dict[str, list[int]] | str | Path, component: str | None = None) -> Request:
        """Disable channels: channel_mask and periodic_trigger_mask 1, csa_enable 0. Writes these registers.

        `channels`: {"io_group-tile-chip_id": [channel, ...]}, or the path of a JSON file with it. Nothing is changed if
        a chip or channel in it does not exist. Result: {"chips", "registers"}, the numbers that were written.
        """
        if isinstance(channels, str | Path):
            from larpixdaq.control import snapshots

            channels = snapshots.read_disabled(channels)
        return self._producer(component, "disable_channels", channels=channels)

    def disabled_channels(self, component: str | None = None) -> Request:
        """List the channels whose wanted channel_mask is 1: {"io_group-tile-chip_id": [channel, ...]}."""
        return self._producer(component, "disabled_channels")

    def _packed_snapshot(self, snapshot: str | Path) -> bytes:
        from larpixdaq.control import snapshots

        if isinstance(snapshot, Path) or "/" in snapshot or snapshot.endswith(".json"):
            return snapshots.pack(snapshots.read(snapshot))
        data: bytes = self._core("snapshot", name=snapshot).result(_SNAPSHOT_LIMIT)["data"]
        return data

    def load_pixel_layout(self, name: str, component: str | None = None) -> Request:
        """Load the positions of channels from a layout file of larpix-geometry, on the producer's machine.

        Result: a dict: name, file, version, pitch (mm), pixels, chips, tiles (their numbers), x and y ([from, to], mm).
        """
        return self._producer(component, "load_pixel_layout", name=name)

    def retrieve_pixel_layout(self, chip: Any = None, component: str | None = None) -> Request:
        """Get the positions of channels in the loaded layout; chips by key or chip_id; at most 500,000 channels.

        Result: as load_pixel_layout(), and "channels": {chip: {"x": [mm or None, by channel_id], "y": [...], "z" (mm,
        along the drift), "tile"}}. Chips are named by their keys, or by chip_id if the file has no keys.
        """
        return self._producer(component, "retrieve_pixel_layout", chip=chip)

    # Boards, through the first producer, or the one named by `component`. `io_group` is a number, a list, or None for
    # all.

    def ping(self, io_group: Any = None, component: str | None = None) -> Request:
        """Test whether boards answer: {io_group: True or False}; fails when no board answers."""
        return self._producer(component, "ping", io_group=io_group)

    def board_status(self, io_group: Any = None, component: str | None = None, supplies: bool = True) -> Request:
        """Get the status of boards: a list of dicts with io_group, kind, name, answers, error.

        For a PACMAN also clock_locked, clock_source, clock_valid, clock_ticks, heartbeat, heartbeat_s, revision, tiles
        (those switched on), analog_power, supplies (for each of these tiles: vdda_mv, vdda_ma, vddd_mv, vddd_ma), and
        doubts: caveats about these numbers, or why they are missing. A board of revision 4 needs 2 s for each tile and
        answers no other request meanwhile; supplies=False skips these measurements.
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

        The DACs (0 to 65535) need the board's revision. They are set before their tile is switched on, or with ramp in
        steps from 0 afterwards. Fails when the board reads back another value, or measures another voltage than the
        DAC's; that tile is then switched off. Result: as board_status().
        """
        given = {"on": on, "tiles": tiles, "vddd_dac": vddd_dac, "vdda_dac": vdda_dac, "io_group": io_group}
        return self._producer(component, "power", **given, ramp=ramp)

    def power_up(
        self,
        tiles: Any = None,
        vdda_dac: int | None = None,
        vddd_dac: int | None = None,
        limits: dict[str, Any] | None = None,
        io_group: Any = None,
        component: str | None = None,
    ) -> Request:
        """Ramp the supplies of tiles (from 0) up, boards side by side, and reset the chips.

        What is not given comes from the producer's --power-settings. `limits`: {"vdda_ma": highest, "vdda_mv": [lowest,
        highest], ...}, of the monitors that board_status() shows. A tile that leaves its limits, or whose voltage does
        not fit its DAC, is switched off, and the others go on. Tiles that are on already are left as they are. Result:
        {"ok", "tiles": [{"io_group", "tile", "state": "on", "off" or "not known", "vdda_dac", "vddd_dac", "vdda_mv",
        ..., "fault"}, ...], "uncertain": [monitors], "doubts"}. The report goes into the run's file.
        """
        given = {"tiles": tiles, "vdda_dac": vdda_dac, "vddd_dac": vddd_dac, "limits": limits, "io_group": io_group}
        return self._producer(component, "power_up", **given)

    def reset(self, length: int = 256, io_group: Any = None, component: str | None = None) -> Request:
        """Reset all chips of boards for `length` ticks of the chips' clock, and wait for the end of the reset.

        Result: {"io_groups", "length", "configuration": {io_group: "kept", "lost" or "not known"}}.
        """
        return self._producer(component, "reset", length=length, io_group=io_group)

    def set_uart_clock(
        self, ratio: int, io_channel: Any = None, io_group: Any = None, component: str | None = None
    ) -> Request:
        """Set the clock ticks per bit (1 to 255) on the lines to the chips, of one io_channel, a list, or all.

        Fails when a board reads back another value. Result: {"ratio", "io_groups": {io_group: {io_channel: ratio}}}.
        """
        given = {"ratio": ratio, "io_channel": io_channel, "io_group": io_group}
        return self._producer(component, "set_uart_clock", **given)

    def set_uarts(
        self,
        io_channel: Any = None,
        receive: bool | None = None,
        inverted: bool | None = None,
        io_group: Any = None,
        component: str | None = None,
    ) -> Request:
        """Switch the receivers of io_channels (a number, a list, None: all), or invert their lines.

        `receive`: take what chips send (revision 5, and revision 4 with the firmware of Module 2). `inverted`: both
        lines (not revision 2). Fails when a board reads back another value. Result: as write_board().
        """
        given = {"io_channel": io_channel, "receive": receive, "inverted": inverted, "io_group": io_group}
        return self._producer(component, "set_uarts", **given)

    def set_trigger(
        self,
        period: float | None = None,
        tiles: Any = None,
        trigger: Any = None,
        io_group: Any = None,
        component: str | None = None,
    ) -> Request:
        """Set the period of a board's own triggers (seconds, 0: off), and the tiles (from 0) that get triggers.

        `trigger`: 0 (the periodic one), 1 (external input 1), a list, or None for all four, to which `tiles` applies;
        the other tiles do not get it. Fails when a board reads back another value. Result: as write_board().
        """
        given = {"period": period, "tiles": tiles, "trigger": trigger, "io_group": io_group}
        return self._producer(component, "set_trigger", **given)

    def read_board(self, registers: Any = None, io_group: Any = None, component: str | None = None) -> Request:
        """Read registers of PACMANs by name or address (None: all of the FPGA).

        Refused for addresses that could end the board's command server. Result: a list of dicts with io_group,
        register, address, value, hex.
        """
        return self._producer(component, "read_board", registers=registers, io_group=io_group)

    def write_board(self, values: dict[Any, int], io_group: Any = None, component: str | None = None) -> Request:
        """Write registers of PACMANs: {name or address: value of 32 bits}.

        Refused for addresses that could end the board's command server, and for supplies of a board whose revision is
        not known. Fails when a register of the FPGA reads back another value; those of supplies are not read back.
        Result: as read_board(), and read_back: True or False.
        """
        return self._producer(component, "write_board", values=values, io_group=io_group)

    # Routines, in the first producer, or the one named by `component`.

    def list_routines(self, component: str | None = None) -> Request:
        """List the routines: a list of dicts with name, params, help, error.

        `params` is a list of dicts with name, type, required, default. `error`: why a routine file, which `name` names
        then, could not be loaded; "" for routines.
        """
        return self._producer(component, "list_routines")

    def load_routines(self, directory: str, component: str | None = None) -> Request:
        """Add the routine files of a directory on the producer's machine. Result: as list_routines().

        The directory must be one that the producer's option --routines names, or lie below one.
        """
        return self._producer(component, "load_routines", directory=directory)

    def run_routine(
        self, name: str, /, *args: Any, component: str | None = None, time_limit: float | None = None, **kwargs: Any
    ) -> Request:
        """Run a routine: acknowledgement, progress, ..., result.

        It is stopped after `time_limit` seconds (None: an hour). When it raises an exception, the traceback follows the
        error's first line.
        """
        limit = {} if time_limit is None else {"time_limit": time_limit}
        return self._producer(component, "run_routine", name=name, args=list(args), kwargs=kwargs, **limit)

    def abort_routine(self, component: str | None = None) -> Request:
        """Stop the running routine, or the running action on chips or boards; the readout continues.

        The request of the stopped routine fails. Result: its name.
        """
        return self._producer(component, "abort_routine")

    # Any action.

    def call(self, component: str, action: str, /, **params: Any) -> Request:
        """Request any action of any component; actions() lists them."""
        return self._connection.ask(action, params, component, "")

    # Destinations of requests.

    def _core(self, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, "", "")

    def _monitor(self, component: str | None, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, component or "", "" if component else RUN_DATA)

    def _producer(self, component: str | None, action: str, **params: Any) -> Request:
        return self._connection.ask(action, params, component or "", "" if component else PRODUCER)


def _without_timeout(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that refuses `timeout`, which the methods of version 0.2 had, and says what to write instead."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "timeout" in kwargs:
            limit = f"timeout={kwargs['timeout']!r:.20}"
            raise TypeError(f"{method.__name__}: {limit} is no argument of it any more; wait with .result({limit})")
        return method(*args, **kwargs)

    return call


for _name, _method in list(vars(Operator).items()):
    # run_routine() and call() pass unknown names on, and a routine may have a timeout.
    if callable(_method) and not _name.startswith("_") and _name not in ("run_routine", "call"):
        setattr(Operator, _name, _without_timeout(_method))
