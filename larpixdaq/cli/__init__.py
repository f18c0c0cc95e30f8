"""Command `larpixdaq`: each module of this package defines some of its subcommands."""

import argparse
import sys

from larpixdaq.cli import alarms, demo, detector, files, keys, system
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.version import VERSION


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="larpixdaq", description="Data acquisition for LArPix detectors")
    top.add_argument("--version", action="version", version=f"larpix-daq {VERSION}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, detector, system, alarms, files, keys):
        module.add_commands(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments, argparse.Namespace(argv=arguments))
    return run_main(lambda: options.function(options), endless=False)
