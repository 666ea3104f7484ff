"""LoRA and DoRA adapters: peft's run here, ours run in peft, several at once, merged, and bad ones refused."""

import json
import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DENSE, MIXED, MIXTURE, TIED, hf_logits, hf_model, native_weights, tokens, write_native

from maestrale import LLM, SamplingParams
from maestrale.checkpoint.adapter import linear_layers, open_adapter, save_adapter
from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.errors import CheckpointError, RequestError, UsageError
from maestrale.torch_backend import lora
from maestrale.torch_backend.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"]
IDS = tokens(23)


def with_peft(config, seed=1, **changes):
    """A transformers model with a random peft adapter on it; every part of the adapter counts."""
    values = {"r": 3, "lora_alpha": 5, "target_modules": DENSE_LINEAR, "task_type": "CAUSAL_LM"} | changes
    model = peft.get_peft_model(hf_model(config), peft.LoraConfig(**values)).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=draw))
            elif "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
    return model


def base_folder(path, config):
    return write_native(path, config, native_weights(hf_model(config), config))


def their_logits(model, ids=IDS):
    with torch.no_grad():
        return hf_logits(model, ids).numpy()


CASES = {
    "plain": (DENSE, {}),
    "windows": (MIXED, {"target_modules": ATTENTION}),
    "dora": (DENSE, {"use_dora": True}),
    "rslora": (DENSE, {"use_rslora": True}),
    "patterns": (DENSE, {"rank_pattern": {"q_proj": 2, "layers.1.*.k_proj": 4}, "alpha_pattern": {"o_proj": 9}}),
    "tied": (TIED, {"target_modules": ATTENTION}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here_unmerged_and_merged(case, tmp_path):
    config, changes = CASES[case]
    theirs = with_peft(config, **changes)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    folder = base_folder(tmp_path / "base", config)
    expected = their_logits(theirs)
    plain = their_logits(hf_model(config))
    assert abs(expected - plain).max() > 0.1  # the adapter counts
    llm = LLM(folder, max_len=64, adapters={"a": tmp_path / "adapter"})
    np.testing.assert_allclose(llm.logits([IDS], adapter="a")[0], expected, atol=2e-5)
    np.testing.assert_allclose(llm.logits([IDS])[0], plain, atol=2e-5)
    for layout in ("native", "hf"):
        if layout == "hf" and case == "windows":
            continue  # config.json says it in other words
        convert(folder, tmp_path / layout, layout, adapter=tmp_path / "adapter")
        merged = LLM(tmp_path / layout, max_len=64).logits([IDS])[0]
        np.testing.assert_allclose(merged, expected, atol=5e-5)


def test_adapters_of_peft_for_experts_give_the_logits_of_experts_summed_by_hand(tmp_path):
    """Old names, one adapter an expert: W + scale * B A is put into transformers' weights by hand."""
    draw, theirs, stored = torch.Generator().manual_seed(3), hf_model(MIXTURE), {}
    folder = base_folder(tmp_path / "base", MIXTURE)
    with torch.no_grad():
        for i, layer in enumerate(theirs.model.layers):
            for e in range(4):
                gate_up, down = layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e]
                w1, w3 = gate_up.chunk(2)
                for name, weight in (("w1", w1), ("w3", w3), ("w2", down)):
                    a = torch.randn(2, weight.shape[1], generator=draw) * 0.3
                    b = torch.randn(weight.shape[0], 2, generator=draw) * 0.3
                    module = f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{e}.{name}"
                    stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                    weight += 2.0 * b @ a
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    save_file(stored, tmp_path / "adapter/adapter_model.safetensors")
    llm = LLM(folder, max_len=64, adapters={"a": tmp_path / "adapter"})
    np.testing.assert_allclose(llm.logits([IDS], adapter="a")[0], their_logits(theirs), atol=2e-5)


def trained(folder, config, targets, dora=False):
    """A model with an adapter that stands as if it had been trained."""
    with open_checkpoint(folder) as checkpoint:
        model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    lora.add_lora(model, lora.target_layers(config, targets), 3, 1.5, dora, seed=0)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_made_here_gives_the_same_logits_in_peft(dora, tmp_path):
    folder = base_folder(tmp_path / "base", DENSE)
    adapter = lora.to_adapter(trained(folder, DENSE, ["attention", "ffn"], dora))
    save_adapter(tmp_path / "adapter", adapter, DENSE, "peft", "")
    theirs = peft.PeftModel.from_pretrained(hf_model(DENSE), tmp_path / "adapter")
    (ours,) = LLM(folder, max_len=64, adapters={"a": tmp_path / "adapter"}).logits([IDS], adapter="a")
    expected = their_logits(theirs)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert abs(expected - their_logits(hf_model(DENSE))).max() > 0.1


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft's own, of its own conversion
def test_an_adapter_of_experts_made_here_gives_the_same_logits_in_peft(tmp_path):
    folder = base_folder(tmp_path / "base", MIXTURE)
    adapter = lora.to_adapter(trained(folder, MIXTURE, ["attention", "experts"]))
    save_adapter(tmp_path / "adapter", adapter, MIXTURE, "peft", "")
    theirs = peft.PeftModel.from_pretrained(hf_model(MIXTURE), tmp_path / "adapter")
    (ours,) = LLM(folder, max_len=64, adapters={"a": tmp_path / "adapter"}).logits([IDS], adapter="a")
    np.testing.assert_allclose(ours, their_logits(theirs), atol=2e-5)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_both_layouts_hold_the_same_adapter(config, tmp_path):
    folder = base_folder(tmp_path / "base", config)
    adapter = lora.to_adapter(trained(folder, config, ["attention", "router" if config.moe else "ffn"]))
    for layout in ("peft", "native"):
        save_adapter(tmp_path / layout, adapter, config, layout, "")
        read = open_adapter(tmp_path / layout, config)
        assert read.deltas.keys() == adapter.deltas.keys()
        for name, delta in adapter.deltas.items():
            np.testing.assert_array_equal(read.deltas[name].a, delta.a)
            np.testing.assert_array_equal(read.deltas[name].b, delta.b)
            assert read.deltas[name].scale == delta.scale
    params = json.loads((tmp_path / "native/params.json").read_text())
    assert params["lora"] == {"rank": 3, "scaling": 1.5}
    assert "layers.0.attention.wq.lora_A.weight" in load_file(tmp_path / "native/lora.safetensors")


def test_the_copy_of_a_base_weight_beside_an_adapter_is_told_of_and_left(tmp_path):
    with_peft(DENSE).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"holds base_model\.model\.lm_head\.base_layer\.weight too"):
        assert len(open_adapter(tmp_path, DENSE).deltas) == 15


def test_a_bare_native_file_has_a_scaling_of_2(tmp_path):
    folder = base_folder(tmp_path / "base", DENSE)
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    save_file(
        {f"layers.1.attention.wo.lora_{x}.weight": w for x, w in (("A", a), ("B", b))}, tmp_path / "x.safetensors"
    )
    with pytest.warns(UserWarning, match="taking the scaling of 2"):
        llm = LLM(folder, max_len=64, adapters={"x": tmp_path / "x.safetensors"})
    weights = native_weights(hf_model(DENSE), DENSE)
    weights["layers.1.attention.wo.weight"] += 2 * b @ a
    (expected,) = LLM(write_native(tmp_path / "sum", DENSE, weights), max_len=64).logits([IDS])
    np.testing.assert_allclose(llm.logits([IDS], adapter="x")[0], expected, atol=5e-5)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_several_adapters_in_one_batch_are_each_alone(config, tmp_path):
    folder, names = base_folder(tmp_path / "base", config), {}
    for i, (targets, dora) in enumerate(((["attention"], False), (["experts" if config.moe else "ffn", "head"], True))):
        model = trained(folder, config, targets, dora)
        save_adapter(tmp_path / str(i), lora.to_adapter(model), config, "peft", "")
        names[f"a{i}"] = tmp_path / str(i)
    llm = LLM(folder, max_len=64, max_batch_tokens=16, adapters=names)  # several steps, chunks of all mixed
    asked = ["a0", None, "a1", "a1", "a0"]
    prompts = [tokens(9 + 4 * i, seed=i) for i in range(5)]
    together = llm.logits(prompts, adapter=asked)
    for ids, name, logits in zip(prompts, asked, together, strict=True):
        alone = LLM(folder, max_len=64, adapters={name: names[name]} if name else None)
        np.testing.assert_allclose(logits, alone.logits([ids], adapter=name)[0], atol=2e-5)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = llm.generate(prompts, params, adapter=asked)
    for ids, name, completion in zip(prompts, asked, found, strict=True):
        assert completion.token_ids == llm.generate([ids], params, adapter=name)[0].token_ids


def test_a_name_that_is_not_loaded_is_refused_and_the_next_request_answered(tmp_path):
    llm = LLM(base_folder(tmp_path / "base", DENSE), max_len=64)
    with pytest.raises(RequestError, match="adapter 'b': no such adapter is loaded; there are none") as caught:
        llm.generate([IDS], adapter="b")
    assert caught.value.param == "adapter"
    with pytest.raises(RequestError, match="2 prompts and 1 adapters"):
        llm.generate([IDS, IDS], adapter=[None])
    assert llm.generate([IDS], SamplingParams(max_tokens=2))[0].token_ids


def test_targets_are_words_or_ends_of_names():
    assert lora.target_layers(DENSE, ["wq", "head"]) == ["output", "layers.0.attention.wq", "layers.1.attention.wq"]
    assert len(lora.target_layers(MIXTURE, ["experts"])) == 2 * 4 * 3
    assert lora.target_layers(MIXTURE, ["router"]) == ["layers.0.feed_forward.gate", "layers.1.feed_forward.gate"]
    assert set(lora.target_layers(DENSE, ["attention", "ffn", "head"])) == set(linear_layers(DENSE))
    for config, word in ((MIXTURE, "ffn"), (DENSE, "experts"), (DENSE, "router"), (DENSE, "k_proj")):
        with pytest.raises(UsageError, match=f"'{word}' names no linear layer"):
            lora.target_layers(config, [word])


def peft_folder(path, config=DENSE, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_peft(config, **changes).save_pretrained(path, save_embedding_layers=False)
    return path


def changed(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, r"lora_A: expected \(4, 32\), got \(3, 32\): the rank is 4"),
        ({"r": 0}, "r = 0: expected a whole number"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": "5"}, "lora_alpha = '5'"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"lora_alpha": 1e39}, r"lora_alpha = 1e\+39"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3': expected LORA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern"),
        ({"rank_pattern": {".*.*.*.*.*x": 3}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(settings, message, tmp_path):
    folder = peft_folder(tmp_path / "a")
    changed(folder, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(folder, DENSE)


@pytest.mark.parametrize("scaling", [0, -1, 1e39, 10**400, "2", True])
def test_a_native_scaling_that_no_float32_is_above_zero_is_refused(scaling, tmp_path):
    save_file({}, tmp_path / "lora.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({"lora": {"rank": 2, "scaling": scaling}}))
    with pytest.raises(CheckpointError, match="expected a rank and a scaling above 0"):
        open_adapter(tmp_path, DENSE)


def test_an_adapter_of_another_model_is_refused_before_a_weight_is_read(tmp_path):
    folder = peft_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match="this adapter was made for another model"):
        open_adapter(folder, replace(DENSE, hidden_dim=56))
    with pytest.raises(CheckpointError, match=r"no linear layer for .*layers\.1\.[^ ]*, .* and \d+ more"):
        open_adapter(folder, replace(DENSE, n_layers=1, sliding_window=(None,)))
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    save_file(
        {name: tensor for name, tensor in stored.items() if not name.endswith("0.self_attn.q_proj.lora_B.weight")}, path
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq: lora_B is missing"):
        open_adapter(folder, DENSE)
    stored["base_model.model.lm_head.lora_A.weight"][0, 0] = torch.nan
    save_file(stored, path)
    with pytest.raises(CheckpointError, match="NaN"):
        open_adapter(folder, DENSE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        open_adapter(folder, DENSE)
    with pytest.raises(CheckpointError, match="no adapter here"):
        open_adapter(tmp_path, DENSE)


def test_dora_has_no_native_form_and_a_shared_output_is_not_merged(tmp_path):
    folder = base_folder(tmp_path / "base", TIED)
    with pytest.raises(UsageError, match="no native form"):
        save_adapter(tmp_path / "x", lora.to_adapter(trained(folder, TIED, ["wq"], dora=True)), TIED, "native", "")
    assert not (tmp_path / "x").exists()
    save_adapter(tmp_path / "head", lora.to_adapter(trained(folder, TIED, ["head"])), TIED, "peft", "")
    with pytest.raises(UsageError, match="shares with its embeddings"):
        convert(folder, tmp_path / "merged", adapter=tmp_path / "head")
    assert not (tmp_path / "merged").exists()
