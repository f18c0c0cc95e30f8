"""Command `larpixdaq`: each module of this package defines some of its subcommands."""

import argparse
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Final

from larpixdaq import config
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.version import VERSION

#: The modules of this package, in the order of the help text, with the commands that each adds.
_COMMANDS: Final = {
    "demo": ("demo",),
    "detector": ("up", "down", "config"),
    "system": ("status", "audit"),
    "alarms": ("alarms",),
    "log": ("log", "log-level"),
    "catalogue": ("runs", "comment", "attach", "shifter"),
    "run_sequence": ("run",),
    "qc": ("qc",),
    "files": ("verify", "recover", "raw", "info"),
    "convert": ("convert",),
    "fetch": ("fetch",),
    "tools": ("cat", "diff", "split", "merge", "export", "check-raw"),
    "plot": ("plot", "hot"),
    "snapshots": ("snapshot",),
    "shell": ("shell",),
    "keys": ("keys",),
    "web": ("web-link",),
}


def argument_parser(modules: Iterable[str] = _COMMANDS) -> argparse.ArgumentParser:
    """Make the parser, with the commands of these modules."""
    top = config.ArgumentParser(prog="larpixdaq", description="Data acquisition for LArPix detectors")
    top.add_argument("--version", action="version", version=f"larpix-daq {VERSION}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in modules:
        import_module(f"larpixdaq.cli.{module}").add_commands(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    # The other modules are not imported, because some take longer than a command.
    wanted = [module for module, commands in _COMMANDS.items() if arguments and arguments[0] in commands]
    try:
        options = argument_parser(wanted or _COMMANDS).parse_args(arguments, argparse.Namespace(argv=arguments))
    except KeyboardInterrupt:  # while modules are imported
        print("larpixdaq: interrupted by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    return run_main(lambda: options.function(options), endless=False)
