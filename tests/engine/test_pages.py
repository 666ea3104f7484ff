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
    """Random grants, forks and releases; after each, the books are right and every visible key reads back."""

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
        self.mirrors, self.stamp = [], 0

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

    @rule(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    @precondition(lambda self: self.mirrors)
    def grant(self, counts):
        spans = []
        for mirror, count in zip(self.mirrors, counts, strict=False):
            count = min(count, self.layout.max_chunk, self.layout.max_len - mirror.length)
            if count:
                spans.append((mirror, mirror.length, mirror.length + count))
        needed = self.count_needed(spans)
        before, free = copy.deepcopy((self.pages, [m.table for m in self.mirrors])), [len(f) for f in self.pages.free]
        asked = [(mirror.table, start, end) for mirror, start, end in spans]
        if any(n > f for n, f in zip(needed, free, strict=True)):
            with pytest.raises(OutOfPages):
                self.pages.grant(asked)
            for (old, new), kind in ((pair, k) for pair in [(before[0], self.pages)] for k in range(len(free))):
                assert old.free[kind] == new.free[kind]
                assert (old.holders[kind] == new.holders[kind]).all()
            for old, mirror in zip(before[1], self.mirrors, strict=True):
                assert old.granted == mirror.table.granted
                assert all((a == b).all() for a, b in zip(old.entries, mirror.table.entries, strict=True))
            return
        copies = self.pages.grant(asked)
        assert [len(f) for f in self.pages.free] == [f - n for f, n in zip(free, needed, strict=True)]
        self.copy(copies)
        self.write(spans)

    def count_needed(self, spans):
        """Pages that the spans take, one entry after the other, by copying where anybody else holds the page."""
        needed = []
        for kind, ring in enumerate(self.layout.rings):
            holders = Counter(page for m in self.mirrors for page in m.table.pages(kind).tolist())
            count = 0
            for mirror, start, end in spans:
                held = mirror.table.pages(kind).tolist()
                for entry in {position // self.layout.page_size % ring for position in range(start, end)}:
                    if entry >= len(held):
                        count += 1
                    elif holders[held[entry]] > 1:
                        holders[held[entry]] -= 1
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
                    assert self.pages.holders[kind][slot // self.layout.page_size] == 1, "wrote into a shared page"
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
    def no_page_is_both_free_and_held_and_holders_are_counted(self):
        for kind, count in enumerate(self.layout.pages if hasattr(self, "layout") else ()):
            held = Counter(page for m in self.mirrors for page in m.table.pages(kind).tolist())
            assert sorted([*self.pages.free[kind], *held]) == list(range(count))
            assert {page: n for page, n in enumerate(self.pages.holders[kind].tolist()) if n} == dict(held)

    def teardown(self):
        for mirror in getattr(self, "mirrors", []):
            self.pages.release(mirror.table)
        if hasattr(self, "layout"):
            assert [len(free) for free in self.pages.free] == list(self.layout.pages)


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
    assert len(pages.free[0]) == 8
    copies = pages.grant([(table, 6, 7) for table in [first, *others]])
    assert len(copies) == 3
    assert len({source for _, source, _ in copies}) == 1
    assert len({int(table.entries[0][1]) for table in [first, *others]}) == 4
    assert len({int(table.entries[0][0]) for table in [first, *others]}) == 1


def test_the_error_says_how_many_pages_are_free_and_needed():
    pages = Pages(make_pages_layout(1, 32, 32, [None, 2], pages=5))
    with pytest.raises(OutOfPages, match="5 free pages of layer kind 0; 9 are needed"):
        pages.grant([(pages.new_table(), 0, 9)])
