"""larpix-control's io configuration files (JSON): which address has which io_group.

    {"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, "pacman.local"], [2, "pacman2.local"]]}

PACMAN_IO's may also say the boards' revisions (`--pacman-revision`), of all or of each io_group, which larpix-control
does not look at: "pacman_revision": 4, or {"1": 4, "2": 5}.

A name is looked up in the working directory first and then among the files that larpix-control brings; `_include` lists
files whose fields are taken where the file itself has none.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import ConfigError
from larpixdaq.sources.channel import REVISIONS

#: What each class reads when no file is named.
DEFAULTS: Final = {"PACMAN_IO": "io/pacman.json", "ZMQ_IO": "io/loopback.json", "MultiZMQ_IO": "io/default.json"}
#: ZMQ_IO also reads the files of MultiZMQ_IO.
_ACCEPTS: Final = {"ZMQ_IO": ("ZMQ_IO", "MultiZMQ_IO")}
_GROUP: Final = re.compile(r"\d{1,3}", re.ASCII)
_MAX_DEPTH: Final = 8
_MAX_BYTES: Final = 1 << 20


def read(io_class: str, name: str) -> list[tuple[int, str]]:
    """(io_group, address) of each board in the file's order; ConfigError in one line when the file is not of that
    class."""
    config = _of_class(io_class, name)
    table = config.get("io_group")
    boards = []
    for entry in table if isinstance(table, list) else ():
        match entry:
            case [int(io_group), str(address)] if not isinstance(io_group, bool):
                boards.append((io_group, address))
            case _:
                raise ConfigError(f"io config {name}: io_group: expected [number, address], found {entry!r}")
    if not boards:
        raise ConfigError(f"io config {name}: io_group: expected a list of [number, address], found {table!r}")
    return boards


def revisions(io_class: str, name: str = DEFAULTS["PACMAN_IO"]) -> dict[int, int]:
    """Revision by io_group as the file has them, 0 standing for all boards that are not named; {} when it has none."""
    found = _of_class(io_class, name).get("pacman_revision")
    if found is None:
        return {}
    by_group = found if isinstance(found, dict) else {"0": found}
    for group, revision in by_group.items():
        if not _GROUP.fullmatch(group) or type(revision) is not int or revision not in REVISIONS:
            raise ConfigError(
                f"io config {name}: pacman_revision: expected one of {', '.join(map(str, REVISIONS))}, or "
                f'{{"io_group": revision}}, found {found!r:.100}'
            )
    return {int(group): revision for group, revision in by_group.items()}


def _of_class(io_class: str, name: str) -> dict[str, Any]:
    config = _load(name, _MAX_DEPTH)
    found = config.get("io_class")
    if found not in _ACCEPTS.get(io_class, (io_class,)):
        raise ConfigError(f"io config {name}: expected io_class {io_class}, found {found!r}")
    return config


def _load(name: str, depth: int) -> dict[str, Any]:
    if depth == 0:
        raise ConfigError(f"io config {name}: more than {_MAX_DEPTH} files include each other")
    path = _find(name)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"io config {path}: larger than {_MAX_BYTES} bytes")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"io config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"io config {path}: not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_config_type") != "io":
        raise ConfigError(f'io config {path}: "_config_type": "io" is missing')
    included = config.get("_include", [])
    if not isinstance(included, list) or not all(isinstance(other, str) for other in included):
        raise ConfigError(f"io config {path}: _include: expected a list of file names, found {included!r}")
    merged: dict[str, Any] = {}
    for other in included:
        merged.update(_load(other, depth - 1))
    return merged | config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    # find_spec does not import the package, which would take a second.
    spec = find_spec("larpix")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        shipped = Path(folder) / "configs" / name
        if shipped.is_file():
            return shipped
    raise ConfigError(f"io config {name}: no such file here or in larpix-control")
