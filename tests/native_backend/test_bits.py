"""The same bits every time: a sequence's logits alone, in any batch, at any chunk size, on any number of threads."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_folder, tokens

from maestrale.batch import CacheLayout
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.config import ModelConfig, MoeConfig
from maestrale.engine.engine import Engine
from maestrale.engine.lookup import LookUp
from maestrale.native_backend.load import load_model
from maestrale.native_backend.runner import NativeRunner
from maestrale.sampling.params import SamplingParams

SHAPE = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 70}
COMMON = {"norm_eps": 1e-5, "rope_theta": 1e4}
MODELS = {
    "dense": ModelConfig(**SHAPE, **COMMON, sliding_window=(None, None)),
    "a window a layer": ModelConfig(**SHAPE, **COMMON, sliding_window=(None, 20), tied_embeddings=True),
    "mixture": ModelConfig(**SHAPE, **COMMON, sliding_window=(30, 30), moe=MoeConfig(5, 2)),
}
MAX_LEN = 150


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make_folder(tmp_path_factory.mktemp("model"), config) for name, config in MODELS.items()}


def engine(
    folder: Path,
    isa: str,
    form: str,
    threads: int,
    max_chunk: int = 64,
    pages: int | None = None,
) -> Engine:
    """form: of the weights, or of weights and cache: "int4, int8"."""
    weights, _, cache = form.partition(", ")
    with open_checkpoint(folder) as checkpoint:
        windows = checkpoint.config.windows
        kept = [MAX_LEN if w is None else min(MAX_LEN, w + max_chunk - 1) for w in windows]
        rings = tuple(-(-tokens // 16) for tokens in kept)
        layout = CacheLayout(16, MAX_LEN, max_chunk, windows, rings, tuple(pages or 8 * ring for ring in rings))
        model, body = load_model(
            checkpoint,
            layout,
            weights,
            cache=cache or ("f32" if weights == "f32" else "bf16"),
            threads=threads,
            isa=isa,
        )
        return Engine(NativeRunner(model, layout, body), checkpoint.config.vocab_size, None, 8)


def logits(engine: Engine, prompts, chunks) -> list[np.ndarray]:
    score = SamplingParams(max_tokens=0)
    requests = [engine.submit(p, score, chunk_size=c, keep_logits=True) for p, c in zip(prompts, chunks, strict=True)]
    while engine.has_work:
        engine.step()
    return [np.stack(request.logits) for request in requests]


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4", "int4, int8"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_to_the_last_bit(name, weights, isa, folders):
    lengths = st.lists(st.integers(1, 100), min_size=1, max_size=6)

    @settings(max_examples=2 if isa == "generic" else 6)  # plain C++ is slow
    @given(lengths, st.integers(0, 1 << 20), st.integers(1, 5), st.integers(1, 64), st.data())
    def check(lengths, seed, threads, budget, data):
        prompts = [tokens(length, 70, seed + i) for i, length in enumerate(lengths)]
        alone = engine(folders[name], isa, weights, 1)
        expected = [logits(alone, [prompt], [None])[0] for prompt in prompts]
        together = engine(folders[name], isa, weights, threads, budget)
        chunks = [data.draw(st.none() | st.integers(1, 70)) for _ in prompts]
        for ours, theirs in zip(logits(together, prompts, chunks), expected, strict=True):
            assert np.array_equal(ours, theirs)

    check()


@pytest.mark.parametrize("weights", ["bf16", "int4", "bf16, int8"])
@pytest.mark.parametrize("name", MODELS)
def test_preemption_changes_no_bit(name, weights, folders):
    prompts = [tokens(length, 70, length) for length in (17, 20, 18, 30)]
    params = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True, logprobs=1)

    def found(pages):
        one = engine(folders[name], "", weights, 2, 32, pages)
        requests = [one.submit(prompt, params) for prompt in prompts]
        while one.has_work:
            one.step()
        return one.scheduler.preemptions, [(r.completions[0].token_ids, r.completions[0].logprobs) for r in requests]

    (none, roomy), (some, tight) = found(None), found(10)
    assert none == 0 < some
    assert tight == roomy


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "int8, int8"])
@pytest.mark.parametrize("name", MODELS)
def test_neither_a_cache_hit_nor_a_draft_changes_a_bit(name, weights, folders, monkeypatch):
    first = tokens(40, 70, 3)
    prompts = [first, first, [*first[:35], *tokens(20, 70, 4)]]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1)

    def found(one, prompt):
        request = one.submit(prompt, params)
        while one.has_work:
            one.step()
        return request.completions[0].token_ids, request.completions[0].logprobs

    plain = engine(folders[name], "", weights, 1)
    plain.prefixes.enabled = plain.speculation.enabled = False
    expected = [found(plain, prompt) for prompt in prompts]

    def draft(lookup, known, most):  # of the next seven tokens all, or all but the last, are right
        whole = next([*p, *text] for p, (text, _) in zip(prompts, expected, strict=True) if known[: len(p)] == p)
        guess = whole[len(known) : len(known) + min(most, 7)]
        return [*guess[:-1], (guess[-1] + len(known) % 3) % 70]

    monkeypatch.setattr(LookUp, "draft", draft)
    one = engine(folders[name], "", weights, 2, 48)
    assert [found(one, prompt) for prompt in prompts] == expected
    assert one.prefixes.found >= 32 + 32
    assert 20 < one.speculation.accepted < one.speculation.drafted
