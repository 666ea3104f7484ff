"""The pages of one kind of layer: free, held by page tables, or cached.

A page whose positions are all computed may be published under a key that stands for its whole past. While it is held
others may find it and hold it too; when nobody holds it any more it is cached, which counts as free: the page that
lay there longest is taken when no page without a key is left.
"""

from __future__ import annotations

from collections import OrderedDict


class Pool:
    """holders: how many tables hold each page. page_of: published pages by their keys. cached: least recent first."""

    def __init__(self, count: int):
        self.free = list(range(count))[::-1]  # the last freed is taken first: it is warm
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.holders = [0] * count
        self.key_of: list[bytes | None] = [None] * count
        self.page_of: dict[bytes, int] = {}
        self.evictions = 0

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached)

    @property
    def held(self) -> int:
        return len(self.holders) - self.available

    def take(self) -> int:
        """A page for one holder, its contents of no meaning. There must be one available."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.cached.popitem(last=False)
            self.withdraw(page)
            self.evictions += 1
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or published."""
        if not self.holders[page]:
            del self.cached[page]
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder less."""
        self.holders[page] -= 1
        if self.holders[page]:
            return
        if self.key_of[page] is None:
            self.free.append(page)
        else:
            self.cached[page] = None

    def publish(self, page: int, key: bytes) -> None:
        """From now on the page is found by its key, unless another one is found by it already."""
        if key not in self.page_of:
            self.page_of[key], self.key_of[page] = page, key

    def withdraw(self, page: int) -> None:
        """Somebody is about to write into the page: nobody may find it any more."""
        key = self.key_of[page]
        if key is not None:
            del self.page_of[key]
            self.key_of[page] = None
