"""Commands `larpixdaq snapshot …`: snapshots of the chips' configurations, in the catalogue and as files."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.errors import printable
from larpixdaq.operator import Operator
from larpixdaq.runtime.units import utc

#: Seconds for an answer of the core, and of a producer that writes and reads the registers of all chips.
_LIMIT: Final = 10.0
_SLOW: Final = 600.0
#: Maximum number of differences and of chips that are shown.
_SHOWN: Final = 20


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "snapshot",
        help="configurations of the chips: save, list, load, compare, write as files; disabled channels",
        description="Saves the wanted register values of all chips of a producer under a name in the run catalogue, "
        "compares and loads them. A snapshot can also be a file, or a folder of config_CHIP.json: then give its path "
        "with a / (such as ./today) in place of the name.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    what = "its name, or the path of a file or folder"

    def add(name: str, function: Any, text: str, *, producer: bool = True) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        config.add_core_argument(action)
        config.add_insecure_argument(action)
        if producer:
            action.add_argument("--component", metavar="NAME", help="the producer (default: the first one)")
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        action.set_defaults(function=function)
        return action

    action = add("save", save, "save the wanted values of all chips")
    action.add_argument("name", metavar="NAME")
    action.add_argument("--comment", default="", metavar="TEXT")
    add("list", list_, "list the snapshots in the catalogue", producer=False)
    action = add(
        "load", load, "write the values of a snapshot to the chips, and check them; exits with 1 if some differ"
    )
    action.add_argument("snapshot", metavar="SNAPSHOT", help=what)
    action.add_argument("--skip-missing", action="store_true", help="load the others if some of its chips are not here")
    action = add(
        "compare", compare, "compare a snapshot with another one, or with the wanted values; exits with 1 if not same"
    )
    action.add_argument("snapshot", metavar="SNAPSHOT", help=what)
    action.add_argument("other", nargs="?", metavar="OTHER", help=f"{what} (default: the present wanted values)")
    action = add("write", write, "write a snapshot, or the present wanted values, into files")
    action.add_argument("path", metavar="PATH", help="a new file with .json at its end, or a new folder")
    action.add_argument("name", nargs="?", metavar="NAME", help="of the snapshot (default: the present wanted values)")
    action = add("remove", remove, "remove a snapshot from the catalogue", producer=False)
    action.add_argument("name", metavar="NAME")
    action = add("disable", disable, "disable the channels in a list, {io_group-tile-chip_id: [channel, ...]}")
    action.add_argument("file", metavar="FILE", help="a JSON file")
    action = add("disabled", disabled, "write the list of the disabled channels")
    action.add_argument("file", metavar="FILE", help="a new JSON file")


def _operator(options: argparse.Namespace) -> Operator:
    return Operator(options.core, insecure=options.insecure)


def _print(options: argparse.Namespace, answer: Any, lines: list[str]) -> None:
    if options.json:
        print(json.dumps(answer))
        return
    console = plain_console()
    for line in lines:
        console.print(printable(line))


def save(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        answer = operator.save_snapshot(options.name, options.comment, options.component).result(_LIMIT)
    _print(options, answer, [f"{answer['name']}: {answer['chips']} chips saved, {answer['bytes']} bytes"])
    return 0


def list_(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        found = operator.snapshots().result(_LIMIT)
    lines = [
        f"{utc(each['time'])}  {each['name']}  {each['chips']} chips of --asic {each['asic']}, by {each['operator']}"
        + (f": {each['comment']}" if each["comment"] else "")
        for each in found
    ]
    _print(options, {"snapshots": found}, lines or ["no snapshot yet"])
    return 0


def load(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        answer = operator.load_snapshot(options.snapshot, options.skip_missing, options.component).result(_SLOW)
    lines = [
        f"{answer['chips']} chips: {answer['registers']} registers checked, {answer['written']} written, "
        f"{answer['different']} different now"
    ]
    lines += [
        f"{one['chip']} {one['register']}: wanted {one['expected']}, "
        + ("no answer" if one["found"] is None else f"found {one['found']}")
        for one in answer["differences"][:_SHOWN]
    ]
    names = {
        "silent": "silent chips",
        "missing": "not here, skipped",
        "unchanged": "chips that the snapshot does not have, unchanged",
        "moved": "on another io_channel of their tile",
        "board_errors": "errors of boards",
    }
    _print(options, answer, lines + _some(answer, names))
    return 0 if answer["ok"] else 1


def compare(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        answer = operator.compare_snapshot(options.snapshot, options.other, options.component).result(_SLOW)
    other = options.other or "wanted now"
    lines = [f"{answer['chips']} chips compared: {answer['different']} registers different"]
    lines += [
        f"{one['chip']} {one['register']}: {options.snapshot} {one['snapshot']}, {other} {one['other']}"
        for one in answer["differences"][:_SHOWN]
    ]
    names = {
        "missing": f"only in {options.snapshot}",
        "new": f"only in {other}",
        "moved": "on another io_channel of their tile",
    }
    _print(options, answer, lines + _some(answer, names))
    return 0 if answer["same"] else 1


def write(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        files = operator.write_snapshot(options.path, options.name, options.component)
    _print(options, {"path": options.path, "files": files}, [f"{options.path}: {files} files written"])
    return 0


def remove(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        answer = operator.remove_snapshot(options.name).result(_LIMIT)
    _print(options, answer, [f"{answer['name']}: removed"])
    return 0


def disable(options: argparse.Namespace) -> int:
    with _operator(options) as operator:
        answer = operator.disable_channels(options.file, options.component).result(_SLOW)
    _print(options, answer, [f"{answer['chips']} chips: {answer['registers']} registers written"])
    return 0


def disabled(options: argparse.Namespace) -> int:
    from larpixdaq.control.snapshots import write_disabled

    with _operator(options) as operator:
        found = operator.disabled_channels(options.component).result(_SLOW)
    write_disabled(options.file, found)
    number = sum(map(len, found.values()))
    _print(options, {"file": options.file, "channels": number}, [f"{options.file}: {number} disabled channels"])
    return 0


def _some(answer: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Return a line for each list in the answer that is not empty."""
    lines = []
    for name, text in names.items():
        entries = [f"{a} is {b}" for a, b in answer[name].items()] if name == "moved" else answer[name]
        if entries:
            more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
            lines.append(f"{len(entries)} {text}: {', '.join(entries[:_SHOWN])}{more}")
    return lines
