"""The cache's tensors: memory that does not grow, and that no request's numbers reach another's."""

import math
import sys
import time

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXTURE, hf_greedy, hf_model, native_weights, tokens

from maestrale.batch import CacheLayout
from maestrale.config import ModelConfig
from maestrale.engine.engine import Engine
from maestrale.errors import CheckpointError
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import reference, sdpa
from maestrale.torch_backend.runner import TorchRunner


def make_layout(config, page_size, max_len, max_chunk, sequences):
    kept = [max_len if w is None else min(max_len, w + max_chunk - 1) for w in config.windows]
    rings = tuple(math.ceil(tokens / page_size) for tokens in kept)
    pages = tuple(sequences * ring for ring in rings)
    return CacheLayout(page_size, max_len, max_chunk, config.windows, rings, pages)


def make_model(config, seed=0, change=lambda weights: None):
    weights = native_weights(hf_model(config, seed), config)
    change(weights)
    model = Transformer(config)
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_20000_tokens_take_constant_memory():
    config = ModelConfig(32, 1, 16, 64, 2, 1, 64, 1e-5, 1e4, (128,))
    layout = make_layout(config, 16, 20_001, 256, 1)
    assert layout.rings == ((128 + 256 - 1 + 15) // 16,)
    engine = Engine(TorchRunner(make_model(config), layout), config.vocab_size, None, 1)
    request = engine.submit(tokens(10_000), SamplingParams(max_tokens=10_000, temperature=0))
    sizes, start = [], time.thread_time()  # of this thread: others may keep the processor busy
    while engine.has_work:
        engine.step()
        sizes.append(resident())
    assert time.thread_time() - start < 30
    assert len(request.completions[0].token_ids) == 10_000
    # Past the first steps only the list of tokens grows.
    assert max(sizes) - sizes[50] < 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_pool_takes_memory_only_where_it_is_used():
    before, start = resident(), time.perf_counter()
    cache = PagedCache(DENSE, make_layout(DENSE, 16, 1 << 20, 16, 8), torch.float32, torch.device("cpu"), sdpa.attend)
    assert sum(pool.nbytes for pool in cache.pools) == 2 << 30
    assert resident() - before < 64 << 20
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("kernel", [sdpa.attend, reference.attend], ids=["sdpa", "reference"])
def test_a_request_whose_keys_are_nan_spoils_no_other_request(config, kernel):
    def spoil(weights):
        weights["tok_embeddings.weight"][60] = math.nan

    model, layout = make_model(config, change=spoil), make_layout(config, 2, 32, 32, 8)
    engine = Engine(TorchRunner(model, layout, kernel), config.vocab_size, None, 8)
    prompts = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15]]
    asked = SamplingParams(max_tokens=12, temperature=0, logit_bias={60: -100.0})
    # The ill one comes first: its keys fill the first slots of the cache. Two others decode at lengths that differ, so
    # that one of them is padded; and all take over pages that held NaN.
    ill = engine.submit([60, 60, 60, 60], asked)
    requests = [engine.submit(prompt, asked) for prompt in prompts]
    while engine.has_work:
        engine.step()
    assert isinstance(ill.error, CheckpointError)
    healthy = hf_model(config)
    healthy.model.embed_tokens.weight[60] = 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.error is None
        assert request.completions[0].token_ids == hf_greedy(healthy, prompt, 12, banned=(60,))


def test_copies_of_one_step_read_all_sources_before_they_write():
    config = DENSE
    cache = PagedCache(config, make_layout(config, 2, 32, 16, 1), torch.float32, torch.device("cpu"), sdpa.attend)
    pool = cache.pools[0]
    pool.copy_(torch.arange(pool.shape[2]).view(1, 1, -1, 1, 1).expand_as(pool))
    cache.copy_pages(0, np.array([[1, 2], [2, 3], [3, 1]]))
    slots = pool[1, 1, :10, 0, 0].tolist()
    assert slots == [0, 1, 6, 7, 2, 3, 4, 5, 8, 9]
