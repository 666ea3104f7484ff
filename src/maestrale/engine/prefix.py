"""Prefix caching: a sequence begins on the pages of those that began as it does.

A page's key is a hash of all tokens up to its end, page after page, from a root that names who may share
(`Request.namespace`). Equal keys mean equal contents, so BLAKE2b with 256 bits: nobody finds two texts of one key.
"""

from __future__ import annotations

from array import array

from maestrale.engine.pages import Pages, PageTable
from maestrale.engine.request import Request, Sequence

_KEY_BYTES = 32


class PrefixCache:
    """asked, found: tokens that admitted sequences had, and how many of them they did not have to compute.

    enabled: where not, nothing is ever published, so nothing is found.
    """

    def __init__(self, pages: Pages, enabled: bool):
        self.pages, self.enabled = pages, enabled
        self.asked = self.found = 0

    def look_up(self, request: Request) -> int:
        """Moves the request's sequences on over what others have computed; how many tokens are saved.

        Every position is left to compute whose row of logits is wanted, so at least the last.
        """
        size = self.pages.layout.page_size
        behind = [s for s in request.sequences if s.pending > size] if self.enabled else ()
        return sum(self._attach(s, s.table) for s in behind if s.table is not None)

    def _attach(self, sequence: Sequence, table: PageTable) -> int:
        keys = self._keys(sequence, sequence.first_wanted)
        count = self.pages.find(keys)
        gain = count * self.pages.layout.page_size - sequence.computed
        if gain <= 0:
            return 0
        self.pages.release(table)
        self.pages.attach(table, keys[:count])
        sequence.computed += gain
        return gain

    def publish(self, sequence: Sequence, computed: int) -> None:
        """Lets others find the first `computed` tokens of a sequence."""
        table = sequence.table
        if self.enabled and table is not None and computed >= (table.published + 1) * self.pages.layout.page_size:
            self.pages.publish(table, self._keys(sequence, computed))

    def _keys(self, sequence: Sequence, length: int) -> list[bytes]:
        """The keys of the whole pages of a sequence's first `length` tokens; it remembers them."""
        from hashlib import blake2b  # no first token waits for it

        size, keys = self.pages.layout.page_size, sequence.keys
        for start in range(len(keys) * size, length - size + 1, size):
            past = keys[-1] if keys else blake2b(sequence.request.namespace.encode("utf-8", "surrogatepass")).digest()
            tokens = array("q", sequence.tokens[start : start + size]).tobytes()
            keys.append(blake2b(past + tokens, digest_size=_KEY_BYTES).digest())
        return keys[: length // size]
