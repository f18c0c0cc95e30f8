"""Settings of the tiles' supplies for power_up: DACs, limits and tiles of each PACMAN, as JSON, mostly in a file.

It has the keys of the RUN_CONFIG.json that laboratories have, by io_group, with tiles from 1:

    {"io_group_pacman_tile_": {"1": [1, 2]}, "iog_pacman_version_": {"1": "v1rev4"},
     "io_group_asic_version_": {"1": "2b"}, "iog_VDDA_DAC": {"1": [46000, ...]}, "iog_VDDD_DAC": {"1": [31000, ...]}}

DACs are a list by tile or a number for all tiles. Our own are `power_limits`, limits of monitors as in power_up, by
io_group, or under "all" for all boards; and `line_inversion`, whether the lines of its tiles are inverted, by io_group
(default: for 2b). Other keys are ignored.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import RequestError
from larpixdaq.hardware.routine_arguments import check_number

_MAX_BYTES: Final = 1 << 20
#: Largest magnitude of a limit.
_LARGEST: Final = 1e9
#: Tiles of the largest board.
_TILES: Final = 10
_VERSION: Final = re.compile(r"v\d+rev([2-5]|S1|s1)[a-z]?")
#: Revisions whose name has no number: S1 has the command server of revision 3.
_NAMED: Final = {"S1": 3, "s1": 3}
_SUPPLIES: Final = {"vdda": "iog_VDDA_DAC", "vddd": "iog_VDDD_DAC"}

Limits = dict[str, tuple[float | None, float | None]]


@dataclass
class BoardSettings:
    """Settings of one board. Tiles count from 0. `revision`, `asic`: as the file says, 0 and "" without."""

    tiles: list[int] = field(default_factory=list)
    #: DAC settings by supply (vdda, vddd) and tile.
    dacs: dict[str, list[int]] = field(default_factory=dict)
    revision: int = 0
    asic: str = ""
    inverted: bool = False
    limits: Limits = field(default_factory=dict)


def located(settings: str) -> str:
    """Return settings, the path of a file or JSON itself, as a process in another working directory reads them."""
    return settings if not settings or _is_json(settings) else str(Path(settings).resolve())


def name_of(settings: str) -> str:
    """Return what an error calls settings."""
    return "its power settings" if _is_json(settings) else settings


def _is_json(settings: str) -> bool:
    return settings.startswith("{")


def read_settings(settings: str) -> dict[int, BoardSettings]:
    """Read settings by io_group, from the path of a file or from JSON.

    RequestError with the file, the key, what was expected and what was found.
    """
    if _is_json(settings):
        return _parse(settings, "power settings")
    path, file = Path(settings), settings
    try:
        with path.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"power settings {file}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise RequestError(f"power settings {file}: larger than {_MAX_BYTES} bytes")
    return _parse(data, f"power settings {file}")


def _parse(data: str | bytes, name: str) -> dict[int, BoardSettings]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: no JSON: {error}") from None
    try:
        return parse_settings(content)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def parse_settings(content: Any) -> dict[int, BoardSettings]:
    """Return settings by io_group from the content of a file. RequestError as in read_settings()."""
    boards: dict[int, BoardSettings] = {}
    if not isinstance(content, dict):
        raise RequestError(f"expected an object with keys such as iog_VDDA_DAC, found {content!r:.100}")
    for io_group, tiles in _table(content, "io_group_pacman_tile_").items():
        key = f"io_group_pacman_tile_: {io_group}"
        values = tiles if isinstance(tiles, list) else [tiles]
        numbers = [check_number(key, value, 1, _TILES) - 1 for value in values]
        boards.setdefault(io_group, BoardSettings()).tiles = list(dict.fromkeys(numbers))
    for supply, name in _SUPPLIES.items():
        for io_group, dacs in _table(content, name).items():
            values = dacs if isinstance(dacs, list) else [dacs] * _TILES
            if not 1 <= len(values) <= _TILES:
                raise RequestError(f"{name}: {io_group}: expected 1 to {_TILES} DAC settings, found {len(values)}")
            checked = [check_number(f"{name}: {io_group}", value, 0, 0xFFFF) for value in values]
            boards.setdefault(io_group, BoardSettings()).dacs[supply] = checked
    for io_group, version in _table(content, "iog_pacman_version_").items():
        match = _VERSION.fullmatch(version) if isinstance(version, str) else None
        if match is None:
            raise RequestError(f"iog_pacman_version_: {io_group}: expected v1rev4 or the like, found {version!r:.100}")
        number = _NAMED.get(match[1]) or int(match[1])
        boards.setdefault(io_group, BoardSettings()).revision = number
    for io_group, asic in _table(content, "io_group_asic_version_").items():
        if isinstance(asic, bool) or not isinstance(asic, int | str) or not re.fullmatch(r"[\w.-]{1,12}", str(asic)):
            raise RequestError(f"io_group_asic_version_: {io_group}: expected 2, 2b or the like, found {asic!r:.100}")
        board = boards.setdefault(io_group, BoardSettings())
        board.asic = {"2a": "2"}.get(str(asic), str(asic))
        board.inverted = board.asic == "2b"
    for io_group, inverted in _table(content, "line_inversion").items():
        if not isinstance(inverted, bool):
            raise RequestError(f"line_inversion: {io_group}: expected true or false, found {inverted!r:.100}")
        boards.setdefault(io_group, BoardSettings()).inverted = inverted
    limits = content.get("power_limits", {})
    if not isinstance(limits, dict):
        raise RequestError(f"power_limits: expected limits by io_group, found {limits!r:.100}")
    common = parse_limits(limits["all"]) if "all" in limits else {}
    own = _table({"power_limits": {name: value for name, value in limits.items() if name != "all"}}, "power_limits")
    for io_group in own:
        boards.setdefault(io_group, BoardSettings())
    for io_group, board in boards.items():
        board.limits = common | (parse_limits(own[io_group]) if io_group in own else {})
    return boards


def parse_limits(limits: Any) -> Limits:
    """Return limits by monitor: {"vdda_ma": 500} is an upper limit, {"vdda_mv": [1700, 1900]} a range."""
    if not isinstance(limits, dict):
        raise RequestError(f"limits: expected {{monitor: highest value or [lowest, highest]}}, found {limits!r:.100}")
    parsed: Limits = {}
    for name, value in limits.items():
        if not isinstance(name, str):
            raise RequestError(f"limits: expected the name of a monitor such as vdda_ma, found {name!r:.100}")
        bounds = value if isinstance(value, list | tuple) else [None, value]
        if len(bounds) != 2 or not all(bound is None or _is_number(bound) for bound in bounds):
            raise RequestError(f"limits: {name:.100}: expected a number or [lowest, highest], found {value!r:.100}")
        low, high = bounds
        if low is not None and high is not None and low > high:
            raise RequestError(f"limits: {name:.100}: the lowest value {low:g} is above the highest {high:g}")
        parsed[name] = low, high
    return parsed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _table(content: dict[str, Any], name: str) -> dict[int, Any]:
    """Return a table by io_group."""
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise RequestError(f"{name}: expected an object with io_groups as keys, found {table!r:.100}")
    by_group = {}
    for key, value in table.items():
        if not re.fullmatch(r"[1-9]\d{0,2}", key, re.ASCII) or int(key) > 255:
            raise RequestError(f"{name}: expected io_groups from 1 to 255 as keys, found {key!r:.100}")
        by_group[int(key)] = value
    return by_group
