"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and holds back only what may still become one.

    The text stops where any stop string is first complete, at its beginning; of several complete at the same
    character the longest counts. So the answer does not depend on how the text was cut into pieces.
    Each character costs a constant number of steps for each stop string (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # the longest beginning of each stop that ends the text so far
        self._held = ""
        self._stopped = False

    def push(self, delta: str) -> tuple[str, bool]:
        """More text → (what is safe to show now, whether a stop string has been met). After a stop: ("", True)."""
        if self._stopped:
            return "", True
        if not self._stops:
            return delta, False
        self._held += delta
        for end in range(len(self._held) - len(delta) + 1, len(self._held) + 1):
            length = self._longest_complete(self._held[end - 1])
            if length:
                safe, self._held, self._stopped = self._held[: end - length], "", True
                return safe, True
        cut = len(self._held) - max(self._matched)
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def finish(self) -> str:
        """The text has ended: what was held back. Empty after a stop."""
        held, self._held = self._held, ""
        return held

    def _longest_complete(self, character: str) -> int:
        complete = 0
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            length = self._matched[i]
            while length and stop[length] != character:
                length = borders[length]
            length += stop[length] == character
            self._matched[i] = length
            if length == len(stop):
                complete = max(complete, length)
        return complete


def _borders(stop: str) -> list[int]:
    """Entry i: the longest proper beginning of stop[:i] that also ends it; entry 0 is 0."""
    borders = [0] * (len(stop) + 1)
    for i in range(1, len(stop)):
        length = borders[i]
        while length and stop[length] != stop[i]:
            length = borders[length]
        borders[i + 1] = length + (stop[length] == stop[i])
    return borders
