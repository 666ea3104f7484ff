"""Losses step by step against peft and transformers on the same batches, in fp32; the head in blocks; the routers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from tiny import DENSE, MIXTURE, TIED, WINDOWED, hf_model, make_folder, native_weights, tokens, write_native
from torch.nn.functional import cross_entropy, logsigmoid
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from maestrale.checkpoint.adapter import save_adapter
from maestrale.checkpoint.packed import pack_int4
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.text.samples import Labelled, Pair, Sample
from maestrale.torch_backend import lora
from maestrale.torch_backend.load import load_model
from maestrale.torch_backend.train import loss as losses
from maestrale.torch_backend.train.finetune import prepare
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.int4 import Int4Linear
from maestrale.torch_backend.train.objective import Classes, Language, Preferences
from maestrale.torch_backend.train.packing import batch_rows, pack_samples
from maestrale.torch_backend.train.step import keep_less, learn, learning_rate, new_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
STEPS = 20


def settings(**changes) -> FinetuneSettings:
    values = {"model": "x", "train": "x", "out": "x", "steps": STEPS, "seq_len": 32, "batch_size": 4, "micro_batch": 2}
    return FinetuneSettings(**{**values, "bf16": False, "lr": 3e-3, "warmup_steps": 3, "balance": 0.0, **changes})


def sample(length: int, seed: int, line: int = 0) -> Sample:
    """Random ids, of which about a half are learnt, some by half."""
    draw = np.random.default_rng(seed)
    weights = draw.choice([0.0, 0.5, 1.0], length, p=[0.5, 0.1, 0.4]).astype(np.float32)
    weights[-2:], weights[0] = 1, 0
    return Sample(line, np.array(tokens(length, seed=seed), np.int32), weights, whole=True)


def build(config, made, tmp_path, classes=0):
    folder = write_native(tmp_path / "base", config, native_weights(hf_model(config), config))
    with open_checkpoint(folder) as checkpoint:
        return prepare(checkpoint, made, classes).train()


def their_adapter(config, model, tmp_path):
    """Our fresh adapter on their model, free to learn."""
    save_adapter(tmp_path / "adapter", lora.to_adapter(model), config, "peft", "")
    return peft.PeftModel.from_pretrained(hf_model(config), tmp_path / "adapter", is_trainable=True)


def their_steps(model, made, rows_of_step, loss_of) -> list[float]:
    """Plain steps of AdamW; loss_of(model, step's rows) is the mean."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": made.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    found = []
    for step in range(made.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(made, step)
        loss = loss_of(model, rows_of_step(step))
        found.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, made.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return found


def our_steps(model, made, objective) -> list[float]:
    optimizer, found = new_optimizer(model, made), []
    for step in range(made.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(made, step)
        rows = batch_rows(len(objective), made.batch_size, step, made.seed)
        found.append(learn(model, optimizer, objective, rows, made).loss)
    return found


def nll(model, one: Sample) -> torch.Tensor:
    """Σ weight * -log p over one sample alone."""
    logits = model(torch.tensor([one.ids.tolist()])).logits[0, :-1]
    each = cross_entropy(logits, torch.from_numpy(one.ids[1:].astype(np.int64)), reduction="none")
    return (each * torch.from_numpy(one.weights[1:])).sum()


@pytest.mark.parametrize(
    ("method", "config"),
    [("lora", WINDOWED), ("dora", WINDOWED), ("full", WINDOWED), ("lora", MIXTURE), ("full", MIXTURE), ("full", TIED)],
    ids=["lora-windowed", "dora-windowed", "full-windowed", "lora-mixture", "full-mixture", "full-tied"],
)
def test_twenty_steps_on_packed_samples_are_those_of_transformers_on_each_alone(method, config, tmp_path):
    made = settings(method=method, targets=("attention",) if config.moe else ("attention", "ffn", "head"), rank=4)
    samples = [sample(9 + 3 * (i % 8), seed=i) for i in range(24)]
    packed, _ = pack_samples(samples, made.seq_len)
    model = build(config, made, tmp_path)
    theirs = hf_model(config).requires_grad_(True) if method == "full" else their_adapter(config, model, tmp_path)
    ours = our_steps(model, made, Language(packed))
    of_text = {tuple(one.ids.tolist()): one for one in samples}

    def loss_of(theirs, rows):
        total, weight = 0, 0.0
        for row in rows:
            for document in range(packed.documents[row].max() + 1):
                one = of_text[tuple(packed.tokens[row][packed.documents[row] == document].tolist())]
                total, weight = total + nll(theirs, one), weight + float(one.weights[1:].sum())
        return total / weight

    expected = their_steps(theirs, made, lambda step: batch_rows(len(packed), 4, step, made.seed), loss_of)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.05  # it learnt something


def test_twenty_steps_of_dpo_are_those_of_its_formula_in_transformers_with_a_second_model(tmp_path):
    made = settings(method="lora", task="dpo", rank=4, beta=0.3, targets=("attention", "ffn"))
    pairs = []
    for i in range(12):
        both = [sample(10 + (i + j) % 7, seed=2 * i + j) for j in range(2)]
        pairs.append(Pair(i, *(replace(s, weights=(s.weights > 0).astype(np.float32)) for s in both)))
    model = build(DENSE, made, tmp_path)
    theirs, reference = their_adapter(DENSE, model, tmp_path), hf_model(DENSE)
    ours = our_steps(model, made, Preferences(pairs, made.beta))

    def loss_of(theirs, rows):
        total = 0
        for row in rows:
            gains = []
            for one in (pairs[row].chosen, pairs[row].rejected):
                with torch.no_grad():
                    given = -nll(reference, one)
                gains.append(-nll(theirs, one) - given)
            total = total - logsigmoid(made.beta * (gains[0] - gains[1]))
        return total / len(rows)

    expected = their_steps(theirs, made, lambda step: batch_rows(len(pairs), 4, step, made.seed), loss_of)
    assert ours[0] == pytest.approx(np.log(2), abs=1e-6)  # the adapter begins as nothing
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert expected[-1] < 0.5


def test_a_classifiers_scores_and_steps_are_those_of_transformers(tmp_path):
    import transformers

    made = settings(method="full", task="classify")
    texts = [Labelled(i, np.array(tokens(5 + i % 9, seed=i), np.int32), "abc"[i % 3]) for i in range(12)]
    objective = Classes(texts, ["a", "b", "c"])
    model = build(DENSE, made, tmp_path, classes=3)
    base = hf_model(DENSE)
    base.config.num_labels, base.config.pad_token_id = 3, 0
    theirs = transformers.MistralForSequenceClassification(base.config)
    theirs.model.load_state_dict(base.model.state_dict())
    theirs.score.weight.data.copy_(model.score.weight)

    def scores(theirs, row):
        return theirs(torch.tensor([texts[row].ids.tolist()])).logits[0]

    with torch.no_grad():
        ours, _ = objective.scores(model, np.arange(12))
        for row in range(12):
            torch.testing.assert_close(ours[row], scores(theirs, row), atol=1e-5, rtol=0)

    def loss_of(theirs, rows):
        wanted = [torch.tensor("abc".index(texts[row].label)) for row in rows]
        return sum(cross_entropy(scores(theirs, row), label) for row, label in zip(rows, wanted, strict=True)) / len(
            rows
        )

    expected = their_steps(theirs, made, lambda step: batch_rows(12, 4, step, made.seed), loss_of)
    np.testing.assert_allclose(our_steps(model, made, objective), expected, atol=1e-4)


def test_what_is_computed_again_for_the_gradient_changes_no_number(tmp_path):
    packed, _ = pack_samples([sample(20, seed=i) for i in range(6)], 32)
    found = []
    for again in (None, False, True):
        made = settings(method="full", steps=4, balance=0.1, router_z=0.01, checkpointing=bool(again))
        model = build(MIXTURE, made, tmp_path / str(again))
        if again is not None:
            keep_less(model, made)
        found.append(our_steps(model, made, Language(packed)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("rows", "learns"), [(40, True), (90, True), (90, False)], ids=["few", "many", "frozen"])
def test_the_head_in_blocks_gives_the_loss_and_gradients_of_all_rows_at_once(rows, learns, monkeypatch):
    monkeypatch.setattr(losses, "_HEAD_BYTES", 4 * 50 * 7)  # seven rows a block; a head of 16 inputs keeps 32 rows
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(learns)
    labels = torch.randint(0, 50, (rows,), generator=draw)
    labels[::3] = losses.IGNORED
    weights = torch.rand(rows, generator=draw)
    grads = []
    for blocks in (True, False):
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        if blocks:
            each = losses.token_losses(x, head, labels)
            assert (each[::3] == 0).all()
        else:
            each = cross_entropy(head(x), labels, reduction="none", ignore_index=losses.IGNORED)
        (each * weights).sum().backward()
        grads.append((each.detach(), x.grad, head.weight.grad.clone() if learns else torch.zeros(1)))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_router_losses_are_those_of_transformers_pooled_and_their_formulas_per_layer():
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randn(24, 8, generator=draw) * 3 for _ in range(3)]
    real = torch.arange(24) < 17
    pooled, z, loads = losses.router_losses(scores, 2, real, pooled=True)
    mask = real.view(2, 12).long()
    torch.testing.assert_close(pooled, load_balancing_loss_func(tuple(scores), 8, 2, attention_mask=mask))
    each, _, _ = losses.router_losses(scores, 2, real, pooled=False)
    alone = [load_balancing_loss_func((s,), 8, 2, attention_mask=mask) for s in scores]
    torch.testing.assert_close(each, torch.stack(alone).mean())
    expected = torch.stack([torch.log(s[:17].exp().sum(1)) ** 2 for s in scores]).mean()
    torch.testing.assert_close(z, expected)
    assert loads.shape == (3, 8)
    assert loads.sum(1).tolist() == [34] * 3


def test_layers_skewed_in_opposite_ways_are_seen_by_each_layer_and_not_by_the_pool():
    first = torch.tensor([[9.0, 9, 0, 0]]).repeat(10, 1)
    scores, real = [first, first.flip(1)], torch.ones(10, dtype=torch.bool)
    assert losses.router_losses(scores, 2, real, pooled=True)[0].item() == pytest.approx(2.0, abs=0.01)
    assert losses.router_losses(scores, 2, real, pooled=False)[0].item() == pytest.approx(4.0, abs=0.01)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_4_bit_layer_learns_as_the_weight_that_it_stands_for_would(bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 96), generator=draw, dtype=torch.uint8)
    scales = torch.randn(24, 3, generator=draw).half()
    packed = Int4Linear(pack_int4(codes.numpy(), scales.numpy()), dtype)
    assert packed.packed.numel() == 24 * 48
    exact = (codes.double() - 8) * scales.double().repeat_interleave(32, 1)
    torch.testing.assert_close(packed.weight, exact.to(dtype), rtol=0, atol=0)
    x = torch.randn(5, 96, generator=draw).to(dtype).requires_grad_()
    packed(x).square().sum().backward()
    grad = x.grad.clone()
    x.grad = None
    (x @ packed.weight.detach().T).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_qlora_trains_on_the_weights_that_quantize_writes(stored, tmp_path):
    """To the last bit, whether the base is the folder as it was or the one that `quantize` wrote."""
    config = replace(MIXTURE, dim=64, hidden_dim=96, head_dim=16)
    source = make_folder(tmp_path / "source", config, dtype=stored)
    quantize(source, tmp_path / "packed", Recipe("int4", 64), round_to_nearest)
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        expected = load_model(checkpoint, torch.bfloat16, torch.device("cpu"))
    for folder in (source, tmp_path / "packed"):
        with open_checkpoint(folder) as checkpoint:
            model = prepare(checkpoint, settings(method="qlora", group=64, bf16=True), 0)
        bases = {name.removesuffix(".base"): m for name, m in model.named_modules() if isinstance(m, Int4Linear)}
        assert len(bases) == 2 * (4 + 4 * 3)  # of each of two layers, attention and four experts
        assert {layer.group for layer in bases.values()} == {64, 32}  # 96 inputs go into no groups of 64
        for name, layer in bases.items():
            assert torch.equal(layer.weight, expected.get_submodule(name).weight), name
