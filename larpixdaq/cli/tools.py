"""Commands `larpixdaq cat`, `diff`, `split`, `merge`, `export` and `check-raw`: tools for finished and other files."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import config, schema
from larpixdaq.cli.progress import ProgressLine, time_left
from larpixdaq.cli.system import plain_console
from larpixdaq.errors import FileError, LarpixDaqError, RequestError, UsageError, printable
from larpixdaq.hdf5 import names, repartition
from larpixdaq.hdf5 import verify as verification
from larpixdaq.hdf5.comparison import Comparison, compare
from larpixdaq.hdf5.export import FORMATS, export
from larpixdaq.hdf5.new_file import check_new
from larpixdaq.hdf5.part_reader import Part
from larpixdaq.hdf5.reader import DataFile, text
from larpixdaq.hdf5.recordings import copy_columns
from larpixdaq.hdf5.repartition import Borders, NewPart
from larpixdaq.hdf5.row_reader import Chunk, Selection
from larpixdaq.hdf5.run_reader import follow_parts, open_run
from larpixdaq.monitor import packet_text
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import parse_positive_duration, parse_since, parse_whole, size, utc
from larpixdaq.schema import ASICS, PacketType, parse_key
from larpixdaq.sources.raw_check import RawCheck, check_raw

#: Rows that are shown at once.
_PIECE: Final = schema.CHUNK_ROWS
#: Names of types for people: `config_write` and `config-write`.
_TYPE_NAMES: Final = {kind.name.lower(): int(kind) for kind in PacketType}


def add_commands(commands: Any) -> None:
    parser = _parser(
        commands,
        "cat",
        "show rows of files",
        "Shows rows, one a line: text, or JSON. All rows of a file, unless some are selected.",
        several="a file, or a directory of runs",
        json_help="print one JSON object for each row instead of text",
    )
    _add_selection(parser)
    parser.add_argument(
        "--follow",
        action="store_true",
        help="go on with a run that is being written until it ends, over its further parts, with rows that only a "
        "journal has: PATH is one of its files, or a directory, of which the newest run is taken",
    )
    parser.set_defaults(function=cat)
    parser = _parser(
        commands,
        "diff",
        "compare two files, or two directories of files",
        "Compares rows, messages, configurations, runs and ledgers. Files of the same run are compared block by block, "
        "so that copies of two storages are equal in spite of another order. Of two directories, the files with equal "
        "names are compared. Exit status 1 when anything differs.",
    )
    parser.add_argument("one", type=_path, metavar="ONE", help="a file, or a directory")
    parser.add_argument("other", type=_path, metavar="OTHER", help="another one")
    parser.set_defaults(function=diff)
    parser = _parser(
        commands,
        "split",
        "divide files into smaller ones",
        "Writes the rows of files into smaller new ones: parts of the same run, whose ledger `larpixdaq verify` checks "
        "like that of any part, and which end with a block. Give all parts of a run, for part numbers that fit "
        "together. Rows of files of other programs are copied with their tables. All or nothing is made of a run.",
        several="a finished file, or a directory of runs",
    )
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument("--rows", type=parse_whole, metavar="N", help="at most N rows in a file, and at least a block")
    limits.add_argument(
        "--every",
        type=parse_positive_duration,
        metavar="TIME",
        help="a new file after each TIME of data, such as 10min",
    )
    limits.add_argument(
        "--by-io-group", action="store_true", help="a directory io_group_N for each board, with its rows only"
    )
    _add_output(parser)
    _add_locks(parser)
    parser.set_defaults(function=split)
    parser = _parser(
        commands,
        "merge",
        "join the parts of runs",
        "Writes all given parts of a run into one new file, whose ledger `larpixdaq verify` checks like that of any "
        "file. Parts of several runs give a file for each run. Files of other programs become one file, which is named "
        "after the first one (NAME.merged.h5), if they have the same columns.",
        several="finished files of runs, or directories of runs",
    )
    _add_output(parser)
    _add_locks(parser)
    parser.set_defaults(function=merge)
    parser = _parser(
        commands,
        "export",
        "write rows for other programs: Parquet, CSV, numpy",
        "Writes the rows of each file into a new file NAME.parquet, NAME.csv or NAME.npy. Parquet needs pyarrow "
        '(pip install "larpix-daq[parquet]").',
        several="a file, or a directory of runs",
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="format and ending of the new files")
    parser.add_argument("--columns", type=_columns, default=(), metavar="NAME,...", help="only these columns")
    _add_selection(parser)
    _add_output(parser, required=False)
    parser.set_defaults(function=export_files)
    parser = _parser(
        commands,
        "check-raw",
        "check raw files, also of other programs",
        "Checks the structure of raw files (rawhdf5format), and every message and word in them. Exit status 1, with "
        "the reasons, when anything is wrong.",
        several="a raw file",
    )
    parser.add_argument(
        "--asic",
        choices=ASICS,
        default="2",
        help="chips whose packets they have, which raw files do not say (default 2)",
    )
    parser.add_argument("--clock64", action="store_true", help="the firmware of the PACMAN had a 64-bit clock")
    parser.set_defaults(function=check_raw_files)


def _parser(
    commands: Any,
    name: str,
    short: str,
    description: str,
    *,
    several: str = "",
    json_help: str = "print one JSON object instead of text",
) -> Any:
    parser = commands.add_parser(name, help=short, description=description)
    if several:
        parser.add_argument("paths", nargs="+", type=_path, metavar="PATH", help=several)
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def _add_output(parser: Any, *, required: bool = True) -> None:
    default = "" if required else " (default: that of each file)"
    parser.add_argument(
        "-o", "--output-dir", type=_path, required=required, metavar="DIR",
        help=f"directory of the new files, which exists; no file is overwritten{default}",
    )  # fmt: skip


def _add_locks(parser: Any) -> None:
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a shell is not the current folder
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def _columns(text: str) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in text.split(","))
    if not all(columns) or len(set(columns)) < len(columns):
        raise argparse.ArgumentTypeError(f"columns {text!r:.100}: expected different names, such as chip_id,dataword")
    return columns


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that select rows."""
    add = parser.add_argument
    known = ", ".join(name.replace("_", "-") for name in _TYPE_NAMES)
    add("--types", type=_types, metavar="TYPE,...", help=f"only rows of these types: {known}, or 0 to 7")
    add("--io-groups", type=_numbers(255), metavar="N,...", help="only of these io_groups, such as 1,3-5")
    add("--io-channels", type=_numbers(255), metavar="N,...", help="only packets of these io_channels")
    add("--chips", type=_chips, metavar="KEY,...", help="only packets of these chips, such as 1-2-11")
    add("--channels", type=_numbers(255), metavar="N,...", help="only packets of these channels")
    add(
        "--rows",
        type=_range,
        default=(0, None),
        metavar="FIRST:END",
        help="only rows from FIRST to before END, by their number in the file, before other selections; negative "
        "numbers count from the end: -100: are the last 100 (write --rows=-100:)",
    )
    add(
        "--since",
        type=parse_since,
        metavar="TIME",
        help="only rows that arrived from this time on, in whole blocks: UTC, such as 2023-03-15T02:48, or before now, "
        "such as 90min, 12h, 3d",
    )
    add("--until", type=parse_since, metavar="TIME", help="only rows that arrived before this time, likewise")


def _selection(options: argparse.Namespace) -> Selection:
    """Return the selection of parsed options."""
    since = -math.inf if options.since is None else options.since
    until = math.inf if options.until is None else options.until
    if until < since:
        raise UsageError("--until is before --since")
    start, stop = options.rows
    return Selection(
        options.types,
        options.io_groups,
        options.io_channels,
        options.chips,
        options.channels,
        start,
        stop,
        begin_ns=since * 1e9,
        end_ns=until * 1e9,
    )


def _types(text: str) -> tuple[int, ...]:
    """Parse names or numbers of packet types. Raises ArgumentTypeError."""
    kinds = []
    for name in text.split(","):
        kind = _TYPE_NAMES.get(name.strip().lower().replace("-", "_").replace(" ", "_"))
        if kind is None and name.strip() in map(str, range(8)):
            kind = int(name)
        if kind is None:
            known = ", ".join(each.replace("_", "-") for each in _TYPE_NAMES)
            raise argparse.ArgumentTypeError(f"type {name!r:.40}: expected one of {known}, or 0 to 7")
        kinds.append(kind)
    return tuple(kinds)


def _chips(text: str) -> tuple[tuple[int, int, int], ...]:
    """Parse chip keys. Raises ArgumentTypeError."""
    try:
        return tuple(parse_key(key.strip()) for key in text.split(","))
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _range(text: str) -> tuple[int, int | None]:
    """Parse FIRST:END, of which either may be left out. Raises ArgumentTypeError."""
    match = re.fullmatch(r"\s*(-?\d{1,15})?\s*:\s*(-?\d{1,15})?\s*", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"rows {text!r:.40}: expected FIRST:END, such as 1000:2000 or -100:")
    return int(match[1] or 0), None if match[2] is None else int(match[2])


def _numbers(high: int) -> Any:
    def parse(text: str) -> tuple[int, ...]:
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
            if match is None or int(match[2] or match[1]) > high or int(match[2] or match[1]) < int(match[1]):
                raise argparse.ArgumentTypeError(f"{part!r:.40}: expected numbers from 0 to {high}, such as 1,3-5")
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
        return tuple(found)

    return parse


def packet_files(paths: Sequence[Path], *, unfinished: bool) -> list[Path]:
    """Return the files, and the packet files of runs in the directories, each once.

    `unfinished`: also parts that are being written. FileError for a directory without any, or that cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not os.path.isdir(path):
            found[path] = None
            continue
        endings = (names.FINISHED, names.PART) if unfinished else (names.FINISHED,)
        files = [file for _, ending, file in names.run_files(path) if ending in endings and names.parse(file.name)]
        if not files:
            raise FileError(f"{path}: holds no {'' if unfinished else 'finished '}file of a run")
        found |= dict.fromkeys(files)
    return list(found)


def _each(paths: Sequence[Path], quiet: bool, do: Callable[[Path], tuple[bool, list[str], dict[str, Any]]]) -> int:
    """Do the same with each file, print its lines, and for JSON its facts. Returns the exit status."""
    console, outcomes, ok = plain_console(quiet=quiet), dict[str, Any](), True
    for path in paths:
        try:
            good, lines, facts = do(path)
        except LarpixDaqError as error:
            good, lines, facts = False, [str(error)], {"text": str(error)}
        for line in lines:
            console.print(printable(line))
        ok = ok and good
        outcomes[str(path)] = {"ok": good} | facts
    if quiet:
        print(json.dumps({"ok": ok, "files": outcomes}))
    return 0 if ok else 1


# cat


def cat(options: argparse.Namespace) -> int:
    selection, ok = _selection(options), True
    if options.follow:
        return _follow(options, selection)
    for path in packet_files(options.paths, unfinished=True):
        try:
            with open_run(path, parts=False) as run:
                _show_heading(f"{path}: {run.rows} rows", options)
                show: RowText | None = None
                for part, first, rows in run.part_rows(selection):
                    show = show or RowText(part, selection, as_json=options.json)
                    show.write(rows, first)
        except FileError as error:
            ok = False
            print(printable(f"larpixdaq: {error}"), file=sys.stderr)
    return 0 if ok else 1


def _follow(options: argparse.Namespace, selection: Selection) -> int:
    """Show the rows of a growing run until it ends."""
    if len(options.paths) != 1 or selection.stop is not None or options.until is not None:
        raise UsageError("--follow goes with one PATH, and without an end of --rows and --until")
    show: RowText | None = None
    for found in follow_parts(options.paths[0], selection):
        if found is None:
            sys.stdout.flush()
            continue
        part, first, rows = found
        if show is None or part.path != show.path:
            _show_heading(f"{part.path}:", options)
            show = RowText(part, selection, as_json=options.json)
        show.write(rows, first)
    return 0


def _show_heading(text: str, options: argparse.Namespace) -> None:
    if not options.json:
        print(printable(text))
        print(f"{'row':>12}  {packet_text.HEADER}")


class RowText:
    """Writes the selected rows of a part as lines: text, or JSON."""

    def __init__(self, part: Part, selection: Selection, *, as_json: bool) -> None:
        self.path, file = part.path, part.file
        self._own, self._json = file.own, as_json
        self._chosen = selection.row_filter(file.dtype, part.path)
        self._message = part.message if file.own else _Messages(file).line
        self._encode = msgspec.json.Encoder().encode
        columns = file.dtype.names or ()
        v3 = "reset_sample_flag" in columns or file.version.startswith("3")
        later = schema.PACKETS_3_0 if v3 else schema.PACKETS_2_4_CLOCK64
        #: dtype of the rows in one of our layouts.
        self._layout = schema.PACKETS_1_0 if "chip_key" in columns else later
        if file.layout is not None:
            self._layout = file.layout.dtype
        self._columns = columns

    def write(self, rows: NDArray[Any], first: int) -> None:
        """Write a line for each selected row. `first`: number of the first row in the file."""
        for low in range(0, len(rows), _PIECE):
            piece = rows[low : low + _PIECE]
            numbers = np.arange(first + low, first + low + len(piece))
            if self._chosen is not None:
                chosen = self._chosen.chosen(Chunk(piece.dtype, rows=piece))
                piece, numbers = piece[chosen], numbers[chosen]
            sys.stdout.write("".join(f"{line}\n" for line in self.lines(piece, numbers)))

    def lines(self, rows: NDArray[Any], numbers: NDArray[Any]) -> list[str]:
        """Return a line for each row. `numbers`: their numbers in the file."""
        if self._json:
            return self._json_lines(rows, numbers)
        kinds = schema.types_of(rows)
        shown = rows
        if rows.dtype != self._layout:
            shown = np.zeros(len(rows), self._layout)
            copy_columns(rows, shown)
        if not self._own and not shown["direction"].any():  # other programs do not fill it
            shown = shown.copy()
            shown["direction"] = 1
        lines = packet_text.lines(shown)
        for place in np.flatnonzero(kinds == PacketType.MESSAGE).tolist():
            found = self._message(int(shown["counter"][place]))
            if found is not None:
                lines[place] = f"{lines[place]}: {printable(found)}"
        return [f"{number:>12}  {line}" for number, line in zip(numbers.tolist(), lines, strict=True)]

    def _json_lines(self, rows: NDArray[Any], numbers: NDArray[Any]) -> list[str]:
        columns = self._columns
        lists = [rows[name].tolist() for name in columns]
        kinds = schema.types_of(rows).tolist()
        lines = []
        for number, kind, *values in zip(numbers.tolist(), kinds, *lists, strict=True):
            fields = {
                name: text(value) if isinstance(value, bytes) else value
                for name, value in zip(columns, values, strict=True)
            }
            if kind == PacketType.MESSAGE and (found := self._message(int(fields.get("counter", 0)))) is not None:
                fields["message"] = found
            lines.append(self._encode({"file": str(self.path), "row": number} | fields).decode())
        return lines


class _Messages:
    """Lines of /messages of another program's file, by number."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._lines: list[str] | None = None
        if file.version in ("2.3", "2.4"):  # rows do not have the numbers
            self._lines = []

    def line(self, number: int) -> str | None:
        if self._lines is None:
            self._lines = []
            with contextlib.suppress(FileError, ValueError):
                table = self._file.foreign_table("messages")
                lines = table["message"].tolist() if table is not None else []
                self._lines = [text(line) if isinstance(line, bytes) else str(line) for line in lines]
        return self._lines[number] if number < len(self._lines) else None


# diff


def diff(options: argparse.Namespace) -> int:
    console, outcomes, ok = plain_console(quiet=options.json), list[dict[str, Any]](), True
    for one, other in _pairs(options.one, options.other):
        try:
            found = compare(one, other)
        except FileError as error:
            ok = False
            console.print(printable(str(error)))
            outcomes.append({"files": [str(one), str(other)], "same": False, "text": str(error)})
            continue
        for line in _diff_lines(found):
            console.print(printable(line))
        ok = ok and found.same
        facts = {"same": found.same, "rows": found.rows, "different_rows": found.different_rows}
        facts |= {"differences": found.differences, "notes": found.notes}
        outcomes.append({"files": [str(one), str(other)]} | facts)
    alone = _without_partner(options.one, options.other)
    for path, directory in alone:
        console.print(printable(f"{path}: there is no such file in {directory}"))
    ok = ok and not alone
    if options.json:
        print(json.dumps({"ok": ok, "pairs": outcomes, "alone": [str(path) for path, _ in alone]}))
    return 0 if ok else 1


def _diff_lines(found: Comparison) -> Iterator[str]:
    rows = f"{found.rows[0]} rows" if found.rows[0] == found.rows[1] else f"{found.rows[0]} and {found.rows[1]} rows"
    yield f"{found.one}, {found.other}: {'same content' if found.same else 'DIFFERENT'}, {rows}"
    yield from (f"  {line}" for line in found.differences + found.notes)


def _pairs(one: Path, other: Path) -> list[tuple[Path, Path]]:
    if os.path.isdir(one) != os.path.isdir(other):
        directory, file = (one, other) if os.path.isdir(one) else (other, one)
        partner = directory / file.name
        return [(partner, file) if os.path.isdir(one) else (file, partner)]
    if not os.path.isdir(one):
        return [(one, other)]
    mine, theirs = _by_name(one), _by_name(other)
    if not mine and not theirs:
        raise FileError(f"{one}, {other}: hold no .h5 files")
    return [(path, theirs[name]) for name, path in mine.items() if name in theirs]


def _without_partner(one: Path, other: Path) -> list[tuple[Path, Path]]:
    """Return the files of two directories that only one of them has, with the other directory."""
    if not (os.path.isdir(one) and os.path.isdir(other)):
        return []
    mine, theirs = _by_name(one), _by_name(other)
    return [(path, other) for name, path in mine.items() if name not in theirs] + [
        (path, one) for name, path in theirs.items() if name not in mine
    ]


def _by_name(directory: Path) -> dict[str, Path]:
    try:
        files = sorted(directory.iterdir())
    except OSError as error:
        raise FileError(f"cannot read the directory {directory}: {error.strerror}") from None
    return {
        path.name: path
        for path in files
        if path.name.endswith(names.FINISHED) and not path.name.endswith(names.RAW) and path.is_file()
    }


# split and merge


def split(options: argparse.Namespace) -> int:
    lock_directory.use(options.lock_dir, options.state_dir)
    borders = Borders(options.rows, options.every)

    def do(paths: list[Path], progress: _Copying) -> list[NewPart]:
        if not repartition.is_own(paths[0]):
            return _split_foreign(paths[0], options, progress)
        if not options.by_io_group:
            progress.begin(paths)
            return repartition.repartition(paths, options.output_dir, borders, "split", report=progress.add)
        return _for_each_board(
            paths, options.output_dir, progress, lambda directory, board: repartition.repartition(
                paths, directory, Borders(), "split", board, progress.add
            ),
        )  # fmt: skip

    return _remake(options, do)


def _split_foreign(path: Path, options: argparse.Namespace, progress: _Copying) -> list[NewPart]:
    if options.every is not None:
        raise FileError(
            f"{path}: larpix-daq did not write it, so that its rows have no time of arrival: split it by rows"
        )
    stem = path.name.removesuffix(names.FINISHED)
    if options.by_io_group:
        return _for_each_board(
            [path], options.output_dir, progress, lambda directory, board: [
                repartition.copy_rows([path], directory / path.name, "split", io_group=board, report=progress.add)
            ],
        )  # fmt: skip
    with DataFile(path) as file:
        starts = range(0, max(1, file.rows), options.rows)
    progress.begin([path])
    made: list[NewPart] = []
    targets = [options.output_dir / f"{stem}_{number:03d}.h5" for number in range(len(starts))]
    try:
        for target in targets:
            check_new(target)
        for start, target in zip(starts, targets, strict=True):
            stop = start + options.rows
            made.append(repartition.copy_rows([path], target, "split", start, stop, report=progress.add))
    except BaseException:
        for part in made:
            part.path.unlink(missing_ok=True)
        raise
    return made


def _for_each_board(
    paths: Sequence[Path], directory: Path, progress: _Copying, do: Callable[[Path, int], list[NewPart]]
) -> list[NewPart]:
    """Make the files of each board in a new directory of its own, or nothing."""
    boards: set[int] = set()
    for path in paths:
        with DataFile(path) as file:
            for rows in file.pieces():
                boards.update(np.unique(repartition.boards_of(rows)).tolist())
    made: list[NewPart] = []
    directories: list[Path] = []
    progress.begin(paths, len(boards - {0}))
    try:
        for board in sorted(boards - {0}):
            new = directory / f"io_group_{board}"
            try:
                new.mkdir()
            except OSError as error:
                raise FileError(f"cannot make {new}: {error.strerror}") from None
            directories.append(new)
            made += do(new, board)
    except BaseException:
        for part in made:
            part.path.unlink(missing_ok=True)
        for new in directories:
            new.rmdir()
        raise
    return made


def merge(options: argparse.Namespace) -> int:
    lock_directory.use(options.lock_dir, options.state_dir)

    def do(paths: list[Path], progress: _Copying) -> list[NewPart]:
        progress.begin(paths)
        if repartition.is_own(paths[0]):
            return repartition.repartition(paths, options.output_dir, Borders(), "merge", report=progress.add)
        target = options.output_dir / f"{paths[0].name.removesuffix(names.FINISHED)}.merged.h5"
        return [repartition.copy_rows(paths, target, "merge", report=progress.add)]

    return _remake(options, do, join_foreign=True)


class _Copying:
    """One line on stderr: how much of a run, or of another file, is copied, rate and time left."""

    def __init__(self, name: str, line: ProgressLine) -> None:
        self._name, self._line = name, line
        self._rows = self._total = 0
        self._began = 0.0

    def begin(self, paths: Sequence[Path], times: int = 1) -> None:
        """Begin to copy the rows of these files, each `times` times. FileError if a file cannot be read."""
        for path in paths:
            with DataFile(path) as file:
                self._total += times * file.rows
        self._began = time.monotonic()

    def add(self, rows: int) -> None:
        """Count rows that were read."""
        self._rows += rows
        self._line.show(self._text)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        return (
            f"{self._name}: {100 * self._rows / max(1, self._total):.0f} % of {self._total / 1e6:.1f} M rows copied, "
            f"{self._rows / seconds / 1e6:.2f} M rows/s{time_left(seconds, self._rows, self._total)}, then verified"
        )


def _remake(
    options: argparse.Namespace, do: Callable[[list[Path], _Copying], list[NewPart]], *, join_foreign: bool = False
) -> int:
    """Make new files of each run, or other file, verify them, and report."""
    if not os.path.isdir(options.output_dir):
        raise FileError(f"--output-dir {options.output_dir}: there is no such directory")
    groups = repartition.group_by_run(packet_files(options.paths, unfinished=False))
    if join_foreign and (foreign := [group[0] for group in groups if not repartition.is_own(group[0])]):
        groups = [group for group in groups if group[0] not in foreign] + [foreign]
    first = {group[0]: group for group in groups}
    line = ProgressLine()

    def remake(path: Path) -> tuple[bool, list[str], dict[str, Any]]:
        number = f" ({list(first).index(path) + 1} of {len(first)})" if len(first) > 1 else ""
        try:
            made = do(first[path], _Copying(f"{path.name}{number}", line))
        finally:
            line.clear()
        lines, facts, good = [], [], True
        for part in made:
            report = verification.verify(part.path)
            good = good and report.ok
            state = "good" if report.ok else "BAD"
            of = f", {part.condition}" if part.condition else ""
            lines.append(f"{part.path}: {part.rows} rows{of}, verified: {state}; made from {'; '.join(part.made_from)}")
            lines += [f"  {line}" for line in report.findings]
            facts.append(
                {"file": str(part.path), "rows": part.rows, "condition": part.condition, "verified": report.ok}
                | {"findings": report.findings, "made_from": part.made_from}
            )
        return good, lines, {"made": facts, "from": [str(each) for each in first[path]]}

    return _each(list(first), options.json, remake)


# export


def export_files(options: argparse.Namespace) -> int:
    chosen = _selection(options)
    paths = packet_files(options.paths, unfinished=True)
    targets = {path: _exported(path, options) for path in paths}
    if len(set(targets.values())) < len(targets):
        raise UsageError(
            "several of these files have the same name, and so would their exports: export them one by one"
        )

    def do(path: Path) -> tuple[bool, list[str], dict[str, Any]]:
        with open_run(path, parts=False) as run:
            report = export(run, targets[path], options.format, chosen, options.columns)
        per_row = f", {report.bytes / report.rows:.1f} bytes a row" if report.rows else ""
        line = f"{report.path}: {report.rows} rows, {size(report.bytes)}{per_row}"
        return True, [line], {"file": str(report.path), "rows": report.rows, "bytes": report.bytes}

    return _each(paths, options.json, do)


def _exported(path: Path, options: argparse.Namespace) -> Path:
    stem = path.name.removesuffix(".part").removesuffix(names.FINISHED)
    return (options.output_dir or path.parent) / f"{stem}.{options.format}"


# check-raw


def check_raw_files(options: argparse.Namespace) -> int:
    def do(path: Path) -> tuple[bool, list[str], dict[str, Any]]:
        found = check_raw(path, ASICS[options.asic], clock64=options.clock64)
        facts = {"messages": found.messages, "words": found.words, "findings": found.findings, "notes": found.notes}
        return found.ok, list(_raw_lines(found)), facts | {"io_groups": found.boards}

    return _each(options.paths, options.json, do)


def _raw_lines(found: RawCheck) -> Iterator[str]:
    state = "good" if found.ok else "BAD"
    yield f"{found.path}: {state}, {found.messages} messages with {found.words} words"
    yield from (f"  {line}" for line in found.findings + found.notes)
    for io_group, counts in found.boards.items():
        times = f"{utc(counts['first_s'])} to {utc(counts['last_s'])}: " if counts["last_s"] else ""
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in counts.items() if name not in ("first_s", "last_s")
        )
        yield f"  io_group {io_group}: {times}{numbers}"
