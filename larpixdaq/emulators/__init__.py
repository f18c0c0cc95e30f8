"""Emulated boards: command `larpixdaq-emulator`, which sends the data of boards over sockets and pseudo-terminals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from larpixdaq import config
from larpixdaq.emulators import pacman, serial_board
from larpixdaq.errors import LarpixDaqError, UsageError


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-emulator", description="Emulated boards, on real sockets and pseudo-terminals."
    )
    boards = parser.add_subparsers(title="boards", dest="board", required=True, metavar="BOARD")
    for name, module, description in (
        ("pacman", pacman, "PACMAN boards: a data and a command port per io_group"),
        ("serial", serial_board, "a board on a serial line"),
    ):
        command = boards.add_parser(name, help=description, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(module=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)
    try:
        args.module.check_arguments(args)
        args.module.run(args)
    except LarpixDaqError as error:
        print(f"larpixdaq-emulator: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
