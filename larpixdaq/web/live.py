"""The live state that all viewers share, collected once: status, alarms, log, monitor summary, rates, pixel maps.

An Operator of the web server itself asks the core, the log and the first monitor. What only some pages show (pixel
maps, histograms, packets) is asked for only while one of them shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from larpixdaq.constants import LOG, LOST, PRODUCER, RUN_DATA, STORAGE
from larpixdaq.control.client import Connection, Response
from larpixdaq.control.component_groups import described, is_grouped
from larpixdaq.errors import LarpixDaqError, RequestError, RequestTimeout, UnknownAction
from larpixdaq.web.page import History, Outbox, Section, Tail, binary_frame, to_json

_log = logging.getLogger("larpixdaq.web")
#: Name of the web server's own Operator, by which a supervisor knows its process.
NAME: Final = "web"
#: Seconds between two looks at the core and the log, and at the monitor.
CORE_INTERVAL: Final = 0.5
MONITOR_INTERVAL: Final = 1.0
#: Minimum seconds between two looks at the monitor when pages change what they show.
_HASTE: Final = 0.2
#: Maximum seconds until an answer.
_LIMIT: Final = 3.0
_LAYOUT_LIMIT: Final = 30.0
#: Rates that are kept, one each second, and records of the log.
HISTORY: Final = 3600
LOG_RECORDS: Final = 200
#: Maximum number of different histograms, and of different lists of packets, that all pages show.
_MAX_SELECTIONS: Final = 32
_Byte = Annotated[int, Meta(ge=0, le=255)]


class HistogramOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The channels of a histogram; None: all."""

    io_group: _Byte | None = None
    io_channel: _Byte | None = None
    chip: _Byte | None = None
    channel: _Byte | None = None


class PacketsOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last packets that a page shows, of these types; None: of all."""

    count: Annotated[int, Meta(ge=1, le=500)] = 50
    types: Annotated[tuple[_Byte, ...], Meta(max_length=16)] | None = None


class Watch(msgspec.Struct, frozen=True, tag="watch", tag_field="type", forbid_unknown_fields=True):
    """What a page shows now, beside the state."""

    pixels: Literal["rate", "mean_adc", "packets"] | None = None
    histogram: HistogramOf | None = None
    packets: PacketsOf | None = None


async def ask(
    connection: Connection,
    action: str,
    params: dict[str, Any],
    *,
    component: str = "",
    kind: str = "",
    limit: float = _LIMIT,
) -> Any:
    """Request an action, and return its result. Raises LarpixDaqError; RequestTimeout after `limit` seconds."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Response] = loop.create_future()

    def settle(response: Response) -> None:
        if not done.done():
            done.set_result(response)

    def listen(response: Response) -> None:
        if response.kind in ("result", "error"):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, response)

    request = connection.ask(action, params, component, kind)
    request.listen(listen)
    try:
        response = await asyncio.wait_for(done, limit)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"{action}: no result within {limit:g} s") from None
    if response.error is not None:
        raise response.error
    return response.value


class Page:
    """An open page: what it shows, and what it has not got yet. `wake` is called when there is something to send."""

    def __init__(self, outbox: Outbox, wake: Callable[[], None]) -> None:
        self.outbox, self.wake = outbox, wake
        self.watch = Watch()


class Live:
    """The shared state. All methods run in the event loop of the server."""

    def __init__(self, core: str, *, insecure: bool) -> None:
        """`core`: its address with port. LarpixDaqError if the address or the own key cannot be used."""
        self.core, self.insecure = core, insecure
        self.connection = Connection(core, NAME, insecure=insecure, pid=os.getpid())
        self.pages: set[Page] = set()
        names = (
            "core", "status", "groups", "alarms", "monitor", "monitor_problem", "chips", "layout", "actions", "ledger",
        )  # fmt: skip
        self.history, self.records = History(HISTORY), Tail(LOG_RECORDS)
        self.sections: dict[str, Section | Tail | History] = {name: Section() for name in names}
        self.sections |= {"history": self.history, "log": self.records}
        self.status: dict[str, Any] = {}
        self._loop = asyncio.get_running_loop()
        self._components: list[tuple[Any, ...]] | None = None
        self._log_position: dict[str, Any] = {}
        self._pixels = PixelMaps()
        self._newest_rate = 0.0
        self._hurry = asyncio.Event()
        self._layout_lock = asyncio.Lock()
        self._layout: tuple[dict[str, Any], bytes] | None = None  # as in the section, and all positions
        self._set("core", self._core_facts())
        self._set("monitor_problem", "not known yet")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._repeat(self._look_at_core, CORE_INTERVAL), name="core"),
            asyncio.create_task(self._repeat(self._look_at_log, CORE_INTERVAL), name="log"),
            asyncio.create_task(self._repeat(self._look_at_monitor, MONITOR_INTERVAL, self._hurry), name="monitor"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.connection.close)

    async def ask(
        self, action: str, params: dict[str, Any] | None = None, *, kind: str = "", limit: float = _LIMIT
    ) -> Any:
        """Request an action with the web server's own key, and return its result. Raises as ask() does."""
        return await ask(self.connection, action, params or {}, kind=kind, limit=limit)

    # Pages.

    def add(self, page: Page) -> None:
        self.pages.add(page)

    def remove(self, page: Page) -> None:
        self.pages.discard(page)

    def show(self, page: Page, watch: Watch) -> None:
        """Note what a page shows from now on, and fetch it soon."""
        if watch.pixels != page.watch.pixels:
            page.outbox.drop_array("pixels")
            if watch.pixels is not None and (frame := self._pixels.frames.get(watch.pixels)) is not None:
                page.outbox.set_array("pixels", frame)
                page.wake()
        if watch != page.watch:
            page.watch = watch
            self._hurry.set()

    def _set(self, name: str, value: Any) -> None:
        section = self.sections[name]
        assert isinstance(section, Section)
        if section.set(value):
            for page in self.pages:
                page.outbox.change(name)

    def _flush(self) -> None:
        for page in self.pages:
            page.wake()

    # Looks.

    async def _repeat(self, look: Callable[[], Any], interval: float, hurry: asyncio.Event | None = None) -> None:
        while True:
            began = self._loop.time()
            try:
                await look()
            except Exception:  # an error in larpixdaq must not end the page
                _log.exception("a look has failed")
            self._flush()
            wait = max(_HASTE / 2, began + interval - self._loop.time())
            if hurry is None:
                await asyncio.sleep(wait)
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(hurry.wait(), wait)
                    await asyncio.sleep(max(0.0, began + _HASTE - self._loop.time()))
                hurry.clear()

    @property
    def connected(self) -> bool:
        """Whether the core is heard."""
        return self.connection.link.silence() <= LOST and not self.connection.key_refusal

    def _core_facts(self) -> dict[str, Any]:
        silence, refusal, connected = self.connection.link.silence(), self.connection.key_refusal, self.connected
        return {
            "address": self.core,
            "connected": connected,
            "heard_s": round(silence, 1) if silence < 1e9 else None,
            "insecure": bool(self.status.get("insecure", self.insecure)),
            "version": str(self.status.get("version", "")),
            "problem": refusal or ("" if connected else f"no core is heard at {self.core}"),
        }

    async def _look_at_core(self) -> None:
        try:
            status = await self.ask("status", limit=LOST)
        except LarpixDaqError:
            self._set("core", self._core_facts())
            return
        self.status = status
        self._set("core", self._core_facts())
        self._set("status", status)
        self._set("groups", described(status) if is_grouped(status.get("components", [])) else None)
        self._set("alarms", status.get("alarms", []))
        self._set("ledger", ledger(status))
        alive = [one for one in status.get("components", []) if one["alive"]]
        components = [(one["name"], one["info"].get("pid"), one["actions"]) for one in alive]
        if components != self._components:
            with contextlib.suppress(LarpixDaqError):
                self._set("actions", await self.ask("actions"))
                self._components = components
        self._set("layout", self._layout_facts())

    def _has(self, kind: str, action: str) -> bool:
        """Return whether the first living component of a kind has an action."""
        for one in self.status.get("components", []):
            if one["kind"] == kind and one["alive"]:
                return action in one["actions"]
        return False

    async def _look_at_log(self) -> None:
        if not self._has(LOG, "records"):
            return
        with contextlib.suppress(LarpixDaqError):  # the status shows that the log is gone
            found = await self.ask("records", {"count": LOG_RECORDS, **self._log_position}, kind=LOG)
            same = found["process"] == self._log_position.get("process")
            self._log_position = {"after": found["next"], "process": found["process"]}
            if not same:  # its first records are those of an earlier log
                self.records.clear()
            records = [self.records.append(record) for record in found["records"]]
            for page in self.pages:
                if not same:
                    page.outbox.change("log")
                elif records:
                    page.outbox.append("log", records)

    async def _look_at_monitor(self) -> None:
        try:
            summary = await self.ask("summary", kind=RUN_DATA)
        except LarpixDaqError as error:
            self._set("monitor", None)
            self._set("monitor_problem", _problem(error))
            return
        self._set("monitor", summary)
        self._set("monitor_problem", "")
        self._add_rates(summary)
        self._flush()
        for quantity in sorted({page.watch.pixels for page in self.pages if page.watch.pixels is not None}):
            await self._fetch_pixels(quantity)
        await self._fetch_selections()

    def _add_rates(self, summary: Mapping[str, Any]) -> None:
        """Append the rates of a summary to the history, unless it is as old as the last one."""
        now = float(summary.get("time") or time.time())
        if now - self._newest_rate < MONITOR_INTERVAL / 2:
            return
        self._newest_rate = now
        groups = summary.get("io_groups")
        rates = {}
        if isinstance(groups, np.ndarray) and groups.dtype.names:
            rates = dict(zip(groups["io_group"].tolist(), groups["rate"].tolist(), strict=True))
        item = self.history.append(now, rates, float(summary.get("rate") or 0.0))
        for page in self.pages:
            page.outbox.append("history", [item])

    async def _fetch_pixels(self, quantity: str) -> None:
        try:
            found = await self.ask("pixel_map", {"quantity": quantity}, kind=RUN_DATA)
        except LarpixDaqError as error:
            self._set("monitor_problem", _problem(error))
            return
        if (chips := self._pixels.take_chips(found)) is not None:
            if not self._pixels.frames:  # of another run, or another monitor
                for page in self.pages:
                    page.outbox.drop_array("pixels")
            self._set("chips", chips)
        frame = self._pixels.frame(quantity, found)
        for page in self.pages:
            if page.watch.pixels == quantity:
                page.outbox.set_array("pixels", frame)
        self._flush()

    async def _fetch_selections(self) -> None:
        """Fetch the histograms and packets that pages show, each once."""
        wanted: dict[HistogramOf | PacketsOf, list[Page]] = {}
        for page in self.pages:
            for selection in (page.watch.histogram, page.watch.packets):
                if selection is not None:
                    wanted.setdefault(selection, []).append(page)
        for number, (selection, pages) in enumerate(wanted.items()):
            name, action = ("histogram", "adc_histogram") if isinstance(selection, HistogramOf) else ("packets",) * 2
            params = msgspec.to_builtins(selection)
            value: dict[str, Any] = {"of": params}
            try:
                if number >= _MAX_SELECTIONS:
                    raise LarpixDaqError(f"other pages show {_MAX_SELECTIONS} other selections already")
                found = await self.ask(action, params, kind=RUN_DATA)
                value |= {"problem": "", "time": time.time()}
                value |= found if isinstance(found, dict) else {"rows": found}
            except LarpixDaqError as error:
                value["problem"] = _problem(error)
            json = to_json(value)
            for page in pages:
                page.outbox.set_own(name, json)

    # The pixel layout.

    async def layout(self) -> bytes:
        """Return the positions of all channels in the first producer's pixel layout, as a binary frame.

        Header: as the `layout` section, and "chips": the names of its chips (io_group-io_channel-chip_id, or chip_id),
        "tiles_of" (of each chip), "shape": [chips, channels, 2]. Content: x and y in mm, little-endian f4, NaN without
        a pixel. Raises LarpixDaqError.
        """
        async with self._layout_lock:
            facts = self._layout_facts()
            if facts is None:
                raise RequestError("no pixel layout is loaded: load_pixel_layout(name) loads one")
            if self._layout is None or self._layout[0] != facts:
                # Once for each layout, because the producer does one thing with its chips at a time.
                found = await self.ask("retrieve_pixel_layout", kind=PRODUCER, limit=_LAYOUT_LIMIT)
                self._layout = facts, await asyncio.to_thread(layout_frame, found)
            return self._layout[1]

    def _layout_facts(self) -> dict[str, Any] | None:
        """Return what the first living producer says about its pixel layout; None if it has none."""
        for one in self.status.get("components", []):
            if one["kind"] == PRODUCER and one["alive"]:
                facts: dict[str, Any] | None = one["status"].get("pixel_layout")
                return facts
        return None


def layout_frame(layout: dict[str, Any]) -> bytes:
    """Return the frame of Live.layout() for the result of retrieve_pixel_layout."""
    chips = layout.pop("channels")
    channels = max((len(chip["x"]) for chip in chips.values()), default=0)
    places = np.full((len(chips), channels, 2), np.nan, "<f4")
    for place, chip in zip(places, chips.values(), strict=True):
        for axis, name in enumerate(("x", "y")):
            place[: len(chip[name]), axis] = np.array(chip[name], float)  # None becomes NaN
    header = {**layout, "name": "layout", "chips": list(chips), "tiles_of": [chip["tile"] for chip in chips.values()]}
    return binary_frame(header, places)


def _problem(error: LarpixDaqError) -> str:
    if isinstance(error, UnknownAction):
        return f"the monitor is of another version of larpix-daq: {error}"
    return str(error)


def ledger(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the live counts of producers and storages in a status, by name."""
    made = ("counted_run", "packets", "bad_parity", "unknown", "dropped", "outside_run", "owed_blocks", "inherited",
            "spooled_blocks", "spooled_bytes", "ring")  # fmt: skip
    stored = ("rows", "bytes", "duplicates")
    found: dict[str, Any] = {"producers": {}, "storages": {}}
    for one in status.get("components", []):
        counts = one.get("status") or {}
        if one["alive"] and one["kind"] == PRODUCER:
            found["producers"][one["name"]] = {name: counts[name] for name in made if name in counts}
        elif one["alive"] and one["kind"] == STORAGE:
            found["storages"][one["name"]] = {name: counts[name] for name in stored if name in counts}
    return found


class PixelMaps:
    """The chips of the pixel maps, and the last frame of each quantity."""

    def __init__(self) -> None:
        self.frames: dict[str, bytes] = {}
        self._chips = b""

    def take_chips(self, found: Mapping[str, Any]) -> list[list[int]] | None:
        """Take the chips of an answer. Returns them if they have changed; frames of other chips are forgotten."""
        chips = np.stack([found["chips"][name] for name in ("io_group", "io_channel", "chip_id")], axis=1)
        known, self._chips = self._chips, chips.astype(np.uint8).tobytes()
        if known == self._chips:
            return None
        if not self._chips.startswith(known):
            self.frames.clear()
        listed: list[list[int]] = chips.tolist()
        return listed

    def frame(self, quantity: str, found: Mapping[str, Any]) -> bytes:
        names = ("quantity", "run", "time", "seen", "scale")
        frame = binary_frame({"name": "pixels", **{name: found.get(name) for name in names}}, found["values"])
        self.frames[quantity] = frame
        return frame
