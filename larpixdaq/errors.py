"""Everything that larpixdaq raises on purpose.

LarpixDaqError
├── ConfigError        wrong options or addresses
├── FormatError        bytes that are not what they should be (also a ValueError)
├── FileError          a file or directory that cannot be used (also an OSError)
│   └── FileLocked         another process writes or recovers it
├── ProtocolError      a peer that says what it must not
│   └── ChecksumError      rows that are not those that were sent
├── RingError          the arena cannot be made or used
├── NoCore             no core answers
├── RequestError       the core or a component refused or failed
│   ├── StateError         not allowed in this run state
│   ├── ControlHeld        another Operator has control
│   ├── UnknownAction      no such action or routine; says which there are
│   └── ComponentError     a component failed or was lost
└── RequestTimeout     no result within the limit (also a TimeoutError)
"""

from __future__ import annotations

import os
from inspect import Parameter, Signature


class LarpixDaqError(Exception):
    """Base of all. Its text is one line that names what, where, asked and found."""


class ConfigError(LarpixDaqError):
    pass


class FormatError(LarpixDaqError, ValueError):
    pass


class FileError(LarpixDaqError, OSError):
    pass


class FileLocked(FileError):
    pass


class ProtocolError(LarpixDaqError):
    pass


class ChecksumError(ProtocolError):
    pass


class RingError(LarpixDaqError):
    pass


class NoCore(LarpixDaqError):
    pass


class RequestError(LarpixDaqError):
    """`code` is what stood in the answer's error field; `by_code` finds the class for it."""

    code = "failed"


class StateError(RequestError):
    code = "state"


class ControlHeld(RequestError):
    """Another Operator has control: `by` names it, `since` is when it got it (unix seconds)."""

    code = "control_held"

    def __init__(self, text: str, by: str = "", since: float = 0.0) -> None:
        super().__init__(text)
        self.by = by
        self.since = since


class UnknownAction(RequestError):
    code = "unknown"


class ComponentError(RequestError):
    code = "component"


class RequestTimeout(LarpixDaqError, TimeoutError):
    pass


_BY_CODE = {cls.code: cls for cls in (RequestError, StateError, ControlHeld, UnknownAction, ComponentError)}


def by_code(code: str, text: str) -> RequestError:
    """The error that an answer with this code stands for."""
    return _BY_CODE.get(code, RequestError)(text)


def misuse(action: str, error: TypeError, signature: Signature) -> RequestError:
    """What Signature.bind() found wrong with somebody's arguments, and how it is right: `reset(length=256)`."""
    own = [one.replace(annotation=Parameter.empty) for one in signature.parameters.values()]
    plain = signature.replace(parameters=own, return_annotation=Signature.empty)
    return RequestError(f"{action}: {error!s:.200}; expected {action}{plain}")


def printable(text: str) -> str:
    """One line for a terminal: control and other invisible characters are shown as escapes, such as \\x1b.

    Texts of files and of peers may move the cursor, recolour, or forge further lines. Bytes of names that are not UTF-8
    become escapes too, which any terminal can show.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cause(error: BaseException) -> str:
    """What went wrong, in one line: what the system says of it where it does; HDF5 tells long stories."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:300]
