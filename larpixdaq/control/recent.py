"""What was done about recent requests, so that one that comes twice is done once.

Requests and answers may be lost when a connection breaks; whoever waits asks again with the same id.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

T = TypeVar("T")
_KEPT: Final = 1024


class Recent(Generic[T]):
    """The last request ids and their final answers; one that is not finished is never forgotten."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, T | None] = OrderedDict()

    def seen(self, request: str) -> bool:
        """Whether this id came before; from now on it has."""
        if request in self._answers:
            return True
        self._answers[request] = None
        if len(self._answers) > _KEPT:
            finished = next((key for key, answer in self._answers.items() if answer is not None), None)
            if finished is not None:
                del self._answers[finished]
        return False

    def knows(self, request: str) -> bool:
        return request in self._answers

    def answer(self, request: str) -> T | None:
        """The final answer given to it, if there is one yet."""
        return self._answers.get(request)

    def keep(self, request: str, answer: T) -> None:
        if request in self._answers:
            self._answers[request] = answer
