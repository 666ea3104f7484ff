"""The one-file model against transformers, and against what the formulas say."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch
from safetensors.torch import save_file
from transformers import MinistralConfig, MistralConfig, MixtralConfig
from transformers.models.ministral.modeling_ministral import MinistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from maestrale import one_file

SOURCE = Path(one_file.__file__)
TOKENIZERS = Path(mistral_common.__file__).parent / "data"
BASE = {
    "dim": 32,
    "n_layers": 3,
    "head_dim": 8,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "norm_eps": 1e-5,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "full": {"rope_theta": 1e6},
    "windowed": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "head_dim is not dim / n_heads": {"head_dim": 6, "sliding_window": 5},
    "one kv head": {"n_kv_heads": 1},
    "as many kv heads as heads": {"n_kv_heads": 4},
    "tied": {"tied_embeddings": True},
    "windows by layer": {"sliding_window": [None, 3, 3], "rope_theta": 1e4},
    "mixtral": {"moe": MOE},
    "windowed mixtral": {"moe": MOE, "sliding_window": 4},
}


def make_reference(params):
    """A random transformers model with the numbers of params, in float32, and the same weights by native names."""
    window = params.get("sliding_window")
    shared = {
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "head_dim": params["head_dim"],
        "intermediate_size": params["hidden_dim"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "vocab_size": params["vocab_size"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 1e4 if window else 1e6),
        "tie_word_embeddings": params.get("tied_embeddings", False),
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    if "moe" in params:
        experts = {"num_local_experts": MOE["num_experts"], "num_experts_per_tok": MOE["num_experts_per_tok"]}
        model = MixtralForCausalLM(MixtralConfig(**shared, **experts, sliding_window=window))
    elif isinstance(window, list):
        kinds = ["sliding_attention" if w else "full_attention" for w in window]
        model = MinistralForCausalLM(
            MinistralConfig(**shared, sliding_window=max(filter(None, window)), layer_types=kinds)
        )
    else:
        model = MistralForCausalLM(MistralConfig(**shared, sliding_window=window))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.2)
    return model.eval().requires_grad_(False), to_native(model.state_dict(), params)


def to_native(state, params):
    """Native names and row order, from the tables of docs/numerics.md."""
    renames = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.": "",
        "self_attn": "attention",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
        "mlp": "feed_forward",
        "gate_proj": "w1",
        "down_proj.": "w2.",
        "up_proj.": "w3.",
    }
    weights = {}
    for name, weight in state.items():
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        if ".wq." in name or ".wk." in name:  # half-split rows to interleaved pairs
            weight = weight.view(-1, 2, params["head_dim"] // 2, params["dim"]).transpose(1, 2).reshape(weight.shape)
        if name.endswith("gate_up_proj"):
            for e, both in enumerate(weight):
                for part, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    weights[name.replace("gate_up_proj", f"{e}.{part}.weight")] = half.clone()
        elif name.endswith("down_proj"):
            for e, one in enumerate(weight):
                weights[name.replace("down_proj", f"{e}.w2.weight")] = one.clone()
        elif not (name == "output.weight" and params.get("tied_embeddings")):
            weights[name] = weight.clone()
    return weights


def write_folder(folder, params, weights):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    save_file(weights, folder / "consolidated.safetensors")
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function from the name of one of MODELS to (transformers' model, our folder); each is made once."""
    made = {}

    def make(name):
        if name not in made:
            params = BASE | MODELS[name]
            reference, weights = make_reference(params)
            made[name] = reference, write_folder(tmp_path_factory.mktemp("model"), params, weights)
        return made[name]

    return make


def tokens(n, seed=0):
    return torch.randint(0, BASE["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(build, name):
    reference, folder = build(name)
    model, _ = one_file.load(folder)
    ids = tokens(19)
    expected = reference(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(one_file.logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["full", "windowed", "windows by layer", "windowed mixtral"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 18])
def test_logits_do_not_depend_on_chunk_size(build, name, chunk):
    model, _ = one_file.load(build(name)[1])
    ids = tokens(19)
    torch.testing.assert_close(one_file.logits(model, ids, chunk), one_file.logits(model, ids), atol=1e-5, rtol=0)


def test_steps_of_mixed_sizes_give_the_same_logits(build):
    model, _ = one_file.load(build("windowed")[1])
    ids = torch.tensor(tokens(19))
    cache = model.new_cache(6)
    pieces = torch.cat([model(part, cache) for part in ids.split([5, 1, 1, 6, 2, 4])])
    torch.testing.assert_close(pieces, one_file.logits(model, ids.tolist()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["full", "windowed", "windowed mixtral"])
def test_greedy_text_is_that_of_transformers(build, name):
    reference, folder = build(name)
    model, _ = one_file.load(folder)
    ids = tokens(7)
    expected = list(ids)
    for _ in range(12):
        expected.append(int(reference(torch.tensor([expected])).logits[0, -1].argmax()))
    assert one_file.generate(model, ids, 12, eos_id=None) == expected[7:]


def test_generation_ends_with_the_first_end_token(build):
    model, _ = one_file.load(build("windowed")[1])
    free = one_file.generate(model, tokens(7), 12, eos_id=None)
    assert one_file.generate(model, tokens(7), 12, eos_id=free[4]) == free[: free.index(free[4]) + 1]
    assert one_file.generate(model, tokens(7), 0, eos_id=None) == []


def test_a_prompt_longer_than_a_chunk_of_generation_is_read_whole(build):
    reference, folder = build("windowed")
    model, _ = one_file.load(folder)
    ids = tokens(600)
    assert one_file.generate(model, ids, 1, eos_id=None) == [int(reference(torch.tensor([ids])).logits[0, -1].argmax())]


@pytest.mark.parametrize(("window", "chunk"), [(2, 20), (3, 20), (4, 20), (4, 3)])
def test_k_layers_see_exactly_k_times_w_minus_1_plus_1_positions(build, tmp_path, window, chunk):
    params = BASE | {"sliding_window": window}
    model, _ = one_file.load(write_folder(tmp_path, params, make_reference(params)[1]))
    ids = tokens(20)
    changed = [(ids[0] + 1) % BASE["vocab_size"], *ids[1:]]
    moved = (one_file.logits(model, ids, chunk) != one_file.logits(model, changed, chunk)).any(dim=1)
    field = params["n_layers"] * (window - 1) + 1
    assert moved.tolist() == [p < field for p in range(20)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_each_query_sees_w_keys_itself_included(build, chunk):
    model, _ = one_file.load(build("windowed")[1])
    cache = model.new_cache(chunk)
    for positions in torch.arange(24).split(chunk):
        model(torch.zeros_like(positions), cache)
        seen = cache.layers[0].visible(positions).sum(dim=1)
        assert seen.tolist() == [min(p + 1, 4) for p in positions.tolist()]


def test_rolling_buffer_keeps_its_size(build):
    model, _ = one_file.load(build("windows by layer")[1])
    cache = model.new_cache(5)
    for part in torch.tensor(tokens(100)).split(5):
        model(part, cache)
        assert [len(layer.k_SGC) for layer in cache.layers[1:]] == [3 + 5 - 1] * 2
    assert len(cache.layers[0].k_SGC) >= 100


def test_ring_overwrites_the_oldest_key(build):
    _, params = one_file.load(build("windowed")[1])
    ring = one_file.LayerCache(params, window=3, chunk=1, dtype=torch.float32)
    for p in torch.arange(5):
        ring.write(p[None], torch.full((1, 2, 8), float(p)), torch.zeros(1, 2, 8))
    assert ring.k_SGC[:, 0, 0].tolist() == [3.0, 4.0, 2.0]  # positions 2 3 4 lie in slots 2 0 1


def test_a_step_larger_than_the_cache_takes_is_refused(build):
    model, _ = one_file.load(build("windowed")[1])
    with pytest.raises(ValueError, match="4 tokens in one step; this cache takes 1 to 3"):
        model(torch.tensor(tokens(4)), model.new_cache(3))
    with pytest.raises(ValueError, match="0 tokens"):
        one_file.logits(model, [])


def test_norm_in_bfloat16_is_that_of_transformers_to_the_bit(build):
    _, params = one_file.load(build("full")[1])
    ours, theirs = one_file.RMSNorm(params), MistralRMSNorm(params.dim, params.norm_eps)
    ours.weight.data = theirs.weight.data = (1 + torch.randn(params.dim)).bfloat16()
    x = torch.randn(50, params.dim).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_of_equal_router_scores_the_lower_expert_wins(build):
    model, _ = one_file.load(build("mixtral")[1])
    moe = model.layers[0].feed_forward
    moe.gate.weight.zero_()
    x = torch.randn(5, BASE["dim"])
    torch.testing.assert_close(moe(x), 0.5 * moe.experts[0](x) + 0.5 * moe.experts[1](x))


def test_bfloat16_model_gives_float32_logits_near_the_exact_ones(build):
    folder = build("windowed mixtral")[1]
    exact, rough = one_file.load(folder)[0], one_file.load(folder, torch.bfloat16)[0]
    found = one_file.logits(rough, tokens(9), 4)
    assert found.dtype == torch.float32
    assert (found - one_file.logits(exact, tokens(9))).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("spelling", "windows"),
    [
        ({}, (None, None, None)),
        ({"sliding_window": None}, (None, None, None)),
        ({"sliding_window": 4}, (4, 4, 4)),
        ({"sliding_window": "4"}, (4, 4, 4)),
        ({"_sliding_window": 4}, (4, 4, 4)),
        ({"sliding_window": None, "_sliding_window": [None, "8"]}, (None, 8, None)),
    ],
)
def test_every_spelling_of_windows_is_understood(tmp_path, spelling, windows):
    (tmp_path / "params.json").write_text(json.dumps(BASE | spelling))
    params = one_file.read_params(tmp_path / "params.json")
    assert params.windows == windows
    assert params.rope_theta == (1e4 if any(windows) else 1e6)


def test_unknown_keys_are_named_in_a_warning(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(BASE | {"colour": "blue"}))
    with pytest.warns(UserWarning, match="colour"):
        one_file.read_params(tmp_path / "params.json")


def test_pth_gives_the_model_that_safetensors_gives(build, tmp_path):
    reference, folder = build("windowed")
    weights = to_native(reference.state_dict(), BASE)
    (tmp_path / "params.json").write_text((folder / "params.json").read_text())
    torch.save(weights, tmp_path / "consolidated.00.pth")
    ours, theirs = one_file.load(tmp_path)[0], one_file.load(folder)[0]
    assert torch.equal(one_file.logits(ours, tokens(9)), one_file.logits(theirs, tokens(9)))


class Program:
    """Makes a folder where it is unpickled without care."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def spoil(folder, how):
    """Makes one mistake in a good folder, and says what its message must name."""
    params, weights = folder / "params.json", folder / "consolidated.safetensors"
    if how == "no params":
        params.unlink()
        return "no params.json"
    if how in ("broken json", "not an object"):
        params.write_text("{" if how == "broken json" else "[]")
        return "params.json"
    if how == "a missing number":
        params.write_text(json.dumps({key: value for key, value in BASE.items() if key != "hidden_dim"}))
        return "hidden_dim"
    if how.startswith("params"):
        params.write_text(json.dumps(BASE | json.loads(how.removeprefix("params "))))
        return "params.json"
    if how == "no weights":
        weights.unlink()
        return "consolidated.safetensors"
    if how == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return "consolidated.safetensors"
    if how == "an empty pickle":
        weights.unlink()
        (folder / "consolidated.00.pth").touch()
        return "consolidated.00.pth"
    if how == "a pickle that runs code":
        weights.unlink()
        torch.save({"norm.weight": Program(folder / "ran")}, folder / "consolidated.00.pth")
        return "not loaded"
    if how == "no tokenizer":
        return "no tokenizer"
    (folder / "tokenizer.model").write_bytes(b"no model" if how == "a broken tokenizer" else V1.read_bytes())
    return "not a tokenizer" if how == "a broken tokenizer" else "vocab_size = 64"


V1 = TOKENIZERS / "tokenizer.model.v1"
MISTAKES = ["no params", "broken json", "not an object", "a missing number", "no weights", "half the weights"]
MISTAKES += ["an empty pickle", "a pickle that runs code", "no tokenizer", "a broken tokenizer", "another tokenizer"]
MISTAKES += ['params {"dim": 40}', 'params {"n_heads": 0}', 'params {"n_heads": 3}', 'params {"sliding_window": 0}']
MISTAKES += ['params {"sliding_window": []}', 'params {"moe": {"num_experts": 2, "num_experts_per_tok": 3}}']
MISTAKES += ['params {"n_layers": "two"}', 'params {"moe": 3}', 'params {"hidden_dim": 4.5}', 'params {"head_dim": 7}']


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_3(build, tmp_path, capsys, how):
    folder = build("full")[1]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    named = spoil(tmp_path, how)
    if how == 'params {"dim": 40}':
        named = "consolidated.safetensors"  # the numbers are possible, but not those of these weights
    assert one_file.main([str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert named in err


def test_the_command_names_a_missing_folder_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "maestrale.one_file", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\n"


@pytest.mark.parametrize("package", ["torch", "safetensors", "mistral_common"])
def test_a_package_that_is_missing_is_named_with_the_remedy(package):
    program = f"import runpy, sys; sys.modules['{package}'] = None; runpy.run_module('maestrale.one_file')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert package in done.stderr
    assert "pip install" in done.stderr


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("tokenizer.model.v1", 32000), ("tekken_240911.json", 131072)])
def test_the_command_prints_prompts_with_their_continuations(tmp_path, capsys, tokenizer, vocab_size):
    params = BASE | {"vocab_size": vocab_size, "dim": 8, "n_layers": 1}
    write_folder(tmp_path, params, make_reference(params)[1])
    name = "tekken.json" if tokenizer.endswith("json") else "tokenizer.model"
    (tmp_path / name).write_bytes((TOKENIZERS / tokenizer).read_bytes())
    assert one_file.main([str(tmp_path), "-p", "This is a test", "-p", "And another", "--max-tokens", "0"]) == 0
    assert capsys.readouterr().out == "This is a test\n=====================\nAnd another\n"
    assert one_file.main([str(tmp_path), "--max_tokens", "3"]) == 0
    texts = capsys.readouterr().out.split("\n=====================\n")
    assert all(text.startswith(prompt) for text, prompt in zip(texts, one_file.DEMO, strict=True))


def test_the_file_can_be_read_in_a_sitting():
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= 350


def test_the_file_imports_nothing_of_ours():
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "mistral_common"}
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] in allowed
