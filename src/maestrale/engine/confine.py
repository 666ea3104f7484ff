"""Who is at fault when a step fails: those that took part are computed alone, and who fails alone fails."""

from __future__ import annotations

from collections.abc import Iterable

from maestrale.engine.request import Request, Sequence
from maestrale.errors import MaestraleError, MemoryLimitError


class Suspects:
    """The requests of a step that failed, in order, each with how far that step would have brought its sequences."""

    def __init__(self) -> None:
        self._marks: dict[Request, list[tuple[Sequence, int]]] = {}

    def accuse(self, ends: Iterable[tuple[Sequence, int]]) -> None:
        """ends: each sequence of the step, with how many of its tokens would have been computed after it."""
        for sequence, end in ends:
            self._marks.setdefault(sequence.request, []).append((sequence, end))

    def next(self) -> Request | None:
        """The one to be computed alone; None once each has ended or has come past the place where the step failed."""
        while self._marks:
            request, marks = next(iter(self._marks.items()))
            if any(s in request.sequences and s.computed < mark for s, mark in marks):
                return request
            del self._marks[request]
        return None


def as_ours(error: Exception) -> MaestraleError:
    """An error that a request can bear: one line, the original behind it."""
    if isinstance(error, MaestraleError):
        return error
    words = " ".join(str(error).split())[:200]
    kind = MemoryLimitError if isinstance(error, MemoryError) else MaestraleError
    ours = kind(f"computing the request failed: {type(error).__name__}{words and ': '}{words}")
    ours.__cause__ = error
    return ours
