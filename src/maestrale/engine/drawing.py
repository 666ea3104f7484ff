"""Which rows of a step a runner may draw the tokens of, where it can: what it must know of each.

Not those of which more than a token is wanted (logprobs, beams, several continuations of one row), nor those that need
what only the engine keeps (penalties, constraints): their rows are fetched, and sampled by sampling/policy.py itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from maestrale.batch import Draws
from maestrale.engine.request import Sequence
from maestrale.engine.scheduler import Schedule
from maestrale.sampling.policy import uniforms


def draws_for(schedule: Schedule, wanted: list[range], eos_ids: Iterable[int]) -> Draws:
    """wanted: as `assemble` takes it; of a sequence whose known tokens end in this step, the last row, and one more for
    each drafted token, give its next ones. eos_ids: ids that `min_tokens` holds back."""
    rows = np.full((sum(map(len, wanted)), 5), np.nan)
    biases: list[tuple[int, int, float]] = []
    drawn: list[tuple[int, int, int, int]] = []
    end = 0
    for (sequence, count), positions in zip(schedule.work, wanted, strict=True):
        end += len(positions)
        drafted = count - sequence.pending
        if drafted < 0 or not _may_draw(sequence):
            continue
        request, params = sequence.request, sequence.request.params
        for i, row in enumerate(range(end - 1 - drafted, end)):
            index = sequence.length - len(request.prompt) + i
            rows[row] = params.temperature, 0, params.top_k, params.top_p, params.min_p
            if params.temperature:
                drawn.append((row, request.seed, sequence.index, index))
            biases += ((row, token, bias) for token, bias in (params.logit_bias or {}).items())
            if index < params.min_tokens and not params.ignore_eos:
                biases += ((row, token, -math.inf) for token in eos_ids)
    if drawn:
        at, *keys = zip(*drawn, strict=True)
        rows[list(at), 1] = uniforms(*keys)
    return Draws(rows, np.array(biases, np.float64).reshape(-1, 3))


def _may_draw(sequence: Sequence) -> bool:
    request, params = sequence.request, sequence.request.params
    alone = params.beam_width == 1 and (request.forked or params.n == 1)
    return (
        alone
        and params.max_tokens > 0
        and params.logprobs is None
        and sequence.history is None
        and sequence.matcher is None
    )
