"""Who holds which page of the cache: page tables that wrap, reference counts, copy on write.

A page table has a ring of entries for each kind of layer; the entry of a position is `position // page_size % ring`
(the cache law, `slots` in batch.py). A windowed kind's ring is short, so its pages are written over and over and a
sequence's memory stays constant; an unwindowed kind's ring never wraps. Pages are granted as positions are reached.
A page that several tables share is copied before one of them writes into it; one that was published and is held by
its writer alone is withdrawn instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from maestrale.batch import CacheLayout
from maestrale.engine.pool import Pool
from maestrale.errors import OutOfPages

# (kind, from, to): page `from` is to be copied to page `to` before this step writes.
Copy = tuple[int, int, int]


class PageTable:
    """One sequence's pages, and how far they reach.

    entries: for each kind, int64 [ring]. held: for each kind, a byte for each entry, 1 where a page stands in it.
    end: the position after the last granted one, a whole number of pages.
    own: whether all pages that will be written before `end` are this table's alone.
    published: how many pages, from the beginning, have been offered to others.
    """

    def __init__(self, layout: CacheLayout):
        self.entries = [np.zeros(ring, np.int64) for ring in layout.rings]
        self.held = [bytearray(ring) for ring in layout.rings]
        self.end = 0
        self.own = False
        self.published = 0


class Pages:
    """The pools of all kinds of layers, and what tables may do with them."""

    def __init__(self, layout: CacheLayout):
        self.layout = layout
        self.pools = [Pool(count) for count in layout.pages]

    @property
    def available(self) -> list[int]:
        """Pages of each kind that nobody holds."""
        return [pool.available for pool in self.pools]

    def new_table(self) -> PageTable:
        return PageTable(self.layout)

    def held(self, table: PageTable, kind: int) -> list[int]:
        """The pages of a table, the newest positions' first."""
        ring, newest = self.layout.rings[kind], table.end // self.layout.page_size - 1
        places = (page % ring for page in range(newest, max(newest - ring, -1), -1))
        return [int(table.entries[kind][place]) for place in places if table.held[kind][place]]

    def fork(self, table: PageTable) -> PageTable:
        """A second table on the same pages: a count, not a copy."""
        twin = PageTable(self.layout)
        for kind, pool in enumerate(self.pools):
            twin.entries[kind] = table.entries[kind].copy()
            twin.held[kind] = table.held[kind].copy()
            for page in self.held(table, kind):
                pool.holders[page] += 1
        twin.end, twin.published = table.end, table.published
        table.own = False
        return twin

    def release(self, table: PageTable) -> None:
        """The table lets go of all its pages and is empty again. Of what stays cached, the end goes first."""
        for kind, pool in enumerate(self.pools):
            for page in self.held(table, kind):
                pool.drop(page)
            table.held[kind] = bytearray(self.layout.rings[kind])
        table.end, table.own, table.published = 0, False, 0

    def grant(self, spans: Sequence[tuple[PageTable, int, int]]) -> list[Copy]:
        """Makes positions [start, end) of each table writable by that table alone; all spans or none.

        Returns the copies to be made first. Raises OutOfPages, with nothing changed, where too few pages are free.
        """
        spans = [span for span in spans if span[2] > span[0].end or not span[0].own]
        if not spans:
            return []
        for kind, pool in enumerate(self.pools):
            if (need := self._needed(kind, spans)) > pool.available:
                raise OutOfPages(f"the cache has {pool.available} free pages of layer kind {kind}; {need} are needed")
        copies = [copy for span in spans for kind in range(len(self.pools)) for copy in self._grant(kind, *span)]
        size = self.layout.page_size
        for table, _, end in spans:
            table.end, table.own = max(table.end, -(-end // size) * size), True
        return copies

    def fits(self, spans: Sequence[tuple[PageTable, int, int]], spare: int) -> bool:
        """Whether these positions could be granted now and `spare` pages of each kind were left."""
        return all(self._needed(kind, spans) + spare <= pool.available for kind, pool in enumerate(self.pools))

    def publish(self, table: PageTable, keys: Sequence[bytes]) -> None:
        """keys: one for each page, from the beginning, whose positions are all computed. Those that no later page
        has overwritten can be found by their keys from now on."""
        for kind, (pool, ring) in enumerate(zip(self.pools, self.layout.rings, strict=True)):
            oldest = table.end // self.layout.page_size - ring
            for page in range(max(table.published, oldest), len(keys)):
                pool.publish(int(table.entries[kind][page % ring]), keys[page])
        table.published = len(keys)

    def withdraw(self, table: PageTable) -> None:
        """None of the table's pages can be found any more."""
        for kind, pool in enumerate(self.pools):
            for page in self.held(table, kind):
                pool.withdraw(page)

    def find(self, keys: Sequence[bytes]) -> int:
        """How many whole pages from the beginning, at most, a table can be given: of each kind of layer all are
        there that the next position sees."""
        found, runs = 0, [0] * len(self.pools)
        for count, key in enumerate(keys, 1):
            complete = True
            for kind, pool in enumerate(self.pools):
                runs[kind] = runs[kind] + 1 if key in pool.page_of else 0
                complete = complete and runs[kind] >= count - self._first_seen(kind, count)
            if complete:
                found = count
            elif any(run < count for run, window in zip(runs, self.layout.windows, strict=True) if window is None):
                break
        return found

    def attach(self, table: PageTable, keys: Sequence[bytes]) -> None:
        """Gives an empty table the pages of these keys, as many as `find` said."""
        for kind, (pool, ring) in enumerate(zip(self.pools, self.layout.rings, strict=True)):
            for page in range(self._first_seen(kind, len(keys)), len(keys)):
                pool.hold(pool.page_of[keys[page]])
                table.entries[kind][page % ring] = pool.page_of[keys[page]]
                table.held[kind][page % ring] = 1
        table.end, table.published = len(keys) * self.layout.page_size, len(keys)

    def _first_seen(self, kind: int, count: int) -> int:
        """The first page that the position after `count` whole pages sees; `count` where it sees none of them."""
        window, size = self.layout.windows[kind], self.layout.page_size
        return 0 if window is None else max(0, count * size - window + 1) // size

    def _needed(self, kind: int, spans: Sequence[tuple[PageTable, int, int]]) -> int:
        fresh, writers = 0, Counter[int]()
        for table, start, end in spans:
            for i in self._entries(kind, start, end):
                if table.held[kind][i]:
                    writers[int(table.entries[kind][i])] += 1
                else:
                    fresh += 1
        # Of a page's holders all but the last one to write must copy; if some do not write, every writer must.
        holders = self.pools[kind].holders
        return fresh + sum(min(count, holders[page] - 1) for page, count in writers.items())

    def _grant(self, kind: int, table: PageTable, start: int, end: int) -> Iterator[Copy]:
        entries, held, pool = table.entries[kind], table.held[kind], self.pools[kind]
        for i in self._entries(kind, start, end):
            if not held[i]:
                entries[i], held[i] = pool.take(), 1
                continue
            page = int(entries[i])
            if pool.holders[page] == 1:
                pool.withdraw(page)
                continue
            entries[i] = pool.take()
            pool.drop(page)
            yield kind, page, int(entries[i])

    def _entries(self, kind: int, start: int, end: int) -> list[int]:
        size, ring = self.layout.page_size, self.layout.rings[kind]
        return list(dict.fromkeys(page % ring for page in range(start // size, (end - 1) // size + 1)))
