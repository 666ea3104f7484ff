"""What a text has said before, it may say again: drafts of what comes next, looked up in the text itself."""

from __future__ import annotations

from collections.abc import Sequence

_GRAMS = (8, 3)  # so many tokens must have been said before; the longer count first, since they mislead less
_READ = 1024  # tokens of a long prompt that are read in a step, about 1 ms: all others wait meanwhile
_FIRST, _LONGEST = 4, 15  # tokens of a draft, at first and at most
_PAUSE, _LONGEST_PAUSE = 4, 64  # steps without a draft after one that was all wrong; doubled each time


class LookUp:
    """One sequence's: where it has said what, and how far its drafts can be trusted."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}  # the last place, so far, after each few tokens
        self._read = 0
        self._reach, self._pause, self._resting = _FIRST, _PAUSE, 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may come after `tokens`."""
        if self._resting:
            self._resting -= 1
            return []
        end = min(len(tokens), self._read + _READ)
        for place in range(self._read, end):
            for gram in _GRAMS:
                if place >= gram:
                    self._followed[tuple(tokens[place - gram : place])] = place
        self._read = end
        if end < len(tokens):
            return []
        places = (self._followed.get(tuple(tokens[-gram:])) for gram in _GRAMS)
        last = next((place for place in places if place is not None), None)
        if last is None:
            return []
        period = len(tokens) - last  # a text that has only begun to repeat itself goes round
        return [tokens[last + i % period] for i in range(min(most, self._reach))]

    def learn(self, drafted: int, accepted: int) -> None:
        """Longer drafts after one that was right, shorter ones after one that was not, none for a while after one of
        which nothing was."""
        if accepted == drafted:
            self._reach = min(2 * self._reach, _LONGEST)
        else:
            self._reach = accepted + 1
        if accepted:
            self._pause = _PAUSE
        else:
            self._resting, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
