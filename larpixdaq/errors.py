"""Exceptions of larpixdaq, and functions for their texts.

LarpixDaqError
├── ConfigError        wrong options, addresses or configuration files
│   └── UsageError         the command line alone shows that it is wrong: exit status 2
├── FormatError        invalid bytes, of a wrong format or content (also a ValueError)
├── FileError          a file or directory that cannot be used (also an OSError)
│   └── FileLocked         another process writes or recovers this file
├── ProtocolError      a peer broke the protocol
│   └── ChecksumError      rows differ from those that were sent
├── RingError          the ring cannot be made or used
├── BrokerError        the brokers of JetStream do not answer or refuse
├── RevisionConflict   another process has written this entry of a bucket of the brokers
├── NoCore             no core answers
├── RequestError       the core or a component refused or failed
│   ├── StateError         not allowed in this run state
│   ├── ControlHeld        another Operator has control
│   ├── NotAllowed         the key in use does not allow this
│   ├── UnknownAction      no such action or routine; the text lists the existing ones
│   └── ComponentError     a component failed or was lost
└── RequestTimeout     no result within the limit (also a TimeoutError)
"""

from __future__ import annotations

import os
from collections.abc import Collection
from inspect import Parameter, Signature


class LarpixDaqError(Exception):
    """Base class. The text is one line with the quantity, its place, and the expected and found values."""


class ConfigError(LarpixDaqError):
    pass


class UsageError(ConfigError):
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


class BrokerError(LarpixDaqError):
    """`code`: error code of JetStream, 0 if it has none."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class RevisionConflict(LarpixDaqError):
    pass


class NoCore(LarpixDaqError):
    pass


class RequestError(LarpixDaqError):
    """`code`: value of the answer's error field. `error_from_code` makes the error of a code."""

    code = "failed"


class StateError(RequestError):
    code = "state"


class ControlHeld(RequestError):
    """Another Operator has control. `by`: its name. `since`: unix seconds at which it got control."""

    code = "control_held"

    def __init__(self, text: str, by: str = "", since: float = 0.0) -> None:
        super().__init__(text)
        self.by = by
        self.since = since


class NotAllowed(RequestError):
    code = "not_allowed"


class UnknownAction(RequestError):
    code = "unknown"


class ComponentError(RequestError):
    code = "component"


class RequestTimeout(LarpixDaqError, TimeoutError):
    pass


_BY_CODE = {cls.code: cls for cls in (RequestError, StateError, ControlHeld, NotAllowed, UnknownAction, ComponentError)}


def error_from_code(code: str, text: str) -> RequestError:
    """Return the error of an answer with this code."""
    return _BY_CODE.get(code, RequestError)(text)


def misuse(action: str, error: TypeError, signature: Signature) -> RequestError:
    """Return the error for wrong arguments of an action, with its right parameters: `reset(length=256)`.

    `error`: exception of Signature.bind().
    """
    parameters = [parameter.replace(annotation=Parameter.empty) for parameter in signature.parameters.values()]
    plain = signature.replace(parameters=parameters, return_annotation=Signature.empty)
    return RequestError(f"{action}: {error!s:.200}; expected {action}{plain}")


def advice(name: str, known: Collection[str], otherwise: str) -> str:
    """Return what may help against a name that does not exist: `did you mean ring?`, or `otherwise` and all names."""
    import difflib  # late, because most programs never need it

    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"{otherwise} {', '.join(known) or 'none'}"


def printable(text: str) -> str:
    """Return a text as one line for a terminal, with escapes such as \\x1b for invisible characters.

    Control characters in texts of files and peers could move the cursor, change colours or forge lines. Bytes of names
    that are not UTF-8 become escapes too.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_text(argument: str) -> bool:
    """Return whether an argument or path is UTF-8, which messages need. Python has other bytes as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in argument)


def cause(error: BaseException) -> str:
    """Return the cause of an error in one line. For errors of the system it is their short text, not that of HDF5."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:300]
