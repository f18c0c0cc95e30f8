"""Routines: sequences of steps with the chips that an operator runs by name.

A routine file is a Python file with a dictionary of its routines::

    from larpixdaq.routines import Routine

    def _count(controller, send_data, send_info, seconds):
        '''What stands here is shown to the operator.'''
        send_info("counting")
        return controller, 42

    registration = {"count": Routine("count", _count, ["seconds"])}

`controller` is larpix-control's Controller as the routine before left it; `send_data(data)` reports that there were
data (the packets themselves are in the recorded stream already); `send_info(text, done=0, total=0)` reports progress.
What is returned is the Controller and a result made of numbers, texts, lists and dictionaries. Arguments that the
function names with a type are checked against it; a function that takes `*args` gets them in the order of the Routine's
list of names.

To develop one without a DAQ::

    from larpixdaq.routines import init_routines, test_routine

    init_routines(".")
    controller, result = test_routine("count", controller, print, print, [3])
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Routine:
    """`func(controller, send_data, send_info, *args) -> (controller, result)`; `params` are the names of the further
    arguments."""

    name: str
    func: Callable[..., Any]
    params: Sequence[str] | None = None


#: What init_routines() has found so far.
ROUTINES: dict[str, Routine] = {}


def init_routines(location: str | os.PathLike[str] | None = None) -> dict[str, Routine]:
    """Fill ROUTINES with those that ship and those of the files in the folder `location`, which are read anew.

    ImportError names the files that cannot be loaded; the others are there then nevertheless.
    """
    found, broken = load([] if location is None else [Path(location).absolute()])
    ROUTINES.update(found)
    if broken:
        raise ImportError("; ".join(broken))
    return ROUTINES


def test_routine(
    name: str,
    controller: Any,
    send_data: Callable[..., Any] | None = None,  # noqa: PT028
    send_info: Callable[..., Any] | None = None,  # noqa: PT028
    args: Iterable[Any] = (),  # noqa: PT028
) -> Any:
    """Run one of ROUTINES here, without a DAQ: returns the Controller and the routine's result.

    What it reports goes to `send_data` and `send_info`, or nowhere.
    """
    return ROUTINES[name].func(controller, send_data or _nowhere, send_info or _nowhere, *args)


vars(test_routine)["__test__"] = False  # none of pytest's


def _nowhere(*said: Any) -> None:
    """Takes what a routine reports."""


def load(folders: Iterable[Path] = ()) -> tuple[dict[str, Routine], list[str]]:
    """The routines that ship and those of the files in these folders, by name; of two of one name the later counts.

    Files are read anew at each call. A file that cannot be loaded harms no other: the second list says, in one line
    each, which and why.
    """
    routines: dict[str, Routine] = {}
    broken: list[str] = []
    shipped = [
        Path(folder) / f"{module.name}.py"
        for folder in __path__
        for module in pkgutil.iter_modules([folder])
        if not module.ispkg
    ]
    files = [(f"{__name__}.{path.stem}", path) for path in shipped]
    for folder in folders:
        try:
            found = sorted(path for path in folder.iterdir() if path.suffix == ".py" and path.name[0] not in "_.")
        except OSError as error:
            broken.append(f"{folder}: {error.strerror}")
            continue
        # At the end, so that a routine file may import its neighbours but hide nothing of the library's.
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        files += [(f"larpixdaq_routine_{path.stem}", path) for path in found]
    for name, path in files:
        try:
            routines.update(_registration(name, path))
        except (Exception, SystemExit) as error:
            broken.append(f"{path}: {type(error).__name__}: {error}")
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
