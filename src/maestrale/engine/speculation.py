"""Speculation without a draft model: what a text has said before, it may say again.

When the last tokens of a sequence stand earlier in it, those that followed there are put behind it as a draft and
computed in the same step. The step gives a row of logits for each of them, and each row goes through the same
`sample` as ever: while the token drawn is the drafted one the next row is right too; from the first that is not, the
rest is thrown away. So the text is the same, whatever is drafted. (Saxena 2023, "Prompt lookup decoding".)

Throwing away is to leave `computed` behind what was written. In a ring that is safe: a step of n tokens from c on has
written over positions up to c + n - 1 - R * P, where R * P >= window + max_chunk - 1 >= window + n - 1, so at most
c - window, and the next query, at c + 1 or later, sees nothing before c + 2 - window.
"""

from __future__ import annotations

from collections.abc import Iterable

from maestrale.engine.lookup import LookUp
from maestrale.engine.request import Request

_ROWS = 16  # of a step that drafts; a step of so few rows costs little more than one of one row


class Speculation:
    """drafted, accepted: tokens, over all sequences. enabled: where not, nothing is drafted."""

    def __init__(self, max_batch_tokens: int, enabled: bool):
        self._rows, self.enabled = min(_ROWS, max_batch_tokens), enabled
        self.drafted = self.accepted = 0

    def draft(self, running: Iterable[Request]) -> None:
        """Puts drafts behind the sequences that need one token each, where these are few."""
        if not self.enabled:
            return
        sequences = [sequence for request in running for sequence in request.sequences]
        for sequence in sequences:
            request = sequence.request
            room = min(self._rows // len(sequences), request.chunk, request.length_limit - len(sequence.tokens)) - 1
            # Beams need their last rows out of one step; who keeps all rows wants those of known tokens only.
            if (
                room > 0
                and sequence.pending == 1
                and request.forked
                and not (request.beam or request.logits is not None)
            ):
                sequence.lookup = sequence.lookup or LookUp()
                sequence.draft = sequence.lookup.draft(sequence.tokens, room)
            else:
                sequence.draft = []

    def learn(self, lookup: LookUp, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        lookup.learn(drafted, accepted)
