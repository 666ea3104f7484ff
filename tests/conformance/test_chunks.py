"""One answer, however the work is cut: chunks, batches, rings that wrap, pages that run out."""

import numpy as np
import pytest
import torch
from backends import open_engine, run
from tiny import MODELS, hf_greedy, letters, tokens

from maestrale import LLM, one_file
from maestrale.engine.lookup import LookUp
from maestrale.sampling.params import SamplingParams

LENGTHS = [1, 37, 5, 64, 16]


@pytest.fixture(scope="session")
def expected(built):
    """name → one_file's logits of the prompts, in one piece each."""
    made = {}

    def logits(name):
        if name not in made:
            model, _ = one_file.load(built(name)[1])
            made[name] = [one_file.logits(model, ids).numpy() for ids in prompts()]
        return made[name]

    return logits


def prompts():
    return [tokens(length, seed=length) for length in LENGTHS]


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)  # logits reach 5


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_for_every_chunk_size_in_a_batch_of_mixed_lengths(name, built, expected, backend):
    llm = LLM(built(name)[1], max_len=64, max_batch_tokens=200, backend=backend)
    for chunk_size in [*range(1, 65), None]:
        check(llm.logits(prompts(), chunk_size), expected(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 2, 7, 12, 63])
def test_logits_are_the_same_for_every_budget_and_over_several_wraps_of_the_ring(
    name, built, expected, backend, budget
):
    for page_size in (1, 3, 16):
        engine = open_engine(built(name)[1], backend, page_size=page_size, max_chunk=budget, max_len=64)
        requests = [engine.submit(ids, SamplingParams(max_tokens=0), keep_logits=True) for ids in prompts()]
        run(engine)
        check([np.stack(request.logits) for request in requests], expected(name))
        for window, ring in zip(engine.pages.layout.windows, engine.pages.layout.rings, strict=True):
            assert window is None or budget > 12 or max(LENGTHS) > 2 * ring * page_size  # it did wrap


GREEDY = {"max_tokens": 24, "temperature": 0.0}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_same_alone_batched_and_preempted(name, built, backend):
    model, folder = built(name)
    asked = [tokens(length, seed=length) for length in (1, 9, 20, 33, 5)]
    expected = [hf_greedy(model, ids, GREEDY["max_tokens"]) for ids in asked]
    layout = {"page_size": 1, "max_len": 64, "max_chunk": 16}
    alone, roomy, tight = (open_engine(folder, backend, **layout, pages=pages) for pages in (None, None, 70))
    for engine, batches in ((alone, [[ids] for ids in asked]), (roomy, [asked]), (tight, [asked])):
        found = []
        for batch in batches:
            requests = [engine.submit(ids, SamplingParams(**GREEDY)) for ids in batch]
            run(engine)
            found += [request.completions[0].token_ids for request in requests]
        assert found == expected
    assert alone.scheduler.preemptions == roomy.scheduler.preemptions == 0
    assert tight.scheduler.preemptions > 0


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_same_after_a_cache_hit(name, built, backend):
    model, folder = built(name)
    engine = open_engine(folder, backend, page_size=4, max_len=96, max_chunk=16)
    first = tokens(30, seed=30)
    texts = [first, first, [*first[:21], *tokens(9, seed=9)], [*first, *hf_greedy(model, first, 3), 7, 8]]
    saved = []
    for ids in texts:
        before = engine.prefixes.found
        request = engine.submit(ids, SamplingParams(max_tokens=4, temperature=0))
        run(engine)
        assert request.completions[0].token_ids == hf_greedy(model, ids, 4)
        saved.append(engine.prefixes.found - before)
    assert saved == [0, 28, 20, 32]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_same_whatever_is_drafted(name, built, backend, monkeypatch):
    model, folder = built(name)
    ids = tokens(20, seed=4)
    true = [*ids, *hf_greedy(model, ids, 60)]

    def draft(lookup, known, most):  # right for up to six tokens, then wrong in two cases of three
        guess = true[len(known) : len(known) + min(most, 7)]
        return [*guess[:-1], guess[-1] ^ min(len(known) % 3, 1)]

    monkeypatch.setattr(LookUp, "draft", draft)
    for page_size, max_chunk in ((4, 16), (1, 8), (3, 20)):
        engine = open_engine(folder, backend, page_size=page_size, max_len=128, max_chunk=max_chunk)
        request = engine.submit(ids, SamplingParams(max_tokens=60, temperature=0))
        run(engine)
        assert request.completions[0].token_ids == true[20:]
        assert 40 < engine.speculation.accepted < engine.speculation.drafted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=3),
        SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=4),
        SamplingParams(max_tokens=20, beam_width=3, n=3),
    ],
    ids=["n", "penalties", "beams"],
)
def test_forks_draws_and_beams_are_the_same_alone_and_preempted(name, params, built, backend):
    asked = [tokens(length, seed=length) for length in (1, 9, 15, 4, 12, 7, 2, 10)]
    longest = 15 + 20 if name != "windowed" else 5 + 12 - 1  # positions that a sequence keeps, at a page each

    def texts(batches, **layout):
        engine, found = (
            open_engine(built(name)[1], backend, letters(), page_size=1, max_len=40, max_sequences=32, **layout),
            [],
        )
        for batch in batches:
            requests = [engine.submit(ids, params) for ids in batch]
            run(engine)
            found += [sorted((c.index, c.token_ids) for c in request.completions) for request in requests]
        return found, engine.scheduler.preemptions

    alone, none = texts([[ids] for ids in asked], max_chunk=32)
    tight, some = texts([asked], max_chunk=12, pages=params.n * longest)
    assert (none, some > 0) == (0, True)
    assert tight == alone


@pytest.mark.parametrize("name", MODELS)
def test_beams_in_a_batch_are_those_of_transformers(name, built, backend):
    model, folder = built(name)
    asked = [tokens(length, seed=length) for length in (3, 7, 12, 5)]
    engine = open_engine(folder, backend, letters(), max_chunk=16, page_size=2)
    requests = [engine.submit(ids, SamplingParams(max_tokens=8, beam_width=4, n=4)) for ids in asked]
    run(engine)
    for ids, request in zip(asked, requests, strict=True):
        answer = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=8,
            do_sample=False,
            early_stopping=False,
            use_cache=False,
            eos_token_id=2,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        theirs = [row[len(ids) :].tolist() for row in answer.sequences]
        theirs = [row[: row.index(2)] if 2 in row else row for row in theirs]
        assert [c.token_ids for c in request.completions] == theirs
        np.testing.assert_allclose([c.score for c in request.completions], answer.sequences_scores, atol=1e-4)
