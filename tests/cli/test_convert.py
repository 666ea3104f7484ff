from dataclasses import replace

import pytest
from byte_models import CONFIGS, byte_ids
from safetensors.numpy import load_file
from tiny import hf_logits, make_folder

WEIGHTS = "consolidated.safetensors"


def test_to_hf_and_back_gives_the_same_weights_and_tokenizer(command, models, tmp_path):
    there, back = tmp_path / "hf", tmp_path / "native"
    run = command("convert", models["dense"], there, "--to", "hf")
    assert (run.code, run.err) == (0, "")
    stored = load_file(models["dense"] / WEIGHTS)
    size = sum(array.nbytes for array in stored.values())
    assert run.out.startswith(f"{there}: {len(stored)} tensors, {size / 1024:.0f} KiB, ")
    assert command("convert", there, back, "--to", "native").code == 0
    again = load_file(back / WEIGHTS)
    assert again.keys() == stored.keys()
    assert all((again[name] == stored[name]).all() for name in stored)
    assert (back / "tekken.json").read_bytes() == (models["dense"] / "tekken.json").read_bytes()


def test_transformers_reads_what_was_written(command, models, references, tmp_path):
    import transformers

    assert command("convert", models["windowed"], tmp_path / "hf", "--to", "hf").code == 0
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ids = byte_ids("maestrale, tramontana")
    assert (hf_logits(read, ids) - hf_logits(references["windowed"], ids)).abs().max() < 1e-6


def test_dtype_casts_all_weights(command, models, tmp_path):
    assert command("convert", models["dense"], tmp_path / "half", "--to", "native", "--dtype", "float16").code == 0
    stored, cast = load_file(models["dense"] / WEIGHTS), load_file(tmp_path / "half" / WEIGHTS)
    assert all((cast[name] == stored[name].astype("float16")).all() for name in stored)


def test_what_is_there_is_replaced_by_force_only(command, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    run = command("convert", models["dense"], tmp_path / "out", "--to", "hf")
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "--force" in run.err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    run = command("convert", models["dense"], tmp_path / "out", "--to", "hf", "--force")  # it is no model's folder
    assert (run.code, (tmp_path / "out" / "mine.txt").read_text()) == (2, "mine")
    (tmp_path / "out" / "config.json").touch()
    assert command("convert", models["dense"], tmp_path / "out", "--to", "hf", "--force").code == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("args", [["--to", "onnx"], ["--to", "gguf"], ["--to", "hf", "--dtype", "int8"]])
def test_unknown_targets_are_refused(command, models, tmp_path, args):
    run = command("convert", models["dense"], tmp_path / "out", *args)
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_config_json_has_no_words_for_is_code_3(command, tmp_path):
    two_windows = replace(CONFIGS["mixed"], sliding_window=(None, 5, 7))
    run = command("convert", make_folder(tmp_path / "model", two_windows), tmp_path / "out", "--to", "hf")
    assert (run.code, run.out, run.err.count("\n")) == (3, "", 1)
    assert not (tmp_path / "out").exists()
