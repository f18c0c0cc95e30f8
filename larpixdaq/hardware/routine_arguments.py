"""Arguments of routines: described for the Operator, and checked before the call. Arguments of actions: checked."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from larpixdaq.errors import RequestError
from larpixdaq.protocol.hardware import Parameter
from larpixdaq.routines import Routine

#: Number of parameters of each routine that are not its own: controller, send_data, send_info.
INTERFACE: Final = 3


def parameters(routine: Routine) -> list[Parameter]:
    """Return the parameters of a routine after `INTERFACE`; for a function with `*args`, the names in its Routine."""
    own = _own_parameters(routine.func)
    if _has_varargs(own):
        return [Parameter(str(name)) for name in routine.params or ()]
    described = []
    for parameter in own:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        described.append(Parameter(parameter.name, _type_name(parameter.annotation), required, default))
    return described


def usage(routine: Routine) -> str:
    """Return the call of a routine as text: `pedestal(chip, seconds=1.0)`."""
    texts = (p.name if p.required else f"{p.name}={p.default!r}" for p in parameters(routine))
    return f"{routine.name}({', '.join(texts)})"


def check_arguments(
    routine: Routine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments with which the function is called after `INTERFACE`.

    TypeError, in one line, if there are too many or too few, or if one has an unknown name or the wrong type.
    """
    own = _own_parameters(routine.func)
    if _has_varargs(own):
        return _in_order([str(name) for name in routine.params or ()], args, kwargs), {}
    bound = inspect.Signature(own).bind(*args, **kwargs)
    types = _types(routine.func)
    for parameter in own:
        name = parameter.name
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name in bound.arguments:
            try:
                bound.arguments[name] = msgspec.convert(bound.arguments[name], types.get(name, Any))
            except msgspec.ValidationError as error:
                raise TypeError(f"{name}: {_reason(error)}, found {bound.arguments[name]!r:.100}") from None
            except Exception:  # a type that msgspec does not know is not checked
                continue
    return bound.args, bound.kwargs


def _in_order(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments for `*args`, of which the last ones may be missing."""
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} arguments, found {len(args)}: its Routine() names all it takes")
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


def _own_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of the function after `INTERFACE`."""
    taken = list(inspect.signature(function).parameters.values())
    varargs = [at for at, parameter in enumerate(taken) if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    return taken[min([INTERFACE, *varargs]) :]


def _has_varargs(own: Sequence[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in own)


def _types(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # annotations of a routine file can raise anything
        return {}


def _type_name(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _reason(error: msgspec.ValidationError) -> str:
    text = str(error).partition(" - at ")[0]
    return (text[:1].lower() + text[1:]).replace("`", "").partition(", got")[0]


def check_number(what: str, value: Any, low: int, high: int) -> int:
    """Check that an argument is a whole number from `low` to `high`; RequestError if not."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        expected = f"a whole number from {low} to {high}" if low < high else f"{low}"
        raise RequestError(f"{what}: expected {expected}, found {value!r:.100}")
    return value


def check_numbers(what: str, value: Any, low: int, high: int) -> list[int]:
    """Check that an argument is a whole number from `low` to `high` or a list of them; returns each number once."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers:
        raise RequestError(f"{what}: expected one or more whole numbers, found none")
    return list(dict.fromkeys(check_number(what, number, low, high) for number in numbers))
