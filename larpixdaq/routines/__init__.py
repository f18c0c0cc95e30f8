"""Routines: sequences of steps with the chips that an operator runs by name.

A routine file is a Python file with a dictionary of its routines::

    from larpixdaq.routines import Routine

    def _count(controller, send_data, send_info, seconds):
        '''Operators see this text in the list of routines.'''
        send_info("counting")
        return controller, 42

    registration = {"count": Routine("count", _count, ["seconds"])}

`controller` is larpix-control's Controller, as the previous routine left it. `send_info(text, done=0, total=0)` reports
progress. `send_data(data)` only reports that data came, because the packets are in the recorded stream already.
The function returns the Controller and a result made of numbers, texts, lists and dictionaries. An argument with a type
annotation is checked against it. A function with `*args` gets its arguments in the order of the Routine's `params`.

To try a routine without a DAQ::

    from larpixdaq.routines import init_routines, test_routine

    init_routines(".")
    controller, result = test_routine("count", controller, print, print, [3])
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from larpixdaq.routines._former_names import advice


@dataclass(frozen=True)
class Routine:
    """`func(controller, send_data, send_info, *args) -> (controller, result)`; `params`: names of the `args`.

    Without `params` they are the names in the function's signature; a function with `*args` has none then.
    """

    name: str
    func: Callable[..., Any]
    params: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.params is None:
            with contextlib.suppress(TypeError, ValueError):  # no function, or one without a signature
                own = list(inspect.signature(self.func).parameters.values())[3:]
                if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own):
                    names = [parameter.name for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
                    object.__setattr__(self, "params", names)


#: All routines that init_routines() has loaded, by name.
ROUTINES: dict[str, Routine] = {}


def init_routines(location: str | os.PathLike[str] | None = None) -> dict[str, Routine]:
    """Load the routines of larpix-daq and of the files in the folder `location` into ROUTINES.

    Files are read again at each call. ImportError names the files that cannot be loaded; the others are loaded.
    """
    routines, broken = load([] if location is None else [Path(location).absolute()])
    ROUTINES.update(routines)
    if broken:
        raise ImportError("; ".join(f"{path}: {reason}" for path, reason in broken.items()))
    return ROUTINES


def test_routine(
    name: str,
    controller: Any,
    send_data: Callable[..., Any] | None = None,  # noqa: PT028
    send_info: Callable[..., Any] | None = None,  # noqa: PT028
    args: Iterable[Any] = (),  # noqa: PT028
) -> Any:
    """Run one of ROUTINES in this process, without a DAQ. Returns the Controller and the routine's result.

    Without `send_data` and `send_info` its reports are dropped.
    """
    return ROUTINES[name].func(controller, send_data or _drop_report, send_info or _drop_report, *args)


vars(test_routine)["__test__"] = False  # no test of pytest


def _drop_report(*report: Any) -> None:
    """Stands in for `send_data` and `send_info`."""


def load(folders: Iterable[Path] = ()) -> tuple[dict[str, Routine], dict[str, str]]:
    """Load the routines of larpix-daq and of the files in these folders, by name; a later file replaces a name.

    Files are read again at each call. A file that cannot be loaded does not affect the others: the second result has
    the reason, in one line, by the path of each such file.
    """
    routines: dict[str, Routine] = {}
    broken: dict[str, str] = {}
    files = [(f"{__name__}.{path.stem}", path) for path in sorted(Path(__file__).parent.glob("[!_.]*.py"))]
    for folder in folders:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".py" and path.name[0] not in "_.")
        except OSError as error:
            broken[str(folder)] = error.strerror or type(error).__name__
            continue
        # At the end of sys.path, so that routine files can import each other but cannot hide a module of a library.
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        files += [(f"larpixdaq_routine_{path.stem}", path) for path in paths]
    for name, path in files:
        try:
            routines.update(_registration(name, path))
        except (Exception, SystemExit) as error:
            broken[str(path)] = " ".join(f"{type(error).__name__}: {error}{advice(error)}".split())
    return routines, broken


def _registration(name: str, path: Path) -> dict[str, Routine]:
    loader = SourceFileLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    registration = getattr(module, "registration", {})
    if not isinstance(registration, dict):
        raise TypeError(f"registration: expected a dict, found {type(registration).__name__}")
    for key, routine in registration.items():
        if not isinstance(key, str) or not isinstance(routine, Routine) or not callable(routine.func):
            raise TypeError(f"registration[{key!r}]: expected a Routine with a function, found {routine!r}")
    return registration
