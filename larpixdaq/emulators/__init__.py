"""Emulated boards: command `larpixdaq-emulator`, which sends the data of boards over sockets and pseudo-terminals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from larpixdaq.emulators import pacman, serial_board
from larpixdaq.errors import LarpixDaqError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="larpixdaq-emulator", description="Emulated boards, on real sockets and pseudo-terminals."
    )
    boards = parser.add_subparsers(title="boards", dest="board", required=True, metavar="BOARD")
    command = boards.add_parser(
        "pacman", help="PACMAN boards: a data and a command port per io_group", description=pacman.DESCRIPTION
    )
    pacman.add_arguments(command)
    line = boards.add_parser("serial", help="a board on a serial line", description=serial_board.DESCRIPTION)
    serial_board.add_arguments(line)
    args = parser.parse_args(argv)
    try:
        if args.board == "serial":
            serial_board.check_arguments(line, args)
            serial_board.run(args)
        else:
            pacman.check_arguments(command, args)
            pacman.run(args)
    except LarpixDaqError as error:
        print(f"larpixdaq-emulator: {error}", file=sys.stderr)
        return 1
    return 0
