"""Whatever runs beside it, however pages and steps are cut: a request gives what it gives alone, without prefix cache
and speculation."""

import math
import random

import numpy as np
import pytest
from backends import AHEAD, BACKENDS, open_engine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODELS

from maestrale.sampling.params import SamplingParams

MAX_LEN, WIDEST = 64, 3


def params(draw: random.Random) -> SamplingParams:
    count = draw.randrange(1, 20)
    kind = draw.choice(["greedy", "drawn", "beams", "scored"])
    if kind == "drawn":
        more = {"n": draw.choice([1, WIDEST]), "repetition_penalty": draw.choice([1, 1.2])}
        temperature, top_p = draw.choice([0.5, 1.0]), draw.choice([0.8, 1.0])
        return SamplingParams(count, temperature, top_p=top_p, seed=draw.randrange(9), **more)
    if kind == "beams":
        return SamplingParams(count, beam_width=WIDEST, n=2)
    return SamplingParams(0 if kind == "scored" else count, 0)


def asked(draw: random.Random, vocab_size: int) -> list[tuple[list[int], SamplingParams, bool]]:
    """Prompts of which many begin alike and some repeat themselves, their parameters, and whether logits are kept."""
    texts = [[draw.randrange(vocab_size) for _ in range(40)] for _ in range(2)]
    found = []
    for _ in range(draw.randrange(2, 9)):
        start = draw.choice(texts)[: draw.randrange(1, 41)]
        prompt = draw.choice([start, [*start, draw.randrange(vocab_size)], (start[:5] * 8)[:40]])
        one = params(draw)
        found.append((prompt, one, one.n == one.beam_width == 1 and draw.random() < 0.5))
    return found


def outcome(request):
    assert request.error is None
    logits = None if request.logits is None else np.stack(request.logits)
    return sorted((c.index, c.token_ids, c.finish_reason) for c in request.completions), logits


@pytest.mark.parametrize("backend", [*BACKENDS, AHEAD], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_a_request_gives_what_it_gives_alone(name, built, backend):
    folder, config = built(name)[1], MODELS[name]

    @settings(max_examples=40)
    @given(st.integers(0, 1 << 30), st.sampled_from([1, 3, 4, 16, 17]), st.sampled_from([3, 7, 16, 40]), st.booleans())
    def check(seed, page_size, max_chunk, tight):
        draw = random.Random(seed)
        layout = {"page_size": page_size, "max_len": MAX_LEN, "max_chunk": max_chunk}
        longest = max(MAX_LEN if w is None else min(MAX_LEN, w + max_chunk - 1) for w in config.windows)
        alone = open_engine(folder, "torch" if backend == AHEAD else backend, **layout)
        alone.prefixes.enabled = alone.speculation.enabled = False
        crowded = open_engine(
            folder, backend, **layout, pages=WIDEST * math.ceil(longest / page_size) + 1 if tight else None
        )
        expected, requests, others = [], [], []
        for prompt, one, keeps in asked(draw, config.vocab_size):
            expected.append(alone.submit(prompt, one, keep_logits=keeps))
            run(alone)
            chunk = draw.choice([None, 1, 5])
            requests.append(crowded.submit(prompt, one, keep_logits=keeps, chunk_size=chunk))
            if draw.random() < 0.3:
                others.append(crowded.submit(prompt[::-1], SamplingParams(20, 0)))
            for _ in range(draw.randrange(4)):
                crowded.step()
            if others and draw.random() < 0.3:
                crowded.abort(others.pop())
        run(crowded)
        for ours, theirs in zip(map(outcome, requests), map(outcome, expected), strict=True):
            assert ours[0] == theirs[0]
            if ours[1] is not None:
                allowed = 0 if backend == "native" else 1e-5 * max(1, np.abs(theirs[1]).max())
                np.testing.assert_allclose(ours[1], theirs[1], atol=allowed, rtol=0)

    check()
