"""Second names of finished files by a template, and sidecars: NAME.json beside a finished file.

A sidecar has the file's size and checksums, run, part, condition and comments, and its entry for a file catalogue
(hdf5/metadata.py). It is written completely or not at all.

Files keep the names by which storages find runs and parts. A template (`packet-{tag}-{start}`) gives each file a second
name in the same directory, as a hard link, and the same to its sidecar. No name is ever taken from another file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.constants import RUN_DIGITS
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import metadata, names
from larpixdaq.hdf5.raw_file import RawReport, make_raw
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.writer import sync_path
from larpixdaq.protocol.reports import Comment
from larpixdaq.runtime.file_access import damaged_path, open_regular, read_regular
from larpixdaq.runtime.units import utc_name

log = logging.getLogger(__name__)
_PIECE: Final = 1 << 20
#: Maximum bytes of a sidecar that is read. It has all comments on its run, with up to 12 bytes a character in JSON.
_SIDECAR_BYTES: Final = 32 << 20
#: Fields of a template, with their values for the check of a template.
_FIELDS: Final = {
    "run": "0" * RUN_DIGITS,
    "part": "000",
    "start": "20261122T071251Z",
    "tag": "physics",
    "storage": "copy",
}
#: Fields that differ between files.
_OWN_FIELDS: Final = {"run", "start"}
#: A name without its ending. The first character is none that shells or listings treat specially.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@,-]*")
_NAME_BYTES: Final = 200
#: Maximum number behind a second name that other files have.
_MOST_NAMES: Final = 10_000


class NameTemplate:
    """Template of file names, such as `packet-{tag}-{start}`.

    `{run}`: run number, 7 digits; `{part}`: number of the part, 3 digits; `{start}`: UTC time at which the part was
    opened; `{tag}`: kind of the run; `{storage}`: name of the storage, empty for the first or only one. Characters of
    tag and storage that file names here do not have become "-".
    """

    def __init__(self, text: str) -> None:
        """ValueError if names could leave the directory, or claim to be those of runs, or have other characters."""
        self.text = text
        self._text = text.removesuffix(names.FINISHED)
        try:
            fields = [(field, spec, form) for _, field, spec, form in string.Formatter().parse(self._text)]
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        used = {field for field, *_ in fields if field is not None}
        if unknown := sorted(used - set(_FIELDS)):
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise ValueError(f"{text!r}: unknown field {{{unknown[0]}}}; known are {known}")
        if any(spec or form for _, spec, form in fields):
            raise ValueError(f"{text!r}: expected fields without a format, such as {{run}}")
        if not used & _OWN_FIELDS:
            raise ValueError(f"{text!r}: expected {{run}} or {{start}}, since each file needs its own name")
        self._fill(_FIELDS)

    def __str__(self) -> str:
        return self.text

    def name(self, info: Mapping[str, Any], kind: str, storage: str) -> str:
        """Return the name of a part, without its ending. `info`: its row of /run/info. ValueError as above."""
        return self._fill(
            {
                "run": f"{info['run']:0{RUN_DIGITS}d}",
                "part": f"{info['part']:03d}",
                "start": utc_name(info["opened_ns"] // 10**9),
                "tag": names.label(kind) or "unknown",
                "storage": names.label(storage),
            }
        )

    def _fill(self, values: Mapping[str, str]) -> str:
        name = self._text.format_map(values)
        if not _NAME.fullmatch(name) or len(name) > _NAME_BYTES:
            raise ValueError(
                f"{self.text!r}: expected a name of at most {_NAME_BYTES} letters, digits and . _ + = @ , - that "
                f"begins with a letter or digit, found {name[:_NAME_BYTES]!r}"
            )
        if names.claims_run(name):
            raise ValueError(f"{self.text!r}: {name} would be taken for a file of a run, expected another beginning")
        return name


def parse_template(text: str) -> NameTemplate:
    """Parse --name-template. Raises ArgumentTypeError."""
    try:
        return NameTemplate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def give_name(path: Path, stem: str, ending: str) -> str:
    """Give a finished file a second name in its directory, and return it: stem + ending, or stem-2, stem-3, …, where
    another file has the name. FileError if the file system refuses.
    """
    for number in range(1, _MOST_NAMES):
        new = path.with_name(f"{stem}{'' if number == 1 else f'-{number}'}{ending}")
        if not _may_replace(new.with_suffix(names.SIDECAR), path):
            continue
        try:
            os.link(path, new, follow_symlinks=False)
        except FileExistsError:
            if not _is_same(new, path):
                continue
        except OSError as error:
            raise FileError(f"cannot name {path} also {new.name}: {error.strerror}") from None
        if number > 1:
            log.warning("%s is also named %s, because other files have the names before", path.name, new.name)
        sync_path(path.parent)
        return new.name
    raise FileError(f"cannot name {path} also {stem}{ending}: {_MOST_NAMES - 1} files have such names")


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two names are those of one file."""
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _may_replace(second: Path, path: Path) -> bool:
    """Return whether there is no such file, or it is the sidecar of this finished file under its second name."""
    if not os.path.lexists(second) or _is_same(second, path.with_suffix(names.SIDECAR)):
        return True
    try:
        return bool(_read(second).get("file") == path.name)
    except FileError:
        return False


class Digests(NamedTuple):
    """Checksums of a file in hexadecimal digits, and its size in bytes."""

    sha256: str
    adler32: str
    size: int


def digests(path: Path) -> Digests:
    """Compute the checksums of a file, which is read once."""
    sha256, adler32 = hashlib.sha256(), zlib.adler32(b"")
    size = 0
    buffer = bytearray(_PIECE)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            piece = memoryview(buffer)[:n]
            sha256.update(piece)
            adler32 = zlib.adler32(piece, adler32)
            size += n
    return Digests(sha256.hexdigest(), f"{adler32:08x}", size)


def write(path: Path, content: dict[str, Any]) -> str:
    """Write NAME.json beside a finished file; return the SHA-256 in hexadecimal digits.

    `content`: `name`, the file's second name or again the first; `metadata`, of metadata.entry(); and more.
    """
    found = digests(path)
    sums = {"sha256": found.sha256, "adler32": found.adler32}
    _replace(
        path,
        {"file": path.name, "bytes": found.size, "sha256": found.sha256, **content}
        | {"size": found.size, "checksums": sums},
    )
    return found.sha256


def _replace(path: Path, content: dict[str, Any]) -> None:
    sidecar, new = path.with_suffix(names.SIDECAR), path.with_suffix(names.SIDECAR + ".new")
    with open(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "w") as file:
        file.write(json.dumps(content) + "\n")
    sync_path(new)
    second = _second_name(path, content)
    linked = path.with_name(second).with_suffix(names.SIDECAR) if second else None
    if linked is not None and not _may_replace(linked, path):
        linked = None
    new.replace(sidecar)
    if linked is not None:
        os.link(sidecar, new)
        new.replace(linked)


def _second_name(path: Path, content: Mapping[str, Any]) -> str:
    """Return the second name of a file by its sidecar, if it still has it; otherwise an empty text."""
    name = content.get("name")
    if not isinstance(name, str) or name in ("", path.name) or os.path.basename(name) != name:
        return ""
    return name if _is_same(path.with_name(name), path) else ""


def _read(sidecar: Path) -> dict[str, Any]:
    """Read a sidecar. FileError if it is damaged."""
    try:
        content = json.loads(read_regular(sidecar, _SIDECAR_BYTES))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{sidecar} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise FileError(f"{sidecar} is damaged: expected an object")
    return content


def add_comments(path: Path, new: Sequence[Comment]) -> int:
    """Add comments to NAME.json beside a finished file, each once. Returns the number of sidecars, 0 or 1."""
    sidecar = path.with_suffix(names.SIDECAR)
    if not os.path.lexists(sidecar):
        return 0
    content = _read(sidecar)
    known = content.get("comments", [])
    try:
        merged = merge(known, new)
    except msgspec.ValidationError as error:
        raise FileError(f"{sidecar} is damaged: {error}") from None
    if len(merged) > len(known):
        _replace(path, content | {"comments": merged})
    return 1


def add_damage(path: Path, lines: list[str]) -> None:
    """Add damaged chunks to NAME.json beside a finished file."""
    _replace(path, _read(path.with_suffix(names.SIDECAR)) | {"damaged": lines})


def merge(known: list[dict[str, Any]], new: Sequence[Comment]) -> list[dict[str, Any]]:
    """Return the comments of a sidecar with further ones, each once. ValidationError if `known` are no comments."""
    merged = {comment.id: comment for comment in [*msgspec.convert(known, list[Comment]), *new]}
    found: list[dict[str, Any]] = msgspec.to_builtins(list(merged.values()))
    return found


def exists(path: Path) -> bool:
    """Whether NAME.json exists and is complete. A damaged file is kept under another name."""
    sidecar = path.with_suffix(names.SIDECAR)
    if not os.path.lexists(sidecar):
        return False
    try:
        content = _read(sidecar)
        if content["file"] == path.name and len(bytes.fromhex(content["sha256"])) == 32:
            return True
        problem = "it is another file's"
    except (FileError, KeyError, TypeError, ValueError) as error:
        problem = str(error)
    kept = damaged_path(sidecar)
    log.error("%s is damaged, and kept as %s: %s", sidecar, kept.name, problem)
    try:
        sidecar.rename(kept)
    except OSError as error:
        log.error("cannot rename %s: %s", sidecar, error.strerror)
        return True
    return False


def finish_raw(packets: Path) -> RawReport:
    """Make the raw file of a finished packet file, with its sidecar and, if that has one, its second name.

    What exists is kept. FileError as of make_raw().
    """
    report = make_raw(packets)
    if exists(report.path):
        return report
    with DataFile(packets, own=True) as file:
        info, kind = file.run_info(), (file.texts().get("kind") or [""])[-1]
    sidecar = packets.with_suffix(names.SIDECAR)
    second = _second_name(packets, _read(sidecar)) if os.path.lexists(sidecar) else ""
    stem = second.removesuffix(names.FINISHED).replace("packet", "raw")
    write(
        report.path,
        {"name": give_name(report.path, stem, names.RAW) if second else report.path.name}
        | {name: info[name] for name in ("run", "part", "condition")}
        | {"messages": report.messages, "words": report.words, "packet_file": packets.name}
        | {"metadata": metadata.entry(info, kind, metadata.RAW_TIER)},
    )
    return report
