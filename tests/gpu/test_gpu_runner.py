"""The whole step by these kernels against the torch backend's, which the conformance tests hold to transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXED, MIXTURE, TIED, hf_greedy, hf_model, make_folder, native_weights, tokens

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.batch import Batch, CacheLayout, Draws
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.engine.engine import Engine
from maestrale.engine.layout import make_layout
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.runner import TorchRunner, open_runner
from maestrale.torch_backend.triton import steps
from maestrale.torch_backend.triton.packed import PackedLinear
from maestrale.torch_backend.triton.runner import TritonRunner

MODELS = {"dense": DENSE, "mixed windows": MIXED, "mixture": MIXTURE, "tied": TIED}


def build(config, device):
    model = Transformer(config)
    weights = native_weights(hf_model(config), config)
    if config.tied_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval().to(device)


def layout_of(config, max_chunk=16):
    return make_layout(config, max_len=96, max_chunk=max_chunk, max_sequences=4, element_bytes=4, budget=1 << 22)


def greedy(runner, config, prompts, count):
    engine = Engine(runner, config.vocab_size, None, 4)
    asked = SamplingParams(max_tokens=count, temperature=0)
    requests = [engine.submit(prompt, asked) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [request.completions[0].token_ids for request in requests]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers(name, device):
    config = MODELS[name]
    prompts = [tokens(19), [5]]
    got = greedy(TritonRunner(build(config, device), layout_of(config)), config, prompts, 3)
    reference = hf_model(config)
    assert got == [hf_greedy(reference, prompt, 3) for prompt in prompts]


@pytest.mark.parametrize("logprobs", [None, 1], ids=["steps are begun ahead", "each step waits for a row"])
@pytest.mark.parametrize("name", ["mixed windows", "mixture"])
def test_tokens_drawn_beside_the_kernels_are_those_that_the_engine_would_draw(name, logprobs, device):
    config = MODELS[name]
    asked = [
        SamplingParams(max_tokens=4, temperature=0),
        SamplingParams(max_tokens=3, temperature=1, seed=5, top_p=0.9),
        SamplingParams(max_tokens=3, temperature=0.8, seed=6, logprobs=logprobs),
    ]
    found = []
    for draws in (False, True):
        runner = TritonRunner(build(config, device), layout_of(config))
        runner._plain.draws = draws
        engine = Engine(runner, config.vocab_size, None, 4)
        requests = [engine.submit(tokens(5 + i), params) for i, params in enumerate(asked)]
        while engine.has_work:
            engine.step()
        found.append([request.completions[0].token_ids for request in requests])
    assert found[0] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("kind", [TritonRunner, TorchRunner])
def test_a_step_is_begun_without_waiting_for_the_device(kind, device):
    layout = small_layout(DENSE)
    runner = kind(build(DENSE, device), layout)
    chunk, decode = batch_of(DENSE, layout, [11, 4], [12, 5]), batch_of(DENSE, layout, [12, 5], [1, 1])
    greedy = [[0.0, 0, 0, 1, 0]]
    batches = [
        dataclasses.replace(batch, draws=Draws(np.array(greedy * len(batch.logit_rows)), np.empty((0, 3))))
        for batch in (chunk, decode)
    ]
    for batch in batches:  # compiles and captures
        runner.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers = [runner.begin(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for answer, batch in zip(answers, batches, strict=True):
        assert (answer().tokens >= 0).sum() == len(batch.logit_rows)


def batch_of(config, layout, lasts, counts):
    """Sequences that bring `counts` tokens and end at `lasts`, each on pages of its own."""
    positions = np.concatenate([np.arange(last - n + 1, last + 1) for last, n in zip(lasts, counts, strict=True)])
    ids = np.random.default_rng(len(positions)).integers(3, config.vocab_size, len(positions))
    tables = tuple(np.arange(len(lasts) * ring).reshape(-1, ring) for ring in layout.rings)
    none = tuple(np.empty((0, 2), np.int64) for _ in layout.rings)
    return Batch(ids, positions, np.cumsum([0, *counts]), tables, none, np.arange(len(positions)))


def small_layout(config):
    rings = tuple(6 if window is None else 2 for window in config.windows)
    return CacheLayout(16, 96, 16, config.windows, rings, tuple(4 * ring for ring in rings))


@pytest.mark.parametrize("config", [MIXED, MIXTURE], ids=["mixed windows", "mixture"])
def test_a_decode_in_static_buffers_gives_what_a_step_made_anew_gives(config, device, monkeypatch):
    layout = small_layout(config)
    chunk = batch_of(config, layout, [11, 4, 15], [12, 5, 16])
    decodes = [batch_of(config, layout, [12, 5, 16], [1, 1, 1]), batch_of(config, layout, [13, 6], [1, 1])]
    kept = []
    for padded in (True, False):
        monkeypatch.setattr("maestrale.torch_backend.triton.runner.is_decode", steps.is_decode if padded else no)
        runner = TritonRunner(build(config, device), layout)
        kept.append([runner.step(batch).logits for batch in (chunk, *decodes)])
    plain = TorchRunner(build(config, device), layout)
    kept.append([plain.step(batch).logits for batch in (chunk, *decodes)])
    for static, anew, torchs in zip(*kept, strict=True):
        np.testing.assert_allclose(static, anew, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(static, torchs, atol=1e-4, rtol=1e-4)


def test_an_fp8_cache_is_kept_and_read_as_the_torch_backend_does(device):
    layout = small_layout(MIXED)
    batches = [
        batch_of(MIXED, layout, [11, 4, 15], [12, 5, 16]),
        batch_of(MIXED, layout, [12, 5, 16], [1, 1, 1]),
        batch_of(MIXED, layout, [13, 22], [1, 6]),
    ]
    runners = [kind(build(MIXED, device), layout, fp8_cache=True) for kind in (TritonRunner, TorchRunner)]
    for runner in runners:
        for pool in runner.cache.pools:
            pool.zero_()
    for batch in batches:
        got, expected = (runner.step(batch).logits for runner in runners)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    got, expected = (torch.cat([pool.float().flatten() for pool in runner.cache.pools]) for runner in runners)
    assert expected.any()
    # A sum in another order may fall on the other side of a tie: a step further, an eighth of the number at most.
    assert ((got - expected).abs() <= expected.abs() / 8 + 2**-9).all()
    assert (got != expected).float().mean() < 0.001


def no(batch):
    return False


def test_only_wanted_rows_of_a_decode_come_back(device):
    layout = small_layout(DENSE)
    runner = TritonRunner(build(DENSE, device), layout)
    batch = batch_of(DENSE, layout, [0, 0, 0], [1, 1, 1])
    whole = runner.step(batch).logits
    some = runner.step(dataclasses.replace(batch, logit_rows=np.array([2]))).logits
    np.testing.assert_array_equal(some, whole[[2]])


def test_rows_whose_experts_are_asked_for_are_those_of_the_torch_backend(device):
    layout = small_layout(MIXTURE)
    batch = dataclasses.replace(batch_of(MIXTURE, layout, [7], [8]), experts=True)
    got = TritonRunner(build(MIXTURE, device), layout).step(batch)
    expected = TorchRunner(build(MIXTURE, device), layout).step(batch)
    np.testing.assert_array_equal(got.experts, expected.experts)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-5)


def test_the_models_weights_are_held_once(device):
    model = build(MIXTURE, device)
    count = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    before = sum(parameter.nbytes for parameter in model.parameters())
    TritonRunner(model, small_layout(MIXTURE))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before
    assert len(storages) < len(count)


@pytest.mark.parametrize("base", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_packed_folder_stays_packed_and_says_what_its_unpacked_values_say(
    weights, base, device, tmp_path, monkeypatch
):
    config = dataclasses.replace(base, dim=64, head_dim=16, hidden_dim=96)
    quantize(make_folder(tmp_path / "whole", config), tmp_path / "packed", Recipe(weights), round_to_nearest)
    layout = small_layout(config)
    batch = batch_of(config, layout, [11, 0], [12, 1])
    found = []
    for kernels in ("triton", "torch"):
        monkeypatch.setenv("MAESTRALE_KERNELS", kernels)
        with open_checkpoint(tmp_path / "packed") as checkpoint:
            runner = open_runner(checkpoint, layout, "F32", str(device), lambda done, total: None)
        found.append((runner, runner.step(batch).logits))
    assert isinstance(found[0][0], TritonRunner)
    formats = {layer.format for layer in found[0][0].model.modules() if isinstance(layer, PackedLinear)}
    assert weights in formats
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "tied", "mixture"])
def test_fp8_weights_say_what_the_model_says_with_each_weight_rounded(name, device, tmp_path, monkeypatch):
    config, layout = MODELS[name], small_layout(MODELS[name])
    batch = batch_of(config, layout, [11, 0], [12, 1])
    monkeypatch.setenv("MAESTRALE_KERNELS", "triton")
    with open_checkpoint(make_folder(tmp_path / "model", config)) as checkpoint:
        got = open_runner(checkpoint, layout, "F32", str(device), lambda done, total: None, fp8=True).step(batch).logits
    model = build(config, device)
    embeddings = model.tok_embeddings.weight.clone()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("gate"):
            scales = layer.weight.abs().amax(1, keepdim=True) / 448
            layer.weight = torch.nn.Parameter((layer.weight / scales).to(torch.float8_e4m3fn).float() * scales, False)
    model.tok_embeddings.weight = torch.nn.Parameter(embeddings, False)
    expected = TorchRunner(model, layout).step(batch).logits
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
