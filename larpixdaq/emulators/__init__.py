"""Emulated boards: `larpixdaq-emulator pacman` sends what a board would send, over real sockets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from larpixdaq.emulators import pacman
from larpixdaq.errors import LarpixDaqError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="larpixdaq-emulator", description="Emulated boards on real sockets.")
    boards = parser.add_subparsers(title="boards", dest="board", required=True, metavar="BOARD")
    command = boards.add_parser(
        "pacman", help="PACMAN boards: a data and a command port per io_group", description=pacman.DESCRIPTION
    )
    pacman.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        pacman.check_arguments(command, args)
        pacman.run(args)
    except LarpixDaqError as error:
        print(f"larpixdaq-emulator: {error}", file=sys.stderr)
        return 1
    return 0
