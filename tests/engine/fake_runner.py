"""A runner without a model: what it says depends on the cache's contents alone, so an error in paging shows as text.

It keeps (token, position) in each slot, in one array for each kind of layer, and checks at each read that the slot
holds the position that the law says. Slots and sight are worked out here once more, in plain Python.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.engine.engine import Engine

VOCAB = 64
NAN_TOKEN = 63  # who sees it, gets NaN


def make_layout(page_size=2, max_len=64, max_chunk=8, windows=(None,), pages=64):
    kept = [max_len if w is None else min(max_len, w + max_chunk - 1) for w in windows]
    rings = tuple(math.ceil(tokens / page_size) for tokens in kept)
    return CacheLayout(page_size, max_len, max_chunk, tuple(windows), rings, (pages,) * len(windows))


def row_for(seen: list[list[int]], position: int) -> np.ndarray:
    """Float32 [VOCAB] from the tokens that a query at `position` sees in each kind of layer, the oldest first."""
    weighted = sum((kind + 1) * (i + 1) * token for kind, tokens in enumerate(seen) for i, token in enumerate(tokens))
    row = -0.2 * ((np.arange(VOCAB) - 3 - weighted - position) % (VOCAB - 4)).astype(np.float32)
    row[[0, 1, 2, NAN_TOKEN]] = -50  # never a control token by itself
    return np.full(VOCAB, np.nan, np.float32) if any(NAN_TOKEN in tokens for tokens in seen) else row


def true_row(tokens: list[int], windows=(None,), rule=row_for) -> np.ndarray:
    """The logits after `tokens`, from the list alone."""
    return rule([tokens if w is None else tokens[-w:] for w in windows], len(tokens) - 1)


def true_greedy(prompt: list[int], count: int, windows=(None,)) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(true_row(tokens, windows).argmax()))
    return tokens[len(prompt) :]


def babble(seen: list[list[int]], position: int) -> np.ndarray:
    """A rule that likes to go round in circles: most often the next token follows from the last two, but a sum over
    all that is seen may turn it elsewhere, so that a wrong token anywhere in sight shows."""
    tokens = [token for kind in seen for token in kind]
    total = sum((i + 1) * token for i, token in enumerate(tokens))
    best = 3 + (tokens[-1] * 3 + (tokens[-2] if len(tokens) > 1 else 0)) % 7 + (total % 11 == 0) * (1 + total % 5)
    row = -0.7 * np.abs(np.arange(VOCAB) - best).astype(np.float32) - (total % 3) * 0.1
    row[[0, 1, NAN_TOKEN]] = -50
    return row


def spell(prompt_length: int, answers: dict[int, list[int]]):
    """A rule that answers each prompt by its first token: answers[first][i] is the i-th new token."""

    def rule(seen, position):
        row = np.full(VOCAB, -20, np.float32)
        row[answers[seen[0][0]][position + 1 - prompt_length]] = 0
        return row

    return rule


@dataclass
class Step:
    """What a batch was. counts: new tokens of each sequence. names: the first token of each, where a kind of layer
    keeps it. rows: logit rows. copies: pages copied, over all kinds."""

    counts: list[int]
    names: list[int]
    rows: int
    copies: int


class FakeRunner:
    def __init__(self, layout: CacheLayout, rule=row_for):
        self._layout, self.rule = layout, rule
        self.slots = [np.full((pages * layout.page_size, 2), -1) for pages in layout.pages]
        self.steps: list[Step] = []

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def step(self, batch: Batch) -> StepOutput:
        layout, size = self._layout, self._layout.page_size
        arrays = (batch.token_ids, batch.positions, batch.starts, *batch.tables, *batch.copies, batch.logit_rows)
        assert all(array.dtype == np.int64 for array in arrays)
        assert 0 < len(batch.token_ids) <= layout.max_chunk, "the budget is exceeded"
        assert len(batch.starts) == len(batch.tables[0]) + 1
        for kind, copies in enumerate(batch.copies):
            pages = self.slots[kind].reshape(-1, size, 2)
            contents = [pages[source].copy() for source, _ in copies]
            for (_, target), content in zip(copies, contents, strict=True):
                pages[target] = content
        owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
        written = [set() for _ in self.slots]
        for row, b in enumerate(owner):
            for kind in range(len(self.slots)):
                slot = self.slot(batch, kind, b, batch.positions[row])
                assert slot not in written[kind], "two tokens of one step in one slot"
                written[kind].add(slot)
                self.slots[kind][slot] = batch.token_ids[row], batch.positions[row]
        rows = [self.row(batch, owner[row], int(batch.positions[row])) for row in batch.logit_rows]
        self.steps.append(
            Step(
                np.diff(batch.starts).tolist(),
                [self.read(batch, 0, b, 0) for b in range(len(batch.starts) - 1)] if layout.windows[0] is None else [],
                len(rows),
                sum(len(copies) for copies in batch.copies),
            )
        )
        return StepOutput(np.array(rows, np.float32).reshape(-1, VOCAB))

    def slot(self, batch, kind, b, position):
        page, offset = divmod(int(position), self._layout.page_size)
        return int(batch.tables[kind][b, page % self._layout.rings[kind]]) * self._layout.page_size + offset

    def read(self, batch, kind, b, position):
        token, held = self.slots[kind][self.slot(batch, kind, b, position)].tolist()
        assert held == position, f"kind {kind}: the slot of position {position} holds that of {held}"
        return token

    def row(self, batch, b, position):
        seen = []
        for kind, window in enumerate(self._layout.windows):
            oldest = 0 if window is None else max(0, position - window + 1)
            seen.append([self.read(batch, kind, b, p) for p in range(oldest, position + 1)])
        return self.rule(seen, position)


def make_engine(tokenizer=None, max_sequences=16, rule=row_for, prefix_cache=True, speculate=True, **layout) -> Engine:
    runner = FakeRunner(make_layout(**layout), rule)
    return Engine(runner, VOCAB, tokenizer, max_sequences, prefix_cache=prefix_cache, speculate=speculate)


def check_books(engine: Engine) -> None:
    """Every page is free, cached or held by exactly the tables that `holders` counts, and found by its own key only."""
    tables = [s.table for r in engine.scheduler.running for s in r.sequences]
    for kind, pool in enumerate(engine.pages.pools):
        held = Counter(page for table in tables for page in engine.pages.held(table, kind))
        count = engine.pages.layout.pages[kind]
        assert sorted([*pool.free, *pool.cached, *held]) == list(range(count))
        assert {page: n for page, n in enumerate(pool.holders) if n} == dict(held)
        assert pool.page_of == {key: page for page, key in enumerate(pool.key_of) if key is not None}
        assert all(pool.key_of[page] is None for page in pool.free)
        assert all(pool.key_of[page] is not None for page in pool.cached)


def run(engine: Engine, limit=10_000) -> list:
    """Steps until nothing is left to do; gives all pieces."""
    pieces = []
    for _ in range(limit):
        if not engine.has_work:
            check_books(engine)
            assert engine.pages.available == list(engine.pages.layout.pages)
            return pieces
        pieces += engine.step()
    raise AssertionError("requests are left that never end")
