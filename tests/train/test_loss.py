"""The loss of packed sequences against the same documents alone, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_training import random_documents, tiny_config, tiny_mixture
from torch.nn.functional import cross_entropy

from maestrale.checkpoint.hf import has_permuted_rows, hf_name, to_hf_rows
from maestrale.config import ModelConfig
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train.loss import balance_loss, packed_attend, packed_loss, packed_positions
from maestrale.torch_backend.train.objective import tensors
from maestrale.torch_backend.train.packing import pack
from maestrale.torch_backend.train.step import new_model
from maestrale.torch_backend.watch import Watch

CONFIGS = {
    "window": tiny_config(),
    "mixture": tiny_mixture(),
    "full and window": tiny_config(sliding_window=(None, 3)),
}


@pytest.fixture(params=CONFIGS, name="model")
def random_model(request) -> Transformer:
    model = new_model(CONFIGS[request.param], seed=1)
    with torch.no_grad():  # weights large enough that attention and routing matter
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model


def loss_of(model: Transformer, documents: list[list[int]], seq_len: int) -> torch.Tensor:
    packed = pack(documents, seq_len)
    return packed_loss(model, *tensors(packed, np.arange(len(packed))))


def test_packed_loss_is_the_sum_of_each_document_alone(model):
    documents = random_documents(150, 3, 60, 9, 30)  # the first is longer than a block of queries
    with torch.no_grad():
        alone = sum(loss_of(model, [document], len(document)) for document in documents)
        packed = loss_of(model, documents, 252)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)


def test_packed_gradient_is_that_of_each_document_alone(model):
    documents = random_documents(20, 3, 9)
    loss_of(model, documents, 32).backward()
    packed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    sum(loss_of(model, [document], len(document)) for document in documents).backward()
    alone = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for a, b in zip(packed, alone, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_no_document_sees_another(model):
    first, second = random_documents(8, 8)
    changed = [[*first[:3], 77, 78, *first[5:]], second]
    with torch.no_grad():
        logits = [logits_of(model, pack(documents, 16)) for documents in ([first, second], changed)]
    assert (logits[0][:8] - logits[1][:8]).abs().max() > 0.1
    torch.testing.assert_close(logits[0][8:], logits[1][8:], rtol=0, atol=1e-5)


def logits_of(model: Transformer, packed) -> torch.Tensor:
    tokens, _, documents, _ = tensors(packed, np.arange(len(packed)))
    attend = packed_attend(documents, model.config.sliding_window)
    return model(tokens.flatten(), packed_positions(documents), attend)


def test_loss_is_that_of_transformers(model):
    documents = random_documents(150, 30, 7)
    theirs = in_transformers(model)
    with torch.no_grad():
        ours = loss_of(model, documents, 187).item()
        expected = 0.0
        for document in documents:
            logits = theirs(torch.tensor([document[:-1]])).logits[0]
            expected += cross_entropy(logits, torch.tensor(document[1:]), reduction="sum").item()
    assert ours == pytest.approx(expected, rel=1e-5)


def in_transformers(model: Transformer) -> torch.nn.Module:
    """Their model with our weights; experts stand in one tensor there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: ModelConfig = model.config
    values = config.to_hf("float32")
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**values), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    weights = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        array = to_hf_rows(array, config.head_dim) if has_permuted_rows(name) else array
        weights[hf_name(name)] = torch.from_numpy(array.copy())
    if config.moe is not None:
        for i in range(config.n_layers):
            old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
            experts = [[weights.pop(f"{old}.experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")] for e in range(4)]
            weights[f"{new}.experts.gate_up_proj"] = torch.stack([torch.cat((w1, w3)) for w1, w3, _ in experts])
            weights[f"{new}.experts.down_proj"] = torch.stack([w2 for _, _, w2 in experts])
            weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # noqa: PT018
    theirs.tie_weights()
    return theirs


def test_balance_loss_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) * 3
    everywhere = torch.ones(24, dtype=torch.bool)
    expected = load_balancing_loss_func((scores,), num_experts=8, top_k=2)
    torch.testing.assert_close(balance_loss(scores, 2, everywhere), expected)
    real = torch.arange(24) < 17  # as two sequences of 12, the second with 7 of padding
    expected = load_balancing_loss_func((scores,), 8, 2, attention_mask=real.view(2, 12).long())
    torch.testing.assert_close(balance_loss(scores, 2, real), expected)


def test_balance_loss_of_even_routing_is_the_number_of_choices():
    scores = 1e-6 * torch.eye(4).repeat(5, 1)
    everywhere = torch.ones(20, dtype=torch.bool)
    assert balance_loss(scores, 1, everywhere).item() == pytest.approx(1, abs=1e-4)


def test_balance_loss_of_one_expert_for_all_is_the_number_of_experts():
    scores = torch.tensor([[50.0, 0, 0, 0]]).repeat(6, 1)
    assert balance_loss(scores, 1, torch.ones(6, dtype=torch.bool)).item() == pytest.approx(4)


def test_router_scores_are_taken_from_outside_and_only_inside_the_block():
    model = new_model(tiny_mixture(), seed=1)
    with Watch(model) as watch:
        loss_of(model, random_documents(12), 16)
    loss_of(model, random_documents(12), 16)
    assert [tuple(s.shape) for s in watch.scores] == [(16, 4), (16, 4)]
