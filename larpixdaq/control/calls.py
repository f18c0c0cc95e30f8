"""One request for an action of a component, as the component's handler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from larpixdaq.control.messages import Answer, Request, packed


class Call:
    """One request for an action. Exactly one of result() and fail() ends it, at once or later, from the main loop."""

    action: str
    params: dict[str, Any]

    def __init__(self, request: Request, answer: Callable[[Call, Answer], None]) -> None:
        self.action = request.action
        self.params = request.params
        self.request = request.request
        self.ended = False
        self._answer = answer

    def ack(self, text: str = "") -> None:
        self._answer(self, Answer(request=self.request, kind="ack", text=text))

    def progress(self, done: int, total: int, text: str = "", value: Any = None) -> None:
        self._answer(
            self,
            Answer(request=self.request, kind="progress", text=text, done=done, total=total, value=packed(value)),
        )

    def result(self, value: Any = None, text: str = "") -> None:
        self._end(Answer(request=self.request, kind="result", text=text, value=packed(value)))

    def fail(self, text: str, code: str = "failed") -> None:
        self._end(Answer(request=self.request, kind="error", text=text, error=code))

    def _end(self, answer: Answer) -> None:
        if self.ended:
            raise RuntimeError(f"{self.action} has been answered already")
        self.ended = True
        self._answer(self, answer)


class Handler(Protocol):
    """`handler(call, **call.params)`; what it raises (LarpixDaqError or not) becomes the call's error, and is logged.

    A value other than None ends the call as its result; None means that the handler ends it itself, now or later.
    """

    def __call__(self, call: Call, /, **params: Any) -> Any: ...
