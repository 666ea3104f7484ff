"""The native model's own duties: experts, stages of a pipeline, page copies, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXTURE, hf_model, make_folder, native_weights, tokens, write_native

from maestrale import LLM
from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.config import ModelConfig, MoeConfig
from maestrale.errors import CheckpointError, ConfigError, MemoryLimitError
from maestrale.native_backend import kernels
from maestrale.native_backend.load import load_model, make_model, rope_speeds
from maestrale.native_backend.runner import NativeRunner


def layout(config, page_size=16, max_len=64, sequences=2):
    rings = tuple(-(-max_len // page_size) for _ in config.windows)
    return CacheLayout(page_size, max_len, max_len, config.windows, rings, tuple(sequences * ring for ring in rings))


def opened(folder, **options):
    with open_checkpoint(folder) as checkpoint:
        made = layout(checkpoint.config)
        model, _ = load_model(checkpoint, made, "f32", cache="f32", threads=2, **options)
        return model, made


def arguments(ids, made, position=0):
    """A step of one sequence whose pages are 0, 1, 2 …"""
    tables = [np.arange(ring)[None] for ring in made.rings]
    copies = [np.zeros((0, 2), np.int64) for _ in made.rings]
    positions = np.arange(position, position + len(ids))
    return {
        "tokens": np.array(ids, np.int64), "positions": positions, "starts": np.array([0, len(ids)]),
        "tables": tables, "copies": copies, "logit_rows": np.arange(len(ids)),
    }  # fmt: skip


def router(config, weights, ids):
    """The chosen experts of layer 0 [T, K] and their shares, in double precision: attention is left out, so wo is 0."""
    x = weights["tok_embeddings.weight"].double()[ids]
    normed = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights["layers.0.ffn_norm.weight"]
    scores = normed @ weights["layers.0.feed_forward.gate.weight"].double().T
    top = scores.topk(config.moe.num_experts_per_tok)
    return normed, top.indices, torch.softmax(top.values, -1)


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (4, 2), (8, 3), (13, 13), (40, 1)])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_mixture_is_its_formula_and_reports_the_experts_it_chose(experts, chosen, count, tmp_path):
    config = replace(MIXTURE, n_layers=1, sliding_window=(None,), moe=MoeConfig(experts, chosen))
    weights = native_weights(hf_model(config), config)
    weights["layers.0.attention.wo.weight"].zero_()
    model, made = opened(write_native(tmp_path, config, weights))
    ids = tokens(count)
    logits, picked = np.empty((count, 64), np.float32), np.full((1, count, chosen), -1, np.int16)
    model.step(**arguments(ids, made), logits=logits, chosen=picked)

    normed, indices, shares = router(config, weights, ids)
    assert np.array_equal(picked[0], indices.numpy())
    x = weights["tok_embeddings.weight"].double()[ids]
    for t in range(count):
        for e, share in zip(indices[t].tolist(), shares[t], strict=True):
            w1, w2, w3 = (weights[f"layers.0.feed_forward.experts.{e}.w{i}.weight"].double() for i in (1, 2, 3))
            x[t] += share * (w2 @ (torch.nn.functional.silu(w1 @ normed[t]) * (w3 @ normed[t])))
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights["norm.weight"]
    expected = (x @ weights["output.weight"].double().T).numpy()
    assert np.abs(logits - expected).max() < 2e-6 * max(1, np.abs(expected).max()) * 4


def test_of_equal_scores_the_lower_experts_are_chosen(tmp_path):
    config = replace(MIXTURE, n_layers=1, sliding_window=(None,), moe=MoeConfig(6, 3))
    weights = native_weights(hf_model(config), config)
    weights["layers.0.feed_forward.gate.weight"][1:] = weights["layers.0.feed_forward.gate.weight"][1].clone()
    weights["layers.0.feed_forward.gate.weight"][0] = 0
    model, made = opened(write_native(tmp_path, config, weights))
    picked = np.full((1, 20, 3), -1, np.int16)
    model.step(**arguments(tokens(20), made), logits=np.empty((20, 64), np.float32), chosen=picked)
    assert {tuple(row) for row in picked[0].tolist()} == {(1, 2, 3), (0, 1, 2)}


def test_rows_that_are_not_wanted_change_nothing_and_none_need_be_wanted(tmp_path):
    model, made = opened(make_folder(tmp_path, DENSE))
    asked = arguments(tokens(30), made)
    every = np.empty((30, 64), np.float32)
    model.step(**asked, logits=every)
    for rows in ([29], [0, 7, 8, 29], []):
        some = np.empty((len(rows), 64), np.float32)
        model.step(**(asked | {"logit_rows": np.array(rows, np.int64)}), logits=some)
        assert np.array_equal(some, every[rows])


def test_layers_in_two_stages_are_the_model_in_one_to_the_last_bit(tmp_path):
    folder, ids = make_folder(tmp_path, MIXTURE), tokens(25)
    whole, made = opened(folder)
    first, _ = opened(folder, layers=range(1))
    second, _ = opened(folder, layers=range(1, 2))
    asked = arguments(ids, made)
    expected, logits, hidden = (
        np.empty((25, 64), np.float32),
        np.empty((25, 64), np.float32),
        np.empty((25, 32), np.float32),
    )
    whole.step(**asked, logits=expected)
    first.step(**asked, hidden_out=hidden)
    second.step(**asked, hidden_in=hidden, logits=logits)
    assert np.array_equal(logits, expected)


def test_copies_of_one_step_read_all_sources_before_they_write(tmp_path):
    model, made = opened(make_folder(tmp_path, DENSE))
    ids = tokens(48)

    def step(ids, position, tables, copies=()):
        logits = np.empty((1, 64), np.float32)
        asked = arguments(ids, made, position) | {
            "tables": [np.array([tables])], "copies": [np.array(copies, np.int64).reshape(-1, 2)],
            "logit_rows": np.array([len(ids) - 1]),
        }  # fmt: skip
        model.step(**asked, logits=logits)
        return logits

    expected = step(ids, 0, [0, 1, 2, 7])
    step(ids[:47], 0, [0, 1, 2, 7])
    # 0 → 1, 1 → 2, 2 → 0: a circle that no order of single copies gets right.
    assert np.array_equal(step(ids[47:], 47, [1, 2, 0, 7], [(0, 1), (1, 2), (2, 0)]), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.array([1, 64])}, "a token's id"),
        ({"tokens": np.array([1, -1])}, "a token's id"),
        ({"positions": np.array([-1, 0])}, "a position"),
        ({"positions": np.array([0])}, "positions has the wrong size"),
        ({"starts": np.array([0, 1])}, "do not cover"),
        ({"starts": np.array([0, 2, 2])}, "tables"),
        ({"starts": np.array([0, 400_000_000, 2]), "tables": [np.zeros((2, 4), np.int64)]}, "behind the step's rows"),
        ({"tables": [np.full((1, 4), 8)]}, "a page's number"),
        ({"tables": [np.full((1, 3), 0)]}, "page tables has the wrong size"),
        ({"copies": [np.array([[0, 8]])]}, "in a copy"),
        ({"logit_rows": np.array([0, 0])}, "wanted rows"),
        ({"logit_rows": np.array([0, 2])}, "wanted rows"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_before_anything_is_read(change, words, tmp_path):
    model, made = opened(make_folder(tmp_path, DENSE))
    with pytest.raises(ValueError, match=words):
        model.step(**(arguments([3, 4], made) | change), logits=np.empty((2, 64), np.float32))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    folder = make_folder(tmp_path, DENSE)
    with open_checkpoint(folder) as checkpoint:
        model = make_model(checkpoint.config, layout(DENSE), cache="f32", threads=1)
        from maestrale.checkpoint.packed import pack_float

        wk = kernels.weight(pack_float(checkpoint.tensor("layers.0.attention.wk.weight"), "f32"))
    with pytest.raises(ValueError, match="16 by 32: expected 64 by 32"):
        model.set_head(np.ones(32, np.float32), wk)


def test_rope_turns_the_first_pair_by_a_radian_and_the_last_by_almost_theta_less():
    speeds = rope_speeds(replace(DENSE, head_dim=64, rope_theta=1e6))
    expected = np.float64(1e6) ** (-np.arange(0, 64, 2) / 64)
    assert np.abs(speeds / expected - 1).max() < 1e-7 * 8


def test_a_head_of_more_entries_than_the_kernels_hold_is_refused():
    config = ModelConfig(16, 1, 2048, 24, 2, 1, 64, 1e-5, 1e4, (None,))
    with pytest.raises(ConfigError, match="head_dim = 2048: the native backend takes at most 1024"):
        make_model(config, layout(config), cache="bf16", threads=1)


def test_a_cache_that_memory_cannot_hold_is_told_in_one_line(tmp_path):
    with open_checkpoint(make_folder(tmp_path, DENSE)) as checkpoint:
        from maestrale.native_backend.runner import open_runner

        endless = CacheLayout(16, 64, 64, (None,), (4,), (1 << 45,))
        with pytest.raises(MemoryLimitError, match="out of memory"):
            open_runner(checkpoint, endless, "f32", "f32", 1)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_read_as_they_are_stored(stored, tmp_path):
    folder = make_folder(tmp_path, DENSE, dtype=stored)
    (ours,) = LLM(folder, dtype="float32", backend="native", max_len=32).logits([tokens(20)])
    (theirs,) = LLM(folder, dtype="float32", backend="torch", max_len=32).logits([tokens(20)])
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_file_that_changed_while_it_was_read_is_told(tmp_path):
    folder = make_folder(tmp_path, DENSE)
    with open_checkpoint(folder) as checkpoint:

        def grow(done, total):
            with open(folder / "consolidated.safetensors", "ab") as file:
                file.write(b" ")

        with pytest.raises(CheckpointError, match="changed"):
            load_model(checkpoint, layout(DENSE), "f32", cache="f32", threads=1, progress=grow)


def test_a_runner_gives_the_wanted_rows_and_the_experts_that_they_went_through(tmp_path):
    made = layout(MIXTURE)
    with open_checkpoint(make_folder(tmp_path, MIXTURE)) as checkpoint:
        model, body = load_model(checkpoint, made, "f32", cache="f32", threads=2)
    asked = arguments(tokens(20), made)
    every, picked = np.empty((20, 64), np.float32), np.empty((2, 20, 2), np.int16)
    model.step(**asked, logits=every, chosen=picked)
    names = {"tokens": "token_ids"}
    batch = Batch(**{names.get(name, name): value for name, value in asked.items()} | {"logit_rows": np.array([3, 19])})
    plain = NativeRunner(model, made, body).step(batch)
    watched = NativeRunner(model, made, body).step(replace(batch, experts=True))
    assert np.array_equal(plain.logits, every[[3, 19]])
    assert np.array_equal(watched.logits, every[[3, 19]])
    assert plain.experts is None
    assert np.array_equal(watched.experts, picked[:, [3, 19]].swapaxes(0, 1))
