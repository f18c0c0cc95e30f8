"""What was done about recent requests, so that one that comes twice is done once.

Requests and answers may be lost when a connection breaks; whoever waits asks again with the same id.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from larpixdaq.control.messages import Answer

_KEPT: Final = 1024
#: Answers larger than _LARGE are kept up to _ROOM bytes in all: a thousand results with arrays would be gigabytes.
_LARGE: Final = 4096
_ROOM: Final = 8 << 20


class Recent:
    """The last request ids and their final answers; one that is not finished is never forgotten."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Answer | None] = OrderedDict()
        self._large: deque[tuple[str, int]] = deque()
        self._bytes = 0

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

    def answer(self, request: str) -> Answer | None:
        """The final answer given to it, if there is one yet."""
        return self._answers.get(request)

    def keep(self, request: str, answer: Answer) -> None:
        if request not in self._answers:
            return
        self._answers[request] = answer
        size = len(bytes(answer.value))
        if size <= _LARGE:
            return
        self._large.append((request, size))
        self._bytes += size
        while self._bytes > _ROOM:
            oldest, size = self._large.popleft()
            self._bytes -= size
            if oldest in self._answers:  # that it was done is not forgotten
                text = "the result was lost on its way, and it was too large to be kept: ask again"
                self._answers[oldest] = Answer(request=oldest, kind="error", text=text, error="failed")
