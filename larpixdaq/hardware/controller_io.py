"""The IO of larpix-control's Controller in the child process: it sends words and gets packets through the producer.

The packets are copies of the recorded rows. After start_listening() all packets are kept until a configuration is read,
and then only the chips' answers, because a running detector sends more packets than Python can handle. `listen_to`
"all" or "answers" selects this explicitly. `left_out` counts packets that found no room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import bidict
import numpy as np
from larpix.io import IO
from larpix.packet import Packet_v1, Packet_v2, PacketCollection, SyncPacket, TimestampPacket, TriggerPacket
from numpy.typing import NDArray

from larpixdaq._native import word_codec
from larpixdaq.errors import RequestError
from larpixdaq.hardware.board_commands import BoardOrders
from larpixdaq.hardware.pixel_layout import LoadedLayout
from larpixdaq.hardware.power import Progress, no_progress
from larpixdaq.hardware.power_up import PowerActions
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_io import BATCH, RegisterExchange, interleave
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hardware.register_tables import Packet_v3
from larpixdaq.protocol import hardware
from larpixdaq.routines._former_names import refuse_unknown_names
from larpixdaq.schema import Asic, PacketType, types_of

#: Attributes that packets get from an io and from larpix-control's loggers.
_ADDED_NAMES: Final = ("receipt_timestamp", "direction")
_LISTEN_TO: Final = {None: hardware.ALL_ROWS, "all": hardware.ALL_ROWS, "answers": hardware.CONFIG_ANSWERS}


class StreamIO(BoardOrders, IO):  # type: ignore[misc]
    """larpix-control's IO over the producer, with the board methods of its PACMAN_IO."""

    def __init__(
        self,
        link: ProducerPipe,
        registers: ChipRegisters,
        invalidate: Callable[[list[int]], None],
        layout: LoadedLayout,
        discover: Callable[..., tuple[Any, dict[str, Any]]],
    ) -> None:
        """`discover`: ChipState.discover_network()."""
        IO.__init__(self)
        BoardOrders.__init__(self, link, invalidate)
        self._layout = layout
        self._discover = discover
        self._io_group_table = bidict.bidict(self.names)
        self.registers = registers
        self._asic = Asic(link.setup.generation)  # of the rows' decoder, which may know the mode fifo diagnostics
        #: None, "all" or "answers"; takes effect at the next start_listening().
        self.listen_to: str | None = None
        self._everything = False
        #: Keys of answering chips by io_group << 8 | io_channel: a measurement asks them at its begin and end.
        self.marks: dict[int, str] = {}
        #: Number of the last mark of a measurement. Consecutive marks ask for different registers.
        self.mark_number = 0
        self._kind = {Asic.V1: Packet_v1, Asic.V3: Packet_v3}.get(self._asic, Packet_v2)
        kinds = [self._kind()] if self._asic == Asic.V1 else [self._kind(), SyncPacket(), TriggerPacket()]
        refuse_unknown_names(PacketCollection, [*kinds, TimestampPacket()], _ADDED_NAMES)

    def power_up(
        self,
        tiles: Any = None,
        vdda_dac: int | None = None,
        vddd_dac: int | None = None,
        limits: Any = None,
        io_group: int | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """Ramp the supplies of tiles up, as Operator.power_up() does. `progress(text, done, total)`: send_info."""
        actions = PowerActions(self._link, self._invalidate, progress, self.dacs)
        return actions.power_up(tiles, vdda_dac, vddd_dac, limits, io_group)

    def discover_network(self, *arguments: Any, progress: Progress = no_progress) -> tuple[Any, dict[str, Any]]:
        """Discover networks, with the arguments of Operator.discover_network() and its result.

        Returns also the Controller of the found chips, which the routine must return in place of its own.
        """
        return self._discover(progress, *arguments)

    def load(self, filepath: Any = None) -> None:
        raise RequestError("no io file is loaded in a routine: the producer's options name the boards")

    def send(self, packets: Any) -> None:
        """Send packets to the chips; BoardError if a board does not accept them."""
        packets = list(packets)
        words = np.array([int.from_bytes(packet.bytes(), "little") for packet in packets], np.uint64)
        groups = np.array([packet.io_group or 0 for packet in packets], np.int64)
        channels = np.array([packet.io_channel or 0 for packet in packets], np.uint8)
        words = self.registers.complete(words)
        reads = bool((words & np.uint64(3) == PacketType.CONFIG_READ).any())
        if self.is_listening and reads and self._everything and self.listen_to != "all":
            self._link.listen(hardware.CONFIG_ANSWERS)
            self._everything = False
        self._send(groups, channels, words)

    def write_registers(self, keys: Sequence[str], values: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
        """Write the registers marked in `mask` of these chips; BoardError if a board does not accept them.

        `values` and `mask` have shape (chips, registers). Packets of larpix-control would take some hundred times as
        long.
        """
        self.await_posted(self.post_registers(keys, values, mask))

    def post_registers(self, keys: Sequence[str], values: NDArray[np.uint8], mask: NDArray[np.bool_]) -> list[int]:
        """Send as write_registers() does, without waiting for the boards. await_posted() takes the returned numbers."""
        chip_keys = _key_parts(keys)
        chips, addresses = np.nonzero(mask)
        made = self.registers.words(PacketType.CONFIG_WRITE, chip_keys[chips, 2], addresses, values[chips, addresses])
        return self._post(chip_keys[chips, 0], chip_keys[chips, 1].astype(np.uint8), made)

    def await_posted(self, numbers: Sequence[int]) -> None:
        """Wait until the boards have accepted the words of post_registers(); BoardError if one does not."""
        for number in numbers:
            self._link.await_answer(number)

    def read_registers(
        self, keys: Sequence[str], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Read the registers marked in `mask`, shape (chips, registers), with retries.

        Returns their values and which of them were answered, both of the same shape. BoardError if a board does not
        accept the words, RuntimeError while the IO listens.
        """
        if self.is_listening:
            raise RuntimeError("Already listening")
        exchange = RegisterExchange(self._link, self.registers, _key_parts(keys).astype(np.uint8))
        answers = exchange.read(mask, lambda done, total: None)
        if answers.errors:
            raise BoardError("; ".join(answers.errors.values()))
        return answers.values, answers.counts > 0

    def request_registers(self, keys: Sequence[str], registers: Sequence[int]) -> None:
        """Ask each of these chips for these registers; BoardError if a board does not accept the words.

        The answers come as rows.
        """
        chip_keys = np.repeat(_key_parts(keys), len(registers), axis=0)
        made = self.registers.words(PacketType.CONFIG_READ, chip_keys[:, 2], np.tile(registers, len(keys)))
        self._send(chip_keys[:, 0], chip_keys[:, 1].astype(np.uint8), made)

    def _send(self, groups: NDArray[np.int64], channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self.await_posted(self._post(groups, channels, words))

    def _post(self, groups: NDArray[np.int64], channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> list[int]:
        if not len(words):
            return []
        self.groups(np.unique(groups).tolist())
        numbers = []
        for io_group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == io_group)
            at = at[interleave(channels[at])]
            for begin in range(0, len(at), BATCH):
                part = at[begin : begin + BATCH]
                numbers.append(self._link.send_words(io_group, channels[part], words[part]))
        return numbers

    def start_listening(self) -> None:
        """Start to keep packets; RuntimeError if it listens already, as in PACMAN_IO."""
        if self.is_listening:
            raise RuntimeError("Already listening")
        if self.listen_to not in _LISTEN_TO:
            raise RequestError(f"listen_to: expected None, 'all' or 'answers', found {self.listen_to!r}")
        super().start_listening()
        self._everything = _LISTEN_TO[self.listen_to] == hardware.ALL_ROWS
        self._link.listen(_LISTEN_TO[self.listen_to])

    def stop_listening(self) -> None:
        """Stop to keep packets; RuntimeError if it does not listen."""
        if not self.is_listening:
            raise RuntimeError("Already not listening")
        super().stop_listening()
        self._link.listen(hardware.NO_ROWS)

    @property
    def left_out(self) -> int:
        """Number of packets since start_listening() that were not kept, because the routine took them too slowly."""
        return self._link.left_out

    def empty_queue(self) -> tuple[list[Any], bytes]:
        """Return the packets that came since the last call, and the bytes of their words."""
        packets: list[Any] = []
        stream: list[bytes] = []
        for rows in self._link.rows():
            made, data = self._packets(rows)
            packets += made
            stream.append(data)
        return packets, b"".join(stream)

    def take_rows(self) -> list[NDArray[Any]]:
        """Return the rows that came since the last call, as they are recorded (schema.py): faster than packets."""
        return self._link.rows()

    def positions(self, chip: Any) -> NDArray[np.float64]:
        """Return x and y (mm) of a chip's channels from the loaded layout, shape (channels, 2), NaN without a pixel.

        RequestError if no layout is loaded, or if the chip is not in it.
        """
        return self._layout.get().positions(chip)

    def cleanup(self) -> None:
        """Do nothing, because the connections belong to the producer. PACMAN_IO has this method."""

    def _packets(self, rows: NDArray[Any]) -> tuple[list[Any], bytes]:
        data = word_codec.encode(rows, asic=self._asic).tobytes()
        made: list[Any] = []
        at = 0
        v1 = self._asic == Asic.V1
        kinds = types_of(rows).tolist()
        for kind, row in zip(kinds, rows, strict=True):
            packet: Any
            if kind < PacketType.TIMESTAMP:
                word, at = data[at : at + 8], at + 8
                if row["direction"] == 0:
                    continue
                packet = self._kind(word[:7] if v1 else word)
                if v1:
                    io_group, io_channel = (int(part) for part in row["chip_key"].split(b"-")[:2])
                else:
                    packet.fifo_diagnostics_enabled = self._asic == Asic.V2_DIAGNOSTICS
                    packet.receipt_timestamp = int(row["receipt_timestamp"])
                    io_group, io_channel = int(row["io_group"]), int(row["io_channel"])
                packet.io_group, packet.io_channel = io_group, io_channel
            elif kind == PacketType.TIMESTAMP:
                packet = TimestampPacket(timestamp=int(row["timestamp"]))
            elif kind == PacketType.SYNC and not v1:
                sync = bytes([int(row["trigger_type"])])
                packet = SyncPacket(sync_type=sync, clk_source=int(row["dataword"]), timestamp=int(row["timestamp"]))
                packet.io_group = int(row["io_group"])
            elif kind == PacketType.TRIGGER and not v1:
                packet = TriggerPacket(trigger_type=bytes([int(row["trigger_type"])]), timestamp=int(row["timestamp"]))
                packet.io_group = int(row["io_group"])
            else:
                continue
            made.append(packet)
        return made, data


def _key_parts(keys: Sequence[str]) -> NDArray[np.int64]:
    """Return io_group, io_channel and chip_id of chip keys, shape (chips, 3)."""
    return np.array([key.split("-") for key in keys], np.int64).reshape(-1, 3)
