"""Logits against transformers and one_file.py, for models of every shape and both layouts."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DENSE, MIXTURE, WINDOWED, hf_logits, hf_model, native_weights, tokens, write_native

from maestrale import LLM, one_file
from maestrale.checkpoint.convert import convert
from maestrale.config import ModelConfig, MoeConfig


@st.composite
def models(draw):
    """A configuration that transformers has a class for: one window for all layers, or, if dense, some layers full."""
    n_layers, n_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    window = draw(st.none() | st.integers(1, 12))
    moe = None
    if draw(st.booleans()):
        experts = draw(st.integers(1, 8))
        moe = MoeConfig(experts, draw(st.integers(1, experts)))
    windows = [window] * n_layers
    if moe is None and window is not None:
        windows = [
            window if sliding else None
            for sliding in draw(st.lists(st.booleans(), min_size=n_layers, max_size=n_layers))
        ]
    return ModelConfig(
        dim=8 * draw(st.integers(1, 6)),
        n_layers=n_layers,
        head_dim=2 * draw(st.integers(1, 10)),
        hidden_dim=draw(st.integers(1, 60)),
        n_heads=n_kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        vocab_size=draw(st.integers(8, 100)),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        rope_theta=draw(st.sampled_from([1e4, 1e6, 50.0])),
        sliding_window=tuple(windows),
        moe=moe,
        tied_embeddings=draw(st.booleans()),
    )


def test_every_model_agrees_with_transformers_and_one_file_in_fp32(backend):
    spread = []

    @settings(max_examples=60)
    @given(models(), st.integers(0, 1 << 20), st.integers(1, 40), st.none() | st.integers(1, 40))
    def check(config, seed, length, chunk_size):
        model, ids = hf_model(config, seed), tokens(length, config.vocab_size, seed)
        expected = hf_logits(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            hf, native, ours = Path(folder, "hf"), Path(folder, "native"), Path(folder, "ours")
            model.save_pretrained(hf)
            convert(hf, native)
            write_native(ours, config, native_weights(model, config))
            second = one_file.logits(one_file.load(ours)[0], ids)
            for path in (hf, native, ours):
                (got,) = LLM(path, max_len=64, backend=backend).logits([ids], chunk_size)
                torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-4, rtol=0)
                torch.testing.assert_close(torch.from_numpy(got), second, atol=1e-5, rtol=0)
        spread.append(float(expected.std()))

    check()
    assert len(spread) >= 40
    assert 0.5 < sum(spread) / len(spread) < 2  # logits of order 1, so that 1e-4 means something


@pytest.mark.parametrize("config", [DENSE, WINDOWED, MIXTURE], ids=["dense", "windowed", "mixture"])
def test_bf16_strays_from_fp32_no_further_than_transformers_does(config, backend, tmp_path):
    ours, theirs = [], []
    for seed in range(12):
        model, ids = hf_model(config, seed).bfloat16(), tokens(40, seed=seed)
        folder = write_native(tmp_path / str(seed), config, native_weights(model, config))
        theirs.append(hf_logits(model, ids) - hf_logits(model.float(), ids))
        half, full = (LLM(folder, dtype, max_len=64, backend=backend).logits([ids])[0] for dtype in ("auto", "float32"))
        ours.append(torch.from_numpy(half - full))
    # Medians: where rounding turns a router's choice round, single errors are of order 1, here as there.
    our_error, their_error = (float(torch.stack(errors).abs().median()) for errors in (ours, theirs))
    assert 0 < our_error < 1.5 * their_error


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_k_layers_carry_exactly_k_times_window_minus_1_positions_back(layers, window, chunk_size, backend, tmp_path):
    config = ModelConfig(16, layers, 8, 24, 2, 1, 64, 1e-5, 1e4, (window,) * layers)
    folder = write_native(tmp_path, config, native_weights(hf_model(config), config))
    llm, ids, changed = LLM(folder, max_len=32, backend=backend), tokens(24), 5
    others = [*ids[:changed], ids[changed] ^ 1, *ids[changed + 1 :]]
    before, after = llm.logits([ids], chunk_size)[0], llm.logits([others], chunk_size)[0]
    differ = (abs(before - after).max(axis=1) > 1e-6).nonzero()[0].tolist()
    assert differ == list(range(changed, changed + layers * (window - 1) + 1))
