"""The books of the cache against a plain model of it: lists of what was written, and an array of slots for contents."""

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maestrale.batch import CacheLayout, slots, visible
from maestrale.engine.pages import Pages
from maestrale.errors import OutOfPages


def make_pages_layout(page_size, max_len, max_chunk, windows, pages):
    """A layout by the rule of docs/numerics.md; `pages` in each pool."""
    kept = [max_len if w is None else min(max_len, w + max_chunk - 1) for w in windows]
    rings = tuple(-(-tokens // page_size) for tokens in kept)
    return CacheLayout(page_size, max_len, max_chunk, tuple(windows), rings, (pages,) * len(windows))


class Mirror:
    """A table as the model knows it: what was written at each position, and the pages it saw granted."""

    def __init__(self, table, written):
        self.table, self.written = table, written

    @property
    def length(self):
        return len(self.written)


class PagesMachine(RuleBasedStateMachine):
    """Random grants, forks, publications, finds and releases; after each, the books are right and every visible key
    reads back. The key of a page is all that was written up to its end."""

    @initialize(
        page_size=st.integers(1, 4),
        max_len=st.integers(4, 30),
        max_chunk=st.integers(1, 7),
        windows=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3, unique=True),
        pages=st.integers(3, 14),
    )
    def begin(self, page_size, max_len, max_chunk, windows, pages):
        self.layout = make_pages_layout(page_size, max_len, max_chunk, windows, pages)
        self.pages = Pages(self.layout)
        self.slots = [np.full(pages * page_size, -1) for _ in windows]
        self.mirrors, self.stamp, self.pasts = [], 0, []

    @rule()
    @precondition(lambda self: len(self.mirrors) < 5)
    def new_table(self):
        self.mirrors.append(Mirror(self.pages.new_table(), []))

    @rule(which=st.integers(0, 4))
    @precondition(lambda self: 0 < len(self.mirrors) < 5)
    def fork(self, which):
        parent = self.mirrors[which % len(self.mirrors)]
        self.mirrors.append(Mirror(self.pages.fork(parent.table), list(parent.written)))

    @rule(which=st.integers(0, 4))
    @precondition(lambda self: self.mirrors)
    def release(self, which):
        self.pages.release(self.mirrors.pop(which % len(self.mirrors)).table)

    def keys(self, written):
        size = self.layout.page_size
        return [repr(written[:end]).encode() for end in range(size, len(written) + 1, size)]

    @rule(which=st.integers(0, 4))
    @precondition(lambda self: self.mirrors)
    def publish(self, which):
        mirror = self.mirrors[which % len(self.mirrors)]
        self.pages.publish(mirror.table, self.keys(mirror.written))
        self.pasts = [*self.pasts, list(mirror.written)][-4:]

    @rule(which=st.integers(0, 3))
    @precondition(lambda self: self.pasts and len(self.mirrors) < 5)
    def find(self, which):
        past = self.pasts[which % len(self.pasts)]
        keys = self.keys(past)
        count = self.pages.find(keys)
        known = [set(pool.page_of) for pool in self.pages.pools]
        assert count == max(n for n in range(len(keys) + 1) if self.there(keys, n, known))
        table = self.pages.new_table()
        self.pages.attach(table, keys[:count])
        self.mirrors.append(Mirror(table, past[: count * self.layout.page_size]))

    def there(self, keys, count, known):
        """Whether each kind knows every page that the position after `count` pages sees a key of."""
        query = count * self.layout.page_size
        for window, kind in zip(self.layout.windows, known, strict=True):
            if any(visible(query, p, window) and keys[p // self.layout.page_size] not in kind for p in range(query)):
                return False
        return True

    @rule(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    @precondition(lambda self: self.mirrors)
    def grant(self, counts):
        spans = []
        for mirror, count in zip(self.mirrors, counts, strict=False):
            count = min(count, self.layout.max_chunk, self.layout.max_len - mirror.length)
            if count:
                spans.append((mirror, mirror.length, mirror.length + count))
        needed = self.count_needed(spans)
        before, free = copy.deepcopy((self.pages, [m.table for m in self.mirrors])), self.pages.available
        asked = [(mirror.table, start, end) for mirror, start, end in spans]
        if any(n > f for n, f in zip(needed, free, strict=True)):
            with pytest.raises(OutOfPages):
                self.pages.grant(asked)
            for old, new in zip(before[0].pools, self.pages.pools, strict=True):
                assert vars(old) == vars(new)
            for old, mirror in zip(before[1], self.mirrors, strict=True):
                assert (old.held, old.end, old.own) == (mirror.table.held, mirror.table.end, mirror.table.own)
                assert all((a == b).all() for a, b in zip(old.entries, mirror.table.entries, strict=True))
            return
        copies = self.pages.grant(asked)
        assert self.pages.available == [f - n for f, n in zip(free, needed, strict=True)]
        self.copy(copies)
        self.write(spans)

    def count_needed(self, spans):
        """Pages that the spans take, one entry after the other, by copying where anybody else holds the page."""
        needed = []
        for kind, ring in enumerate(self.layout.rings):
            holders = Counter(page for m in self.mirrors for page in self.pages.held(m.table, kind))
            count = 0
            for mirror, start, end in spans:
                table = mirror.table
                for entry in {position // self.layout.page_size % ring for position in range(start, end)}:
                    page = int(table.entries[kind][entry])
                    if not table.held[kind][entry]:
                        count += 1
                    elif holders[page] > 1:
                        holders[page] -= 1
                        count += 1
            needed.append(count)
        return needed

    def copy(self, copies):
        size = self.layout.page_size
        read = [(k, target, self.slots[k][source * size : (source + 1) * size].copy()) for k, source, target in copies]
        for kind, target, content in read:
            self.slots[kind][target * size : (target + 1) * size] = content

    def slot(self, mirror, kind, position):
        page, offset = divmod(position, self.layout.page_size)
        return mirror.table.entries[kind][page % self.layout.rings[kind]] * self.layout.page_size + offset

    def write(self, spans):
        for mirror, start, end in spans:
            for position in range(start, end):
                self.stamp += 1
                mirror.written.append(self.stamp)
                for kind in range(len(self.slots)):
                    slot = self.slot(mirror, kind, position)
                    pool, page = self.pages.pools[kind], int(slot) // self.layout.page_size
                    assert pool.holders[page] == 1, "wrote into a shared page"
                    assert pool.key_of[page] is None, "wrote into a page that others may find"
                    self.slots[kind][slot] = self.stamp
        for mirror, start, end in spans:  # all written: now every query of the chunk looks
            self.check_visible(mirror, start, end)

    def check_visible(self, mirror, start, end):
        for kind, window in enumerate(self.layout.windows):
            oldest = 0 if window is None else max(0, start - window + 1)
            for position in range(oldest, end):
                assert self.slots[kind][self.slot(mirror, kind, position)] == mirror.written[position]

    @invariant()
    def every_key_inside_the_window_is_kept(self):
        for mirror in getattr(self, "mirrors", []):
            self.check_visible(mirror, mirror.length, mirror.length)

    @invariant()
    def a_page_is_either_free_or_cached_or_held_and_found_by_its_own_key_only(self):
        for kind, count in enumerate(self.layout.pages if hasattr(self, "layout") else ()):
            held = Counter(page for m in self.mirrors for page in self.pages.held(m.table, kind))
            pool = self.pages.pools[kind]
            assert sorted([*pool.free, *pool.cached, *held]) == list(range(count))
            assert {page: n for page, n in enumerate(pool.holders) if n} == dict(held)
            assert pool.page_of == {key: page for page, key in enumerate(pool.key_of) if key is not None}
            assert not any(pool.key_of[page] for page in pool.free)
            assert all(pool.key_of[page] for page in pool.cached)

    def teardown(self):
        for mirror in getattr(self, "mirrors", []):
            self.pages.release(mirror.table)
        if hasattr(self, "layout"):
            assert self.pages.available == list(self.layout.pages)


TestPagesAgainstAModel = PagesMachine.TestCase
TestPagesAgainstAModel.settings = settings(max_examples=80, stateful_step_count=40)


def test_the_worked_case_of_the_ring():
    # W = 3, sequences of 5, 7 and 2 new tokens at positions 0, 1 and 3: docs of the reference family.
    positions = [np.arange(0, 5), np.arange(1, 8), np.arange(3, 5)]
    expected = [[2, 0, 1], [5, 3, 4], [6, 7]]
    one_page_each, one_page_a_slot = np.array([[0], [1], [2]]), np.arange(9).reshape(3, 3)
    for b in range(3):
        kept = positions[b][-3:]
        assert slots(one_page_each, np.full(len(kept), b), kept, page_size=3, ring=1).tolist() == expected[b]
        assert slots(one_page_a_slot, np.full(len(kept), b), kept, page_size=1, ring=3).tolist() == expected[b]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_a_query_sees_window_keys_itself_included_and_none_later(window):
    seen = visible(np.arange(20)[:, None], np.arange(20)[None, :], window)
    for query in range(20):
        count = query + 1 if window is None else min(query + 1, window)
        assert np.flatnonzero(seen[query]).tolist() == list(range(query - count + 1, query + 1))


def test_forks_cost_no_page_and_each_writer_but_the_last_copies_one():
    pages = Pages(make_pages_layout(4, 32, 8, [None], pages=10))
    first = pages.new_table()
    pages.grant([(first, 0, 6)])
    others = [pages.fork(first) for _ in range(3)]
    assert pages.available[0] == 8
    copies = pages.grant([(table, 6, 7) for table in [first, *others]])
    assert len(copies) == 3
    assert len({source for _, source, _ in copies}) == 1
    assert len({int(table.entries[0][1]) for table in [first, *others]}) == 4
    assert len({int(table.entries[0][0]) for table in [first, *others]}) == 1


def test_the_error_says_how_many_pages_are_free_and_needed():
    pages = Pages(make_pages_layout(1, 32, 32, [None, 2], pages=5))
    with pytest.raises(OutOfPages, match="5 free pages of layer kind 0; 9 are needed"):
        pages.grant([(pages.new_table(), 0, 9)])


def key(i):
    return bytes([i])


def test_of_what_is_cached_the_least_recently_used_goes_first_and_the_end_of_a_text_before_its_beginning():
    pages = Pages(make_pages_layout(1, 8, 8, [None], pages=6))
    for first in (0, 10):
        table = pages.new_table()
        pages.grant([(table, 0, 3)])
        pages.publish(table, [key(first + i) for i in range(3)])
        pages.release(table)
    assert pages.available == [6]
    found = pages.new_table()
    assert pages.find([key(i) for i in range(3)]) == 3
    pages.attach(found, [key(i) for i in range(3)])  # used again: now the other text is the older one
    pages.release(found)
    lost = []
    for count in range(1, 7):
        pages.grant([(pages.new_table(), 0, 1)])
        kept = {i for i in (0, 1, 2, 10, 11, 12) if key(i) in pages.pools[0].page_of}
        assert len(kept) == 6 - count
        lost += sorted({0, 1, 2, 10, 11, 12} - kept - set(lost))
    assert lost == [12, 11, 10, 2, 1, 0]
    assert pages.pools[0].evictions == 6


def test_a_window_needs_its_own_pages_only_and_no_window_needs_all():
    # Pages of 2, a window of 4: position 8 sees 5 to 8, so of four pages the last two are needed.
    layout = make_pages_layout(2, 16, 8, [4], pages=20)
    pages, table = Pages(layout), Pages(layout).new_table()
    pages.grant([(table, 0, 8)])
    keys = [key(i) for i in range(4)]
    pages.publish(table, keys)
    pages.pools[0].withdraw(int(table.entries[0][0]))
    assert [pages.find(keys[:n]) for n in range(5)] == [0, 0, 0, 3, 4]
    pages.pools[0].withdraw(int(table.entries[0][2]))
    assert [pages.find(keys[:n]) for n in range(5)] == [0, 0, 0, 0, 0]
    full = Pages(make_pages_layout(2, 16, 8, [None], pages=20))
    whole = full.new_table()
    full.grant([(whole, 0, 8)])
    full.publish(whole, keys)
    full.pools[0].withdraw(int(whole.entries[0][2]))
    assert full.find(keys) == 2


def test_pages_that_a_ring_has_written_over_are_not_found():
    pages = Pages(make_pages_layout(1, 20, 2, [3], pages=20))  # a ring of 4
    table = pages.new_table()
    for start in range(8):
        pages.grant([(table, start, start + 1)])
        pages.publish(table, [key(i) for i in range(start + 1)])
    assert sorted(pages.pools[0].page_of) == [key(i) for i in range(4, 8)]
    assert [pages.find([key(i) for i in range(n)]) for n in (5, 6, 7, 8)] == [0, 6, 7, 8]
