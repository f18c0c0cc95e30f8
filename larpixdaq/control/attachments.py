"""Files that Operators attach to runs: copies in the state directory, listed in the run catalogue.

They come in pieces, because requests are limited. The core's loop writes and syncs each piece, as it does each step of
a run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from larpixdaq.constants import MAX_ATTACHMENT, MIN_FREE
from larpixdaq.control.catalogue import Author, Catalogue, attachments_dir
from larpixdaq.errors import FileError, RequestError
from larpixdaq.protocol.control import MAX_REQUEST
from larpixdaq.protocol.stream import RunNumber
from larpixdaq.runtime.units import size

#: Maximum bytes of all attachments of a run.
MAX_ATTACHED: Final = 1 << 30
#: Maximum number of files that come at the same time.
_MOST: Final = 8
#: Maximum bytes of a name in the state directory, without the number that makes it unique.
_NAME_BYTES: Final = 100


class Piece(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the action `attach`: `data` are the bytes from `offset` on of a file of `size` bytes."""

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    size: Annotated[int, Meta(ge=0)]
    offset: Annotated[int, Meta(ge=0)]
    data: Annotated[bytes, Meta(max_length=MAX_REQUEST)]
    run: RunNumber | None = None
    by: str | None = None

    @property
    def is_last(self) -> bool:
        return self.offset + len(self.data) >= self.size


@dataclass
class _Upload:
    path: Path
    file: int
    received: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def discard(self) -> None:
        os.close(self.file)
        with suppress(OSError):
            self.path.unlink()


class Attachments:
    """Belongs to the core's loop. All methods raise RequestError or FileError in one line."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._directory = catalogue.path.parent
        self._uploads: dict[tuple[str, int, str], _Upload] = {}  # by session, run and name
        self._next = 0

    def take(self, session: str, run: int, piece: Piece, author: Author) -> dict[str, Any]:
        """Take the next piece of a file of an Operator's session. Returns {"run", "received" (bytes)}, after the last
        piece {"run", "name", "file" (its path), "bytes", "sha256"}."""
        key = session, run, piece.name
        if not piece.offset:
            if (old := self._uploads.pop(key, None)) is not None:
                old.discard()
            self._begin(key, piece)
        upload = self._uploads.get(key)
        if upload is None or upload.received != piece.offset:
            expected = 0 if upload is None else upload.received
            raise RequestError(f"attach: {piece.name}: piece at byte {piece.offset}, expected {expected}")
        if piece.offset + len(piece.data) > piece.size or not (piece.data or piece.is_last):
            raise RequestError(f"attach: {piece.name}: {len(piece.data)} bytes at {piece.offset} of {piece.size}")
        try:
            with _errors(f"attach: {piece.name}"):
                _write(upload.file, piece.data)
                os.fdatasync(upload.file)
            upload.received += len(piece.data)
            upload.digest.update(piece.data)
            if not piece.is_last:
                return {"run": run, "received": upload.received}
            path = self._keep(upload, run, piece, author)
        except FileError:
            del self._uploads[key]
            upload.discard()
            raise
        del self._uploads[key]
        upload.discard()
        digest = upload.digest.hexdigest()
        return {"run": run, "name": piece.name, "file": str(path), "bytes": piece.size, "sha256": digest}

    def _begin(self, key: tuple[str, int, str], piece: Piece) -> None:
        run = key[1]
        if piece.size > MAX_ATTACHMENT:
            raise RequestError(
                f"attach: {piece.name} has {size(piece.size)}, attachments have at most {size(MAX_ATTACHMENT)}"
            )
        attached = sum(entry["bytes"] for entry in self._catalogue.attachments(run))
        if attached + piece.size > MAX_ATTACHED:
            raise RequestError(
                f"attach: run {run} has attachments of {size(attached)}, with {piece.name} it would have more than "
                f"{size(MAX_ATTACHED)}"
            )
        incoming = self._directory / "attachments" / "incoming"
        with _errors(f"attach: {incoming}"):
            incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.statvfs(incoming)
            free = status.f_bavail * status.f_frsize
            if free - piece.size < MIN_FREE:
                raise FileError(
                    f"attach: {piece.name} of {size(piece.size)} does not fit: {incoming} has {size(free)} left, of "
                    f"which {size(MIN_FREE)} stay free"
                )
            while len(self._uploads) >= _MOST:
                self._uploads.pop(next(iter(self._uploads))).discard()
            if not self._uploads:  # what an earlier core has left
                for path in incoming.iterdir():
                    path.unlink()
            self._next += 1
            path = incoming / str(self._next)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._uploads[key] = _Upload(path, os.open(path, flags, 0o600))

    def _keep(self, upload: _Upload, run: int, piece: Piece, author: Author) -> Path:
        """Give a whole file its name, and add it to the catalogue."""
        directory = attachments_dir(self._directory, run)
        with _errors(f"attach: {directory}"):
            directory.mkdir(mode=0o700, exist_ok=True)
            for path in _free_names(directory / safe_name(piece.name)):
                with suppress(FileExistsError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                    break
            os.replace(upload.path, path)
        try:
            self._catalogue.add_attachment(run, piece.name, path.name, piece.size, upload.digest.hexdigest(), author)
        except FileError:
            with suppress(OSError):
                path.unlink()
            raise
        return path


def safe_name(name: str) -> str:
    """Return a name for a file: letters of any script, digits, and . _ + - between them; of at most 100 bytes."""
    stem, dot, ending = re.sub(r"[^\w.+-]", "_", name).lstrip(".-").rpartition(".")
    if not dot or len(ending.encode()) > 20:
        stem, dot, ending = stem + dot + ending, "", ""
    stem = stem.encode()[: _NAME_BYTES - len(f"{dot}{ending}".encode())].decode("utf-8", "ignore")
    return f"{stem or 'file'}{dot}{ending}"


def _free_names(path: Path) -> Iterator[Path]:
    """Yield NAME.ending, NAME-2.ending, NAME-3.ending, …"""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{what}: {error.strerror}") from None
