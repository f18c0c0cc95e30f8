"""Snapshots of the chips' configurations, and the files from which they are read and into which they are written.

A snapshot is a JSON object, as a file, or compressed in the catalogue: {"larpixdaq_snapshot": 1, "asic", "time" (UTC),
"chips": {chip key: {"wanted": {register: value}}}}. A register that is not named has its value at power-up, except
those of the network and of its lines (hardware/snapshots.py).

A folder of `config_IOGROUP-IOCHANNEL-CHIP.json`, one for each chip, holds the same as scripts of laboratories write it:
the registers that differ from those at power-up, and `meta` with CHIP_KEY, ASIC_ID ("io_group-tile-chip_id") and
ASIC_VERSION, which older files have among the registers. A list of disabled channels is {ASIC_ID: [channel, …]}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, RequestError, cause
from larpixdaq.protocol.control import MAX_REQUEST
from larpixdaq.runtime.file_access import read_regular
from larpixdaq.schema import key_of, parse_key, tile_of

#: Maximum bytes of a compressed snapshot, because it is sent in one request, and of its JSON.
MAX_PACKED: Final = MAX_REQUEST - (1 << 14)
_MAX_JSON: Final = 64 << 20
#: Maximum bytes of a file of one chip, and of a list of disabled channels.
_MAX_CHIP: Final = 1 << 20
_MAX_LIST: Final = 16 << 20
#: Maximum number of problems in one message.
_NAMED: Final = 3
_FILE: Final = re.compile(r"config_(\d+-\d+-\d+)\.json\Z")
_META: Final = ("CHIP_KEY", "ASIC_ID", "ASIC_VERSION", "description")
#: Generations as files name them, where --asic has another name.
_ASICS: Final = {"2a": "2", "lightpix-v1.0": "lightpix-1"}


class ChipRegisters(msgspec.Struct, omit_defaults=True):
    wanted: dict[str, bool | int | list[bool | int]]
    file: str = ""  # from which they were read


class Snapshot(msgspec.Struct, omit_defaults=True):
    """`asic`: as in --asic, "" if not known. `time`: ISO 8601, UTC."""

    larpixdaq_snapshot: Literal[1]
    chips: dict[str, ChipRegisters]
    asic: str = ""
    time: str = ""


_decoder: Final = msgspec.json.Decoder(Snapshot)


def make(asic: str, chips: dict[str, dict[str, Any]]) -> Snapshot:
    """Make a snapshot of these registers, {chip key: {register: value}}, of now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Snapshot(1, {key: ChipRegisters(registers) for key, registers in chips.items()}, asic, now)


def pack(snapshot: Snapshot) -> bytes:
    """Compress a snapshot; RequestError if it is too large for a request."""
    packed = zlib.compress(msgspec.json.encode(snapshot), 6)
    if len(packed) > MAX_PACKED:
        raise RequestError(
            f"snapshot of {len(snapshot.chips)} chips: has {len(packed)} bytes, a request has at most {MAX_PACKED}"
        )
    return packed


def unpack(packed: bytes) -> Snapshot:
    """Return the snapshot in packed(); RequestError if it is damaged."""
    try:
        inflater = zlib.decompressobj()
        content = inflater.decompress(packed, _MAX_JSON)
        if not inflater.eof:
            raise RequestError(f"snapshot: damaged, or more than {_MAX_JSON} bytes")
        return _decode(content)
    except (zlib.error, ValueError, TypeError) as error:
        raise RequestError(f"snapshot: damaged: {error}") from None


def _decode(content: bytes) -> Snapshot:
    """Decode a snapshot; ValueError if it is none."""
    try:
        snapshot = _decoder.decode(content)
    except RecursionError:
        raise ValueError("too many lists in each other") from None
    if not snapshot.chips:
        raise ValueError("no chips in it")
    return snapshot


# Files.


def read(path: str | Path) -> Snapshot:
    """Read a snapshot from its file, or from a folder of files for each chip. FileError, or ConfigError in one line."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    try:
        return _decode(read_regular(path.resolve(), _MAX_JSON))
    except ValueError as error:
        raise ConfigError(f"{path}: expected a snapshot: {error}") from None


def write(path: str | Path, snapshot: Snapshot, description: str = "") -> int:
    """Write a snapshot: a name that ends with .json is one file, any other a new folder of a file for each chip.

    Returns the number of files. Nothing is overwritten, and nothing is left if it fails. FileError.
    """
    path = Path(path)
    if path.suffix == ".json":
        _write_new(path, msgspec.json.format(msgspec.json.encode(snapshot), indent=1))
        return 1
    with _file_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileError(f"{path}: exists already; a snapshot is written into a new folder")
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
        try:
            for key, chip in snapshot.chips.items():
                io_group, io_channel, chip_id = parse_key(key)
                asic: Any = int(snapshot.asic) if snapshot.asic.isdigit() else snapshot.asic
                meta = {
                    "CHIP_KEY": key,
                    "ASIC_ID": key_of((io_group, tile_of(io_channel), chip_id)),
                    **({"ASIC_VERSION": asic} if asic else {}),
                    **({"description": description} if description else {}),
                    **({"created": snapshot.time} if snapshot.time else {}),
                }
                (part / f"config_{key}.json").write_text(json.dumps(chip.wanted | {"meta": meta}, indent=4) + "\n")
            part.chmod(0o755)
            part.rename(path)
        except BaseException:
            for file in part.iterdir():
                file.unlink()
            part.rmdir()
            raise
    return len(snapshot.chips)


def read_disabled(path: str | Path) -> dict[str, list[int]]:
    """Read a list of disabled channels, {"io_group-tile-chip_id": [channel, …]}. FileError, ConfigError."""
    path = Path(path)
    content = read_object(path, _MAX_LIST)
    content.pop("meta", None)
    for key, channels in content.items():
        if not isinstance(channels, list) or not all(type(channel) is int for channel in channels):
            raise ConfigError(f"{path}: chip {key:.40}: expected a list of channels, found {channels!r:.60}")
    return content


def write_disabled(path: str | Path, channels: dict[str, list[int]]) -> None:
    """Write a list of disabled channels into a new file. FileError."""
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in channels.items())
    _write_new(Path(path), f"{{\n{lines}\n}}\n".encode())


def _read_folder(folder: Path) -> Snapshot:
    with _file_errors(folder):
        files = sorted(file for file in folder.iterdir() if file.name.startswith("config_") and file.suffix == ".json")
    if not files:
        raise ConfigError(f"{folder}: no config_*.json in it")
    snapshot, problems = Snapshot(1, {}), []
    first = ""  # file that gave the generation
    for file in files:
        try:
            key, asic, registers = _read_chip(file)
            if key in snapshot.chips:
                raise ConfigError(f"{file.name}: chip {key} is also in {snapshot.chips[key].file}")
            if asic and snapshot.asic and asic != snapshot.asic:
                raise ConfigError(
                    f"{file.name}: chip {key}: ASIC_VERSION {asic}, but {first} has ASIC_VERSION {snapshot.asic}"
                )
        except LarpixDaqError as error:
            problems.append(str(error).removeprefix(f"{folder}{os.sep}"))
            continue
        if asic and not snapshot.asic:
            snapshot.asic, first = asic, file.name
        snapshot.chips[key] = ChipRegisters(registers, file.name)
    if problems:
        raise ConfigError(f"{folder}: {one_line(problems)}")
    return snapshot


def one_line(problems: list[str]) -> str:
    """Return the first problems, and the number of the others, in one line."""
    more = len(problems) - _NAMED
    return "; ".join(problems[:_NAMED]) + (f"; and {more} more like these" if more > 0 else "")


def _read_chip(file: Path) -> tuple[str, str, dict[str, Any]]:
    """Return chip key, generation ("" if the file does not say) and registers in the file of one chip."""
    content = read_object(file)
    meta = content.pop("meta", {})
    if not isinstance(meta, dict):
        raise ConfigError(f"{file.name}: meta: expected an object, found {meta!r:.60}")
    meta |= {name: content.pop(name) for name in _META if name in content}
    name = _FILE.match(file.name)
    given = meta.get("CHIP_KEY") or (name and name[1])
    if not given:
        raise ConfigError(f"{file.name}: no chip: expected CHIP_KEY in meta, or a name such as config_1-1-11.json")
    with _named(file):
        io_group, io_channel, chip_id = parse_key(given)
    key = key_of((io_group, io_channel, chip_id))
    if name and name[1] != key:
        raise ConfigError(f"{file.name}: its CHIP_KEY is {key}, and its name says {name[1]}")
    place = key_of((io_group, tile_of(io_channel), chip_id))
    if meta.get("ASIC_ID", place) != place:
        raise ConfigError(f"{file.name}: chip {key}: ASIC_ID: expected {place}, found {meta['ASIC_ID']!r:.40}")
    asic = str(meta.get("ASIC_VERSION", ""))
    for register, value in content.items():
        if not isinstance(value, int) and not (
            isinstance(value, list) and all(isinstance(entry, int) for entry in value)
        ):
            raise ConfigError(
                f"{file.name}: chip {key}: register {register:.40}: expected a number or a list of numbers, "
                f"found {value!r:.60}"
            )
    return key, _ASICS.get(asic, asic), content


def read_object(file: Path, limit: int = _MAX_CHIP) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes; FileError, ConfigError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r:.60} is there twice")
        for name in found:
            if not name.isprintable():  # also halves of a surrogate pair, which cannot be sent
                raise ValueError(f"the name {name!r:.60} has characters that are not printable")
        return found

    try:
        content = json.loads(read_regular(file.resolve(), limit), object_pairs_hook=unique)
    except RecursionError:
        raise ConfigError(f"{file.name}: damaged JSON: too many lists in each other") from None
    except ValueError as error:
        raise ConfigError(f"{file.name}: damaged JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file.name}: expected a JSON object, found {type(content).__name__}")
    return content


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet, whole or not at all."""
    with _file_errors(path), open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: {cause(error)}") from None


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise ConfigError(f"{file.name}: {error}") from None
