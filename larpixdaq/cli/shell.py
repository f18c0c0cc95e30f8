"""Command `larpixdaq shell`: IPython with an Operator, completion of names, and the run's state below the prompt."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, Final

from larpixdaq import config
from larpixdaq.errors import ConfigError, printable
from larpixdaq.runtime.units import parse_positive

#: Seconds after which the line below the prompt is drawn again.
_REFRESH: Final = 1.0
_BANNER: Final = """\
larpix-daq {version}: the Operator is `o`, connected to {core}. o.<TAB> shows what it can do, o.packet_rate? how.
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "shell",
        help="IPython with an Operator",
        description="Starts IPython with the Operator `o`, connected to the core. The tabulator completes components, "
        "chips, registers, routines and their parameters; a line below the prompt shows the run and open alarms. "
        'Needs the extra `shell`: pip install "larpix-daq[shell]".',
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument(
        "--timeout",
        type=parse_positive,
        default=2.0,
        metavar="SECONDS",
        help="how long to wait for the core (default %(default)g)",
    )
    parser.set_defaults(function=shell)


def shell(options: argparse.Namespace) -> int:
    try:
        from IPython.terminal.ipapp import TerminalIPythonApp
        from traitlets.config import Config
    except ImportError as error:
        raise ConfigError(f'shell: it needs pip install "larpix-daq[shell]" ({error})') from None
    from larpixdaq.control.prompt import RunPrompt
    from larpixdaq.operator import Operator
    from larpixdaq.version import VERSION

    # Ctrl-C belongs to the cell that runs, any number of times; the other signals end the process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if sys.__stdout__ is not None:
        sys.stdout = sys.__stdout__
    settings = Config()
    settings.TerminalIPythonApp.display_banner = False
    settings.TerminalInteractiveShell.confirm_exit = False
    app: Any = TerminalIPythonApp.instance(config=settings)
    app.initialize([])  # before the Operator, which looks for IPython
    with Operator(options.core, insecure=options.insecure, timeout=options.timeout) as operator:
        app.shell.push({"o": operator, "Operator": Operator})
        RunPrompt(app.shell, operator, refresh=_REFRESH).install()
        print(printable(_BANNER.format(version=VERSION, core=options.core).strip()))
        app.start()
    return 0
