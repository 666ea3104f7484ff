"""What travels between the engine and a backend: one step's work, flat and ragged, and its answer.

Also the two laws that both sides must read alike: where a position's key lies (`slots`) and which keys a query
sees (`visible`). They are written with plain operators, so numpy and torch arrays both fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


def visible(query: Any, key: Any, window: int | None) -> Any:
    """The one rule of sight: query position → key position. A window counts the query itself (N9)."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def slots(tables: Any, sequence: Any, positions: Any, page_size: int, ring: int) -> Any:
    """The cache law: the slot of `positions` of `sequence`, through a page table of `ring` entries that wraps.

    tables: [sequences, ring] page numbers; sequence, positions: integer arrays that broadcast together.
    """
    return tables[sequence, positions // page_size % ring] * page_size + positions % page_size


@dataclass(frozen=True)
class CacheLayout:
    """How a runner's cache is cut: one entry for each kind of layer (distinct window), in `ModelConfig.windows` order.

    ring: entries of a page table before it wraps. A windowed kind's ring holds `window + max_chunk - 1` positions,
    so that a chunk may be written before any of its queries looks; an unwindowed kind's holds `max_len`.
    pages: how many pages its pool has.
    """

    page_size: int
    max_len: int
    max_chunk: int
    windows: tuple[int | None, ...]
    rings: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """How a token is to be drawn from each wanted row, by the rules of sampling/policy.py.

    rows: float64 [N, 5]: temperature, the uniform number, top_k, top_p, min_p; NaN where no token is to be drawn.
    biases: float64 [n, 3]: row, token, what is added to that token's logit there.
    """

    rows: NDArray[np.float64]
    biases: NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """One step's work for B sequences that bring T new tokens in all; nothing is padded.

    token_ids, positions: int64 [T], sequence after sequence; a position counts from its sequence's beginning.
    starts: int64 [B + 1], the row at which each sequence begins; starts[B] = T.
    tables: for each kind of layer, int64 [B, ring] page numbers (entries not yet granted are 0 and never read).
    copies: for each kind, int64 [n, 2] pages (from, to) to copy before anything is written (copy on write).
    logit_rows: int64 [N], the rows of T whose logits are wanted.
    experts: whether it is also wanted which experts those rows went through.
    adapters: int64 [B], the number of each sequence's adapter, -1 for none; None where no sequence has one.
    draws: given to a runner that draws tokens itself; None where all rows of logits are wanted.
    follows: int64 [n, 2]: (place, row): the token at `place` of T is the one that the batch before draws of its row
    `row`, and `token_ids` has 0 for it; None where all tokens are known.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    tables: tuple[NDArray[np.int64], ...]
    copies: tuple[NDArray[np.int64], ...]
    logit_rows: NDArray[np.int64]
    experts: bool = False
    adapters: NDArray[np.int64] | None = None
    draws: Draws | None = None
    follows: NDArray[np.int64] | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What says which tokens are computed and where they lie, in the order above, to `logit_rows`."""
        return self.token_ids, self.positions, self.starts, self.tables, self.copies, self.logit_rows


def lots(texts: Sequence[Sequence[int]], max_chunk: int) -> Iterator[list[Sequence[int]]]:
    """Texts that are read once, in their order: as many together as have `max_chunk` tokens; a longer one by itself."""
    lot: list[Sequence[int]] = []
    for text in texts:
        if lot and sum(map(len, lot)) + len(text) > max_chunk:
            yield lot
            lot = []
        lot.append(text)
    if lot:
        yield lot


def read_alone(
    lot: Sequence[Sequence[int]], windows: tuple[int | None, ...], max_chunk: int
) -> tuple[CacheLayout, list[Batch]]:
    """The layout of a cache for one of these lots, whose rings never wrap; its batches, all rows wanted: one, or the
    chunks of a single text."""
    lengths, size, kinds = np.array([len(text) for text in lot]), 16, len(windows)
    pages, starts = -(-lengths // size), np.append(0, lengths.cumsum())
    ring, total = int(pages.max()), int(pages.sum())
    # A text's pages lie one after the other; what stands in its table behind them is never reached.
    table = np.minimum((pages.cumsum() - pages)[:, None] + np.arange(ring), total - 1)
    token_ids = np.concatenate([np.array(text, np.int64) for text in lot])
    positions = np.arange(len(token_ids)) - starts[:-1].repeat(lengths)
    batches = [
        Batch(
            token_ids=token_ids[start:end],
            positions=positions[start:end],
            starts=starts.clip(start, end) - start,
            tables=(table,) * kinds,
            copies=(np.empty((0, 2), np.int64),) * kinds,
            logit_rows=np.arange(end - start),
        )
        for start, end in pairwise([*range(0, len(token_ids), max_chunk), len(token_ids)])
    ]
    return CacheLayout(size, int(lengths.max()), max_chunk, windows, (ring,) * kinds, (total,) * kinds), batches


class Rows(Protocol):
    """Rows of logits, float32 [N, vocab]: an array, or what fetches those that are asked for."""

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class StepOutput:
    """logits: the rows of `Batch.logit_rows` in order; an array, except where the batch had draws.

    experts: int16 [N, layers, K], for each of those rows and each layer the experts that it went through, the one the
    router scored highest first; None where it was not asked for, or the model is no mixture.
    tokens: int64 [N], what the runner has drawn of each row; -1 where it has not, or where nothing can be.
    """

    logits: Rows
    experts: NDArray[np.int16] | None = None
    tokens: NDArray[np.int64] | None = None


class Runner(Protocol):
    """A backend with a model and a cache: it does one step at a time and knows nothing of requests."""

    @property
    def layout(self) -> CacheLayout: ...

    def step(self, batch: Batch) -> StepOutput: ...


@runtime_checkable
class Embedding(Runner, Protocol):
    """A runner that also gives texts as vectors, beside its cache."""

    def embed(self, texts: Sequence[Sequence[int]], last: bool = False) -> Iterator[list[NDArray[np.float32]] | None]:
        """What the output layer would read of each text, float32 [dim], after a None for each chunk: the mean over its
        tokens, or that of its `last` one."""
        ...


@runtime_checkable
class Asynchronous(Runner, Protocol):
    """A runner that may have up to `depth` steps under way; each sees what those before it have written, so pages may
    be used again in a later batch, whatever is under way.

    draws: whether it draws tokens where its logits are, so that these need not travel. Then a batch may go on from
    tokens that nobody has read yet (`Batch.follows`); else steps under way share no sequence but for a prompt's chunks.
    """

    @property
    def depth(self) -> int: ...

    @property
    def draws(self) -> bool: ...

    def begin(self, batch: Batch) -> Callable[[], StepOutput]:
        """Sets a step going; what it gives waits for the output, and is called once, in the order of the batches."""
        ...
