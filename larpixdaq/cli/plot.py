"""Commands `larpixdaq plot` and `hot`: pictures of runs, and their hot and dead channels.

Imports that take time are inside the functions, because a wrong option must be told at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from larpixdaq import config
from larpixdaq.constants import LAST_RUN, RUN_DIGITS
from larpixdaq.errors import FileError, UsageError, printable
from larpixdaq.runtime.units import parse_positive, parse_whole, utc

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from larpixdaq.hardware.pixel_layout import PixelLayout
    from larpixdaq.hdf5.hot_channels import Channel
    from larpixdaq.hdf5.run_summary import RunSummary

#: The kinds of pictures: those of larpixdaq.plots.
_KINDS: Final = ("rates", "adc", "pixels", "timestamps", "sync", "quality")
#: Channels in the text of `hot`.
_LISTED: Final = 50


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="pictures of a run or of files",
        description="Draws rates, ADC values, pixels, time stamps, SYNC words and data quality of one run, finished or "
        'growing, as PDF (a page each) or PNG (one picture). Needs the extra `plot`: pip install "larpix-daq[plot]".',
    )
    _add_run_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the picture, .pdf or .png (default: named by the run, .pdf, in this folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    parser.add_argument(
        "--kind",
        action="append",
        choices=_KINDS,
        help=f"one kind of picture, may be given several times: {', '.join(_KINDS)} (default: all)",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="RUN|FILE",
        help="another run beside it, on the same scales; may be given several times",
    )
    parser.set_defaults(function=plot)
    parser = commands.add_parser(
        "hot",
        help="hot and dead channels of a run or of files",
        description="Names the channels whose rate in a run is certainly above a threshold: at the limit of the "
        "statistics, where chance alone names 0.01 channels in a run. Their flags and ADC values are not looked at.",
    )
    _add_run_arguments(parser)
    parser.add_argument(
        "--above", type=parse_positive, metavar="RATE", help="threshold in packets/s (default: --factor)"
    )
    parser.add_argument(
        "--factor",
        type=parse_positive,
        default=10.0,
        metavar="X",
        help="threshold as a multiple of the median rate of the io_group's channels with packets (default %(default)g)",
    )
    parser.add_argument(
        "--dead",
        action="store_true",
        help="also channels that were certainly silent, except those that were masked, or are not in the pixel layout",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=hot)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="+",
        metavar="RUN|FILE",
        help="the number of a run in the catalogue, or a file, or files of one run",
    )
    parser.add_argument(
        "--layout",
        default="",
        metavar="FILE",
        help="positions of the pixels: a file, or one of larpix-geometry by name",
    )
    parser.add_argument(
        "--rows",
        type=partial(parse_whole, low=0),
        default=20_000_000,
        metavar="N",
        help="read about N rows at most, evenly chosen; 0: all (default %(default)d)",
    )
    config.add_state_dir_argument(parser)


def _summaries(options: argparse.Namespace, wanted: Sequence[Sequence[str]]) -> list[RunSummary]:
    """Return the summary of each run. FileError if a file or a run is not there, or cannot be read."""
    from larpixdaq.hdf5.run_summary import summarise

    files = [[path for text in texts for path in _files(text, options.state_dir)] for texts in wanted]
    return [summarise(paths, rows=options.rows or 1 << 62) for paths in files]


def _files(text: str, directory: str | None) -> list[Path]:
    """Return a file, or all files of the run of this number by the catalogue."""
    if not text:  # an unset variable of a shell
        raise UsageError("expected a run or a file, found an empty text")
    if Path(text).exists() or not text.isdecimal() or int(text) > LAST_RUN:
        return [Path(text)]
    from larpixdaq.control.run_list import RunList
    from larpixdaq.hdf5.run_summary import run_files
    from larpixdaq.runtime.file_access import state_dir

    catalogue = RunList(state_dir(directory))
    try:
        facts = catalogue.describe(catalogue.find(int(text)))
    finally:
        catalogue.close()
    # The copies of several storages are not joined: those of the first storage whose files are here.
    paths = [Path(file["path"]) for file in facts["file_details"]] or list(map(Path, facts["files"]))
    for path in paths:
        if path.exists() or path.with_name(f"{path.name}.part").exists():
            return run_files(path)
    known = (
        f"not here: {paths[0]}" if paths else "not in the catalogue before it ends: `larpixdaq status` names the file"
    )
    raise FileError(f"the files of run {int(text)} are {known}")


def _layout(name: str) -> PixelLayout | None:
    if not name:
        return None
    from larpixdaq.hardware import pixel_layout

    return pixel_layout.read(name)


def plot(options: argparse.Namespace) -> int:
    from larpixdaq import plots

    output: Path | None = options.output
    if output is not None:
        _check_output(output, options.overwrite)
    layout = _layout(options.layout)
    summaries = _summaries(options, [options.run, *([text] for text in options.compare)])
    if output is None:
        output = Path(f"{'-'.join(map(_name, summaries))}.pdf")
        _check_output(output, options.overwrite)
    kinds = [kind for kind in _KINDS if kind in (options.kind or _KINDS)]
    plots.save(summaries, output, kinds=kinds, layout=layout, overwrite=options.overwrite)
    print(printable(f"{output}: {', '.join(kinds)}"))
    for summary in summaries:
        for note in summary.notes:
            print(printable(f"{_name(summary)}: {note}"))
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse an impossible picture before the rows are read."""
    from larpixdaq import plots

    plots.check_format(output)
    if output.exists() and not overwrite:
        raise FileError(f"{output}: exists already; --overwrite replaces it")


def _name(summary: RunSummary) -> str:
    return Path(summary.files[0]).stem if summary.run is None else f"run{summary.run:0{RUN_DIGITS}d}"


def hot(options: argparse.Namespace) -> int:
    from larpixdaq.hdf5.hot_channels import dead_channels, hot_channels

    layout = _layout(options.layout)
    (summary,) = _summaries(options, [options.run])
    found = hot_channels(summary, above=options.above, factor=options.factor)
    dead, masked, silent = None, 0, []
    if options.dead:
        masks = _masks(summary)
        expected, masked = _expected_channels(summary, layout, masks)
        dead = dead_channels(summary, expected)
        active = {tuple(chip) for chip in summary.chips[summary.packets.any(axis=1)].tolist()}
        silent = ["-".join(map(str, chip)) for chip in sorted(masks.keys() - active)]
    if options.json:
        facts = {
            name: getattr(summary, name)
            for name in ("files", "run", "condition", "rows", "rows_read", "seen", "seconds", "notes")
        }
        facts |= {"hot": [asdict(channel) | {"key": channel.key} for channel in found]}
        if dead is not None:
            facts |= {"dead": [asdict(channel) | {"key": channel.key} for channel in dead]}
            facts |= {"masked": masked, "silent_chips": silent}
        print(json.dumps(facts))
        return 0
    read = "all rows" if summary.seen == 1 else f"{summary.seen:.2%} of the rows, evenly chosen,"
    print(
        printable(
            f"{_name(summary)}: {read} were read; {summary.seconds or 0.0:.1f} s, "
            f"{int((summary.packets > 0).sum())} channels with data packets"
        )
    )
    _print_channels("hot", found)
    if dead is not None:
        _print_channels("dead", dead)
        if masked:
            print(f"{masked} channels were masked, and are not among these")
        if silent:
            more = f" and {len(silent) - _LISTED} more" if len(silent) > _LISTED else ""
            print(f"{len(silent)} chips were configured and sent no data packet: {', '.join(silent[:_LISTED])}{more}")
    for note in summary.notes:
        print(printable(note))
    return 0


def _print_channels(name: str, channels: Sequence[Channel]) -> None:
    print(f"{len(channels)} {name} channels{':' if channels else ''}")
    if not channels:
        return
    rows: list[tuple[str, ...]] = [
        ("channel", "packets/s", "at least", "at most", "compared with", "packets", "stretches", "")
    ]
    rows += [
        (
            channel.key,
            *(f"{value:.4g}" for value in (channel.rate, channel.low, channel.high, channel.compared)),
            str(channel.packets),
            f"{channel.stretches}/64",
            channel.why + (f", silent since {utc(channel.last)}" if channel.last is not None else ""),
        )
        for channel in channels[:_LISTED]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)),
        ]
        print("  ".join([*cells, row[-1]]).rstrip())
    if len(channels) > _LISTED:
        print(f"and {len(channels) - _LISTED} more: --json has all")


def _expected_channels(
    summary: RunSummary, layout: PixelLayout | None, masks: dict[tuple[int, int, int], NDArray[np.bool_]]
) -> tuple[NDArray[np.bool_], int]:
    """Return which channels could have packets, shape (chips, channels), and the number of those that were masked."""
    import numpy as np

    from larpixdaq.errors import RequestError
    from larpixdaq.schema import key_of

    expected = np.ones(summary.packets.shape, np.bool_)
    if layout is not None:
        for index, chip in enumerate(summary.chips.tolist()):
            try:
                placed = np.isfinite(layout.positions(key_of(chip))[: expected.shape[1], 0])
            except RequestError:
                placed = np.zeros(0, np.bool_)
            expected[index, : len(placed)] &= placed
            expected[index, len(placed) :] = False
    masked = np.zeros(expected.shape, np.bool_)
    for key, mask in masks.items():
        for index in np.flatnonzero(summary.chips == np.array(key, summary.chips.dtype)).tolist():
            masked[index, : len(mask)] = mask[: masked.shape[1]]
    return expected & ~masked, int(np.count_nonzero(masked & expected & (summary.packets == 0)))


def _masks(summary: RunSummary) -> dict[tuple[int, int, int], NDArray[np.bool_]]:
    """Return the masked channels of each configured chip by its last configuration: as read back, or else as sent.

    Chips without known names of registers have none.
    """
    import numpy as np

    from larpixdaq.hardware.register_map import ChipRegisters
    from larpixdaq.hdf5.reader import DataFile
    from larpixdaq.hdf5.tables import newest_configurations
    from larpixdaq.protocol.stream import READ
    from larpixdaq.schema import ASICS

    masks: dict[tuple[int, int, int], NDArray[np.bool_]] = {}
    for path in summary.files if summary.own else ():
        with DataFile(path) as file:
            table = newest_configurations(file.table("run/configs"))
        for name in np.unique(table["asic"]).tolist():
            own, asic = table[table["asic"] == name], name.decode("utf-8", "replace")
            given: list[Any] = [[]] * len(own)
            registers = ChipRegisters(asic) if asic in ASICS else None
            if registers is not None and "channel_mask" in registers.addresses:
                values = np.where(own["known"] & READ, own["read"], own["sent"])[:, : registers.count]
                given = registers.values_by_name(values, ["channel_mask"])["channel_mask"]
            for row, mask in zip(own, given, strict=True):
                key = int(row["io_group"]), int(row["io_channel"]), int(row["chip_id"])
                masks[key] = np.asarray(mask, np.bool_)
    return masks
