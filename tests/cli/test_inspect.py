import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maestrale.cli.options import readable_bytes

SEVEN_B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}
V01 = SEVEN_B | {"sliding_window": 4096}
V03 = SEVEN_B | {"vocab_size": 32768, "rope_theta": 1e6}
MIXTRAL = SEVEN_B | {"rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}
MIB, GIB = 2**20, 2**30


def write_hollow(folder, params):
    """A model of true size whose weights are a hole in the file: only its header takes room on the disk."""
    dim, hidden, vocab = params["dim"], params["hidden_dim"], params["vocab_size"]
    kv = params["n_kv_heads"] * params["head_dim"]
    shapes = {"tok_embeddings.weight": [vocab, dim], "norm.weight": [dim], "output.weight": [vocab, dim]}
    for i in range(params["n_layers"]):
        layer = {"attention_norm": [dim], "ffn_norm": [dim]}
        layer |= {f"attention.w{name}": [rows, dim] for name, rows in (("q", dim), ("k", kv), ("v", kv), ("o", dim))}
        experts = params.get("moe", {}).get("num_experts")
        if experts:
            layer["feed_forward.gate"] = [experts, dim]
        for expert in [f"feed_forward.experts.{e}" for e in range(experts)] if experts else ["feed_forward"]:
            layer |= {f"{expert}.w1": [hidden, dim], f"{expert}.w2": [dim, hidden], f"{expert}.w3": [hidden, dim]}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "params.json").write_text(json.dumps(params))
    with open(folder / "consolidated.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def facts_of(command, *args):
    run = command("inspect", *args, "--json")
    assert (run.code, run.err) == (0, "")
    return json.loads(run.out)


@pytest.mark.parametrize(
    ("params", "total", "active"),
    [
        (V01, 7_241_732_096, 7_241_732_096),
        (V03, 7_248_023_552, 7_248_023_552),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
    ],
)
def test_published_models_have_their_published_sizes(command, tmp_path, params, total, active):
    write_hollow(tmp_path, params)
    facts = facts_of(command, tmp_path)
    assert facts["parameters"] == {"total": total, "active": active}
    assert facts["weights"] == {"stored": {"BF16": 2 * total}, "bits": 16, "dtype": "BF16", "bytes": 2 * total}


def test_a_window_of_4096_keeps_512_mib_where_32k_tokens_would_take_4_gib(command, tmp_path):
    write_hollow(tmp_path, V01)
    cache = facts_of(command, tmp_path)["cache"]
    assert (cache["length"], cache["bytes"], cache["bytes_without_windows"]) == (32768, 512 * MIB, 4 * GIB)
    cache = facts_of(command, tmp_path, "--length", 1000, "--batch", 3, "--dtype", "float32")["cache"]
    assert cache["bytes"] == cache["bytes_without_windows"] == 3 * 1000 * 2 * 131_072


def test_the_longest_context_is_what_memory_has_left(command, tmp_path, monkeypatch):
    write_hollow(tmp_path, V03)
    weights = 2 * 7_248_023_552
    monkeypatch.setattr("maestrale.memory.available_memory", lambda: weights + 2 * 131_072 * 5000 + 131_071)
    facts = facts_of(command, tmp_path)
    assert facts["cache"]["longest_context"] == 4992  # whole pages of 16
    assert facts["memory"]["fits"] is False
    assert facts_of(command, tmp_path, "--length", 4992)["memory"]["fits"] is True
    assert facts_of(command, tmp_path, "--batch", 2)["cache"]["longest_context"] == 2496
    monkeypatch.setattr("maestrale.memory.available_memory", lambda: 1 * GIB)
    assert facts_of(command, tmp_path)["cache"]["longest_context"] == 0


def test_an_int8_cache_takes_head_dim_and_four_bytes_for_each_key_and_value_of_a_head(command, tmp_path):
    write_hollow(tmp_path, V03)
    found = facts_of(command, tmp_path, "--length", 1000, "--cache", "int8")["cache"]["bytes"]
    assert found == 1000 * 32 * 2 * 8 * (128 + 4)
    run = command("inspect", tmp_path, "--cache", "int4")
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert "cache 'int4': expected auto, int8 or fp8" in run.err


def test_an_fp8_cache_takes_a_byte_for_each_number(command, tmp_path):
    write_hollow(tmp_path, V03)
    found = facts_of(command, tmp_path, "--length", 1000, "--cache", "fp8")["cache"]["bytes"]
    assert found == 1000 * 32 * 2 * 8 * 128


def test_with_windows_in_all_layers_any_length_fits(command, tmp_path, monkeypatch):
    write_hollow(tmp_path, V01)
    monkeypatch.setattr("maestrale.memory.available_memory", lambda: 2 * 7_241_732_096 + 2 * 576 * MIB)
    # its pages hold the window and a chunk of 512: 4608 tokens
    assert facts_of(command, tmp_path)["cache"]["longest_context"] is None
    assert "any" in command("inspect", tmp_path).out


def test_a_7b_is_inspected_in_well_under_a_second(command, tmp_path):
    write_hollow(tmp_path, V01)
    command("inspect", tmp_path)
    start = time.process_time()
    command("inspect", tmp_path)
    assert time.process_time() - start < 0.5


def test_text_has_every_field_aligned(command, models):
    run = command("inspect", models["mixed"])
    lines = dict(line.split(maxsplit=1) for line in run.out.splitlines() if len(line.split()) > 1)
    assert (run.code, run.err) == (0, "")
    assert lines["dim"] == "32"
    assert lines["norm_eps"] == "1e-05"
    assert lines["rope_theta"] == "10,000"
    assert lines["sliding_window"] == "by layer: 1 x none, 2 x 5"
    assert lines["moe"] == "none"
    assert lines["tokenizer"] == "tekken"
    column = run.out.index("native") - run.out.index("layout")
    assert all(line[column - 1] == " " and line[column] != " " for line in run.out.splitlines() if len(line) > column)


def test_a_folder_without_a_tokenizer_is_told_not_refused(command, tmp_path):
    write_hollow(tmp_path, V01)
    assert facts_of(command, tmp_path)["tokenizer"]["kind"] is None
    assert "none: " in command("inspect", tmp_path).out


def test_check_tensors_lists_all_with_nan_or_inf_and_leaves_with_3(command, models, tmp_path):
    weights = load_file(models["dense"] / "consolidated.safetensors")
    weights["norm.weight"][3] = np.nan
    weights["layers.1.attention.wo.weight"][0, 0] = -np.inf
    (tmp_path / "params.json").write_bytes((models["dense"] / "params.json").read_bytes())
    save_file(weights, tmp_path / "consolidated.safetensors")
    assert command("inspect", tmp_path).code == 0
    run = command("inspect", tmp_path, "--check-tensors")
    assert (run.code, run.err.count("\n")) == (3, 1)
    assert run.err.rstrip().endswith(": norm.weight, layers.1.attention.wo.weight")
    run = command("inspect", tmp_path, "--check-tensors", "--json")
    assert run.code == 3
    assert json.loads(run.out)["bad_tensors"] == ["norm.weight", "layers.1.attention.wo.weight"]
    run = command("inspect", models["dense"], "--check-tensors", "--json")
    assert (run.code, json.loads(run.out)["bad_tensors"]) == (0, [])


@pytest.mark.parametrize("args", [["--length", 0], ["--batch", -1], ["--length", 2**31], ["--dtype", "int4"]])
def test_impossible_questions_are_usage_errors(command, models, args):
    run = command("inspect", models["dense"], *args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (512 * MIB, "512 MiB"),
        (4 * GIB, "4.00 GiB"),
        (14_483_464_192, "13.5 GiB"),
        (2**50, "1,048,576 GiB"),
    ],
)
def test_sizes_have_three_digits(size, text):
    assert readable_bytes(size) == text


def test_a_bundled_model_has_a_name_and_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    from maestrale.launch import BUNDLED, model_folder

    monkeypatch.chdir(tmp_path)
    assert model_folder(None) == model_folder("stories") == BUNDLED / "stories"
    assert model_folder("stories-moe") == BUNDLED / "stories-moe"
    assert model_folder("./elsewhere") == Path("elsewhere")
    (tmp_path / "stories").mkdir()
    assert model_folder("stories") == Path("stories")
