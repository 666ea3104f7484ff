"""A schedule into a Batch: flat arrays that a backend, or another rank, can take as they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maestrale.batch import Batch, Draws
from maestrale.engine.request import Sequence
from maestrale.engine.scheduler import Schedule


def assemble(
    schedule: Schedule,
    wanted: list[range],
    n_kinds: int,
    draws: Draws | None = None,
    rows_before: Mapping[Sequence, int] | None = None,
) -> Batch:
    """wanted: for each sequence of the schedule, the positions (of those computed now) whose logits are wanted.
    rows_before: the row that the step before draws a sequence's next token of, where that is under way."""
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    follows: list[tuple[int, int]] = []
    starts = [0]
    for (sequence, count), rows in zip(schedule.work, wanted, strict=True):
        begin, shift = sequence.computed, starts[-1] - sequence.computed
        known = sequence.tokens[begin : begin + count]
        if sequence.unread and len(known) < count and rows_before is not None:
            known.append(0)
            follows.append((starts[-1] + count - 1, rows_before[sequence]))
        token_ids += known + sequence.draft[: count - len(known)]
        positions += range(begin, begin + count)
        logit_rows += range(rows.start + shift, rows.stop + shift)
        starts.append(starts[-1] + count)
    adapters = [sequence.request.adapter for sequence, _ in schedule.work]
    tables = [sequence.table for sequence, _ in schedule.work if sequence.table is not None]
    return Batch(
        token_ids=np.array(token_ids, np.int64),
        positions=np.array(positions, np.int64),
        starts=np.array(starts, np.int64),
        tables=tuple(np.stack(entries) for entries in zip(*(table.entries for table in tables), strict=True)),
        copies=tuple(
            np.array([(a, b) for k, a, b in schedule.copies if k == kind], np.int64).reshape(-1, 2)
            for kind in range(n_kinds)
        ),
        logit_rows=np.array(logit_rows, np.int64),
        experts=any(sequence.request.params.experts for sequence, _ in schedule.work),
        adapters=np.array(adapters, np.int64) if max(adapters) >= 0 else None,
        draws=draws,
        follows=np.array(follows, np.int64) if follows else None,
    )
