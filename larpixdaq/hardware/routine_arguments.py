"""What a routine takes: described for the operator, and checked before it is called."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from larpixdaq.protocol.hardware import Parameter
from larpixdaq.routines import Routine

#: controller, send_data, send_info.
INTERFACE: Final = 3


def parameters(routine: Routine) -> list[Parameter]:
    """Of what it takes beyond the interface; of a function with `*args` the names that its Routine lists."""
    own = _own(routine.func)
    if _takes_any(own):
        return [Parameter(str(name)) for name in routine.params or ()]
    found = []
    for parameter in own:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        found.append(Parameter(parameter.name, _type_name(parameter.annotation), required, default))
    return found


def usage(routine: Routine) -> str:
    """`pedestal(chip, seconds=1.0)`."""
    said = (p.name if p.required else f"{p.name}={p.default!r}" for p in parameters(routine))
    return f"{routine.name}({', '.join(said)})"


def checked(
    routine: Routine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments as the function gets them behind the interface. TypeError, in one line, when they are too many, too
    few, unknown, or of another type than the function says."""
    own = _own(routine.func)
    if _takes_any(own):
        return _in_order([str(name) for name in routine.params or ()], args, kwargs), {}
    bound = inspect.Signature(own).bind(*args, **kwargs)
    types = _types(routine.func)
    for parameter in own:
        name = parameter.name
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name in bound.arguments:
            try:
                bound.arguments[name] = msgspec.convert(bound.arguments[name], types.get(name, Any))
            except msgspec.ValidationError as error:
                raise TypeError(f"{name}: {_plain(error)}, found {bound.arguments[name]!r:.100}") from None
    return bound.args, bound.kwargs


def _in_order(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """For a function with `*args`, which may do without the last of these names."""
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} arguments, found {len(args)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        if name in given:
            raise TypeError(f"multiple values for argument {name!r}")
        given[name] = value
    for name in names[: len(given)]:
        if name not in given:
            raise TypeError(f"missing a required argument: {name!r}")
    return [given[name] for name in names[: len(given)]]


def _own(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What the function takes beyond the interface."""
    taken = list(inspect.signature(function).parameters.values())
    left, own = INTERFACE, []
    for parameter in taken:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            left = 0
        if left:
            left -= 1
        else:
            own.append(parameter)
    return own


def _takes_any(own: Sequence[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in own)


def _types(function: Callable[..., Any]) -> dict[str, Any]:
    """What msgspec can check; types that it does not know, or that cannot be found, are not checked."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # whatever a routine's file has written there
        return {}
    return {name: hint for name, hint in hints.items() if _checkable(hint)}


def _checkable(hint: Any) -> bool:
    try:
        msgspec.convert(None, hint)
    except msgspec.ValidationError:
        return True
    except Exception:
        return False
    return True


def _type_name(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _plain(error: msgspec.ValidationError) -> str:
    text = str(error).partition(" - at ")[0]
    return (text[:1].lower() + text[1:]).replace("`", "").partition(", got")[0]
