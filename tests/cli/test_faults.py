"""One fault of each group through the command line: one line, the right code, and no weight memory taken."""

import json
import math
import pickle
import shutil
import subprocess
import sys

import pytest
from byte_models import ENVIRONMENT
from safetensors.numpy import load_file, save_file

WEIGHTS = "consolidated.safetensors"


def edit_params(folder, **changes):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / WEIGHTS)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def pickled_code(folder):
    (folder / WEIGHTS).unlink()
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"norm.weight": print}))


FAULTS = {
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), [WEIGHTS]),
    "missing tensor": (lambda f: edit_weights(f, lambda w: w.pop("norm.weight")), ["norm.weight"]),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda w: w.update(more=w["norm.weight"])),
        ["more", "--ignore-unexpected"],
    ),
    "wrong shape": (lambda f: edit_params(f, hidden_dim=64), ["hidden_dim = 64"]),
    "no configuration": (lambda f: (f / "params.json").unlink(), ["params.json", "config.json"]),
    "bad JSON": (lambda f: (f / "params.json").write_text("{"), ["params.json"]),
    "impossible value": (lambda f: edit_params(f, n_heads=0), ["n_heads = 0"]),
    "vision model": (lambda f: edit_params(f, vision_encoder={"hidden_size": 8}), ["text models only"]),
    "other vocabulary": (
        lambda f: (edit_params(f, vocab_size=300), edit_weights(f, lambda w: None)),
        ["vocab_size = 300"],
    ),
    "no tokenizer": (lambda f: (f / "tekken.json").unlink(), ["tokenizer"]),
    "code in a pickle": (pickled_code, ["consolidated.00.pth"]),
    "a folder in a file's place": (lambda f: replace_by_folder(f / WEIGHTS), [WEIGHTS]),
}

DRIVER = """
import contextlib, io, json, sys
from maestrale.cli import main
results = {}
for name, argv in json.load(sys.stdin).items():
    sys.argv, out, err = ["maestrale", *argv], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            results[name] = [left.code, out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(results))
"""


def test_a_bad_model_is_one_line_and_code_3_before_torch_is_even_imported(models, tmp_path):
    commands = {}
    for name, (spoil, _) in FAULTS.items():
        folder = shutil.copytree(models["dense"], tmp_path / name)
        spoil(folder)
        commands[name] = ["generate", str(folder), "-p", "A"]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands), env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(run.stdout)
    for name, (_, words) in FAULTS.items():
        code, out, err, torch_imported = results[name]
        assert (name, code, out, err.count("\n"), torch_imported) == (name, 3, "", 1, False)
        assert err.startswith("maestrale: ")
        assert [word for word in words if word not in err] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-tokens", "-1"], ["max_tokens = -1"]),
        (["--temperature", "nan"], ["temperature = nan"]),
        (["--top-p", "0"], ["top_p = 0"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--backend", "abacus"], ["abacus"]),
        (["--device", "abacus"], ["abacus"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--max-len", "0"], ["max_len = 0"]),
        (["--prompts", "/nowhere/prompts.txt"], ["/nowhere/prompts.txt"]),
    ],
)
def test_a_wrong_value_is_one_line_and_code_2(command, models, args, words):
    run = command("generate", models["dense"], "-p", "A", *args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert all(word in run.err for word in words)


def test_a_prompt_over_the_context_is_refused_with_both_numbers_and_not_shown(command, models):
    run = command("generate", models["dense"], "-p", "A" * 40, "--max-len", 16)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "41" in run.err
    assert "16" in run.err


def test_a_prompt_that_is_no_text_is_refused(command, models):
    run = command("generate", models["dense"], "-p", "A\udcff")
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)


def test_a_context_beyond_memory_is_code_4_and_says_what_fits(command, models):
    run = command("generate", models["dense"], "-p", "A", "--max-len", 10**9)
    assert (run.code, run.out, run.err.count("\n")) == (4, "", 1)
    assert "the longest context that fits" in run.err


@pytest.mark.parametrize(("key", "told"), [("colour", "colour"), ("a\nb\x1b[2J", r"a\nb\x1b[2J")])
def test_a_warning_is_one_line_and_cannot_steer_the_terminal(spawn, models, tmp_path, key, told):
    folder = shutil.copytree(models["dense"], tmp_path / "model")
    edit_params(folder, **{key: "blue"})
    process = spawn("inspect", folder, env=ENVIRONMENT | {"PYTHONWARNINGS": ""})
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert err.startswith("maestrale: warning: ")
    assert err.count("\n") == 1
    assert told in err


def test_weights_of_nan_are_code_3_in_one_line_from_every_verb_that_runs_them(models, command, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(models["dense"], folder)
    weights = load_file(folder / "consolidated.safetensors")
    weights["norm.weight"][0] = math.nan
    save_file(weights, folder / "consolidated.safetensors")
    for args in (
        ("generate", folder, "-p", "A", "--max-tokens", 2),
        ("embed", folder, "-t", "A"),
        ("bench", folder, "--repeats", 1),
    ):
        run = command(*args)
        assert (run.code, run.err.count("\n")) == (3, 1), args
        assert "the model or its weights are damaged" in run.err


def test_a_file_of_prompts_without_end_is_refused(models, command, monkeypatch):
    monkeypatch.setattr("maestrale.cli.options._MAX_TEXT", 1 << 20)
    run = command("generate", models["dense"], "--prompts", "/dev/zero")
    assert (run.code, run.err) == (2, "maestrale: /dev/zero: expected at most 1.00 MiB of text: split it\n")
