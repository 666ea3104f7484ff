"""A schedule into a Batch: flat arrays that a backend, or another rank, can take as they are."""

from __future__ import annotations

import numpy as np

from maestrale.batch import Batch
from maestrale.engine.scheduler import Schedule


def assemble(schedule: Schedule, wanted: list[range], n_kinds: int) -> Batch:
    """wanted: for each sequence of the schedule, the positions (of those computed now) whose logits are wanted."""
    spans = [(sequence.computed, sequence.computed + count) for sequence, count in schedule.work]
    starts = np.cumsum([0] + [end - begin for begin, end in spans])
    adapters = np.array([sequence.request.adapter for sequence, _ in schedule.work], np.int64)
    tables = [sequence.table for sequence, _ in schedule.work if sequence.table is not None]
    return Batch(
        token_ids=np.concatenate(
            [np.array(s.tokens[begin:end], np.int64) for (s, _), (begin, end) in zip(schedule.work, spans, strict=True)]
        ),
        positions=np.concatenate([np.arange(begin, end) for begin, end in spans]),
        starts=starts,
        tables=tuple(np.stack(entries) for entries in zip(*(table.entries for table in tables), strict=True)),
        copies=tuple(
            np.array([(a, b) for k, a, b in schedule.copies if k == kind], np.int64).reshape(-1, 2)
            for kind in range(n_kinds)
        ),
        logit_rows=np.concatenate(
            [
                np.arange(rows.start, rows.stop) - begin + start
                for rows, (begin, _), start in zip(wanted, spans, starts[:-1], strict=True)
            ]
        ),
        adapters=adapters if (adapters >= 0).any() else None,
    )
