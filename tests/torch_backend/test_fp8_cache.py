"""A cache in fp8: what is kept, what is read of it, and where it is refused."""

import math

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXED, hf_model, native_weights, tokens

from maestrale import LLM, SamplingParams
from maestrale.batch import read_alone
from maestrale.config import ModelConfig
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import reference, sdpa
from maestrale.torch_backend.runner import TorchRunner


def rounded(x: np.ndarray) -> np.ndarray:
    """To e4m3 by its definition: eight steps in each power of two from 2^-6 on, steps of 2^-9 below, ties to even."""
    x = x.astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def test_keys_and_values_are_rounded_to_nearest_and_end_at_448():
    config = ModelConfig(32, 1, 16, 8, 2, 2, 8, 1e-5, 1e4, (None,))
    layout, (batch,) = read_alone([[3] * 40], config.windows, 64)
    cache = PagedCache(config, layout, torch.float32, torch.device("cpu"), reference.attend, fp8=True)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 40, 2, 16, generator=generator) * 10.0 ** torch.arange(-4, 4).repeat(5)[:, None, None]
    k[0, 0, :3] = torch.tensor([1.0625, 1.1875, math.inf])  # two ties, and what no number is beyond
    cache.begin(batch)(0, torch.randn(40, 2, 16), k, v)
    for pool, given in zip(cache.pools[0][:, 0].float().numpy(), (k, v), strict=True):
        given = np.nan_to_num(given.numpy(), posinf=1e9)
        np.testing.assert_array_equal(pool[:40], rounded(given))
    assert cache.pools[0].nbytes == 2 * 48 * 2 * 16


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixed windows"])
@pytest.mark.parametrize("kernel", [sdpa.attend, reference.attend], ids=["sdpa", "reference"])
def test_a_step_reads_what_was_kept(config, kernel):
    model = Transformer(config)
    model.load_state_dict(native_weights(hf_model(config), config))
    model.requires_grad_(False).eval()

    def attend(q, k, v, groups):
        return kernel(q, *(torch.from_numpy(rounded(x.numpy())).to(q.dtype) for x in (k, v)), groups)

    layout, batches = read_alone([tokens(30)], config.windows, 16)
    kept = TorchRunner(model, layout, kernel, fp8_cache=True)
    expected = TorchRunner(model, layout, attend)
    for pools in (kept.cache.pools, expected.cache.pools):
        for pool in pools:
            pool.zero_()
    for batch in batches:
        np.testing.assert_allclose(kept.step(batch).logits, expected.step(batch).logits, atol=1e-5, rtol=1e-5)


def test_pages_are_copied_as_they_are():
    config = ModelConfig(32, 1, 16, 8, 2, 2, 8, 1e-5, 1e4, (None,))
    layout, _ = read_alone([[3] * 64], config.windows, 64)
    cache = PagedCache(config, layout, torch.float32, torch.device("cpu"), reference.attend, fp8=True)
    cache.pools[0].copy_(torch.randn(cache.pools[0].shape))
    before = cache.pools[0].float().unflatten(2, (-1, 16))
    cache.copy_pages(0, np.array([[0, 3], [2, 0]]))
    np.testing.assert_array_equal(cache.pools[0].float().unflatten(2, (-1, 16)), before[:, :, [2, 1, 2, 0]])


def test_a_text_goes_on_from_an_fp8_cache_in_a_quarter_of_the_memory():
    sizes = []
    for cache in ("auto", "fp8"):
        llm = LLM("stories", backend="torch", dtype="float32", cache=cache, max_len=128, max_sequences=2)
        asked = SamplingParams(max_tokens=12, temperature=0)
        assert len(llm.generate(["Once upon a time"], asked)[0].token_ids) == 12
        runner = llm._engine.runner
        sizes.append(sum(pool.nbytes for pool in runner.cache.pools) / sum(runner.layout.pages))
    assert sizes[0] == 4 * sizes[1]


def test_fp8_is_taken_to_the_torch_backend():
    assert isinstance(LLM("stories", cache="fp8", max_len=64)._engine.runner, TorchRunner)
