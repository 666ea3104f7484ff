"""Who holds which page of the cache: reference counts, page tables that wrap, copy on write.

A page table has a ring of entries for each kind of layer; the entry of a position is `position // page_size % ring`
(the cache law, `slots` in batch.py). A windowed kind's ring is short, so its pages are written over and over and a
sequence's memory stays constant; an unwindowed kind's ring never wraps. Pages are granted as positions are reached.
A page that several tables share is copied before one of them writes into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import CacheLayout
from maestrale.errors import OutOfPages

# (kind, from, to): page `from` is to be copied to page `to` before this step writes.
Copy = tuple[int, int, int]


class PageTable:
    """One sequence's pages. entries: for each kind, int64 [ring]; the first `granted[kind]` of them are in use."""

    def __init__(self, layout: CacheLayout):
        self.entries = [np.zeros(ring, np.int64) for ring in layout.rings]
        self.granted = [0] * len(layout.rings)

    def pages(self, kind: int) -> NDArray[np.int64]:
        return self.entries[kind][: self.granted[kind]]


class Pages:
    """The pools: which pages are free, and how many tables hold each of the others."""

    def __init__(self, layout: CacheLayout):
        self.layout = layout
        self.free = [list(range(count))[::-1] for count in layout.pages]  # the last freed is taken first: it is warm
        self.holders = [np.zeros(count, np.int64) for count in layout.pages]

    def new_table(self) -> PageTable:
        return PageTable(self.layout)

    def fork(self, table: PageTable) -> PageTable:
        """A second table on the same pages: a count, not a copy."""
        twin = PageTable(self.layout)
        for kind, entries in enumerate(table.entries):
            twin.entries[kind] = entries.copy()
            self.holders[kind][table.pages(kind)] += 1
        twin.granted = list(table.granted)
        return twin

    def release(self, table: PageTable) -> None:
        """The table lets go of all its pages and is empty again."""
        for kind in range(len(table.entries)):
            held = table.pages(kind)
            self.holders[kind][held] -= 1
            self.free[kind].extend(page for page in held.tolist() if not self.holders[kind][page])
            table.granted[kind] = 0

    def grant(self, spans: Sequence[tuple[PageTable, int, int]]) -> list[Copy]:
        """Makes positions [start, end) of each table writable by that table alone; all spans or none.

        Returns the copies to be made first. Raises OutOfPages, with nothing changed, where too few pages are free.
        """
        for kind, free in enumerate(self.free):
            if (need := self._needed(kind, spans)) > len(free):
                raise OutOfPages(f"the cache has {len(free)} free pages of layer kind {kind}; {need} are needed")
        return [copy for span in spans for kind in range(len(self.free)) for copy in self._grant(kind, *span)]

    def _needed(self, kind: int, spans: Sequence[tuple[PageTable, int, int]]) -> int:
        fresh, writers = 0, Counter[int]()
        for table, start, end in spans:
            for i in self._entries(kind, start, end):
                if i >= table.granted[kind]:
                    fresh += 1
                else:
                    writers[int(table.entries[kind][i])] += 1
        # Of a page's holders all but the last one to write must copy; if some do not write, every writer must.
        return fresh + sum(min(count, int(self.holders[kind][page]) - 1) for page, count in writers.items())

    def _grant(self, kind: int, table: PageTable, start: int, end: int) -> Iterator[Copy]:
        entries, holders = table.entries[kind], self.holders[kind]
        for i in self._entries(kind, start, end):
            if i < table.granted[kind]:
                shared = int(entries[i])
                if holders[shared] == 1:
                    continue
                holders[shared] -= 1
                entries[i] = self.free[kind].pop()
                yield kind, shared, int(entries[i])
            else:
                table.granted[kind] += 1  # positions come in order, so the next entry is always the first unused
                entries[i] = self.free[kind].pop()
            holders[entries[i]] = 1

    def _entries(self, kind: int, start: int, end: int) -> list[int]:
        size, ring = self.layout.page_size, self.layout.rings[kind]
        return list(dict.fromkeys(page % ring for page in range(start // size, (end - 1) // size + 1)))
