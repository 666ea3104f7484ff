"""Tokens to text, one at a time: the only decoder there is, so that streamed and whole text cannot differ."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from maestrale.errors import RequestError
from maestrale.text.vocabulary import Pieces

# Python's "surrogateescape" marks each undecodable byte by one of these; readers of text expect U+FFFD.
_ESCAPES = {0xDC80 + i: 0xFFFD for i in range(128)}


class StreamDecoder:
    """Gives the text that each token adds, and keeps a character back until all its bytes are there.

    The strings of `push` and of `finish` add up to the decoding of all ids. A push costs O(1).
    """

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._at_beginning = True

    def copy(self) -> StreamDecoder:
        """One that goes on from here by itself."""
        twin = StreamDecoder(self._pieces)
        twin._utf8.setstate(self._utf8.getstate())
        twin._at_beginning = self._at_beginning
        return twin

    @property
    def drops_space(self) -> bool:
        """Whether a space that the next token begins with would not be shown."""
        return self._at_beginning and bool(self._pieces.opening)

    def follow(self, ids: Sequence[int]) -> None:
        """Leaves it as if all of `ids` had been pushed, which only some at both ends are: those of a text's beginning,
        and those of the last bytes. What is kept back is at most three bytes, from a character's first on, and a first
        byte ends whatever stood unfinished before it: so no earlier byte matters."""
        start, stop, held = 0, len(ids), 0
        while start < stop and self._at_beginning:
            self.push(ids[start])
            start += 1
        while start < stop and held < 3:
            stop -= 1
            piece = self._piece(ids[stop])
            held += len(piece) if piece is not None else 3 * self._pieces.control_breaks
        for token_id in ids[stop:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The new text, perhaps "". RequestError for an id outside the vocabulary."""
        piece = self._piece(token_id)
        if piece is None:
            return self.finish() if self._pieces.control_breaks else ""
        if self._at_beginning:
            opening = self._pieces.opening.get(token_id)
            if opening is None:
                self._at_beginning = not piece
            else:
                piece = opening
                self._at_beginning = self._pieces.opening_repeats and not piece
        return self._decode(piece)

    def finish(self) -> str:
        """What was kept back: bytes that never became a character, as U+FFFD."""
        return self._decode(b"", final=True)

    def _piece(self, token_id: int) -> bytes | None:
        shown = self._pieces.shown
        if not 0 <= token_id < len(shown):
            raise RequestError(
                f"token id {token_id} is outside the vocabulary: expected 0 to {len(shown) - 1}", param="tokens"
            )
        return shown[token_id]

    def _decode(self, piece: bytes, final: bool = False) -> str:
        text = self._utf8.decode(piece, final)
        return text if text.isascii() else text.translate(_ESCAPES)
