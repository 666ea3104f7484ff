import json

import pytest
from safetensors import safe_open


@pytest.mark.parametrize(("weights", "bits"), [("int8", "8."), ("int4", "4.")])
def test_a_quantized_folder_generates_and_is_inspected(command, models, tmp_path, weights, bits):
    out = tmp_path / "packed"
    run = command("quantize", models["dense"], out, "--weights", weights)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith(f"{out}: ")
    assert " bits a weight, " in run.out
    assert (out / "tekken.json").read_bytes() == (models["dense"] / "tekken.json").read_bytes()
    with safe_open(out / "packed.safetensors", "np") as file:
        described = json.loads(file.metadata()["maestrale.packed"])
    assert described["weights"]["layers.0.attention.wq.weight"]["format"] == weights
    run = command("generate", out, "-p", "a", "--max-tokens", "3", "--backend", "torch", "--json")
    assert run.code == 0
    assert len(json.loads(run.out)["token_ids"]) <= 3
    facts = json.loads(command("inspect", out, "--json").out)
    assert facts["layout"] == "packed"
    assert facts["weights"]["stored"][weights] > 0
    assert 4 < facts["weights"]["bits"] < 20  # the norms and embeddings of a tiny model are many
    shown = command("inspect", out).out
    assert f"of {weights}" in shown
    assert "packed (params.json, packed.safetensors)" in shown


def test_a_calibration_text_changes_the_weights_and_too_short_a_one_is_refused(command, models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("maestrale, tramontana, grecale, levante, scirocco, ostro, libeccio, ponente. " * 60)
    for name, extra in (("plain", ()), ("calibrated", ("--calibrate", text))):
        run = command("quantize", models["dense"], tmp_path / name, "--weights", "int4", *extra)
        assert (run.code, run.err) == (0, "")
    plain, calibrated = ((tmp_path / name / "packed.safetensors").read_bytes() for name in ("plain", "calibrated"))
    assert len(plain) == len(calibrated)
    assert plain != calibrated
    text.write_text("too short")
    run = command("quantize", models["dense"], tmp_path / "out", "--weights", "int4", "--calibrate", text)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "expected at least" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--weights", "int3"], "int8 or int4"),
        (["--weights", "int4", "--group", "48"], "32, 64, 128"),
        (["--weights", "int4", "--head", "bf16"], "int8 or int4"),
        (["--weights", "int4", "--calibrate", "absent.txt"], "cannot read"),
    ],
)
def test_a_wrong_option_is_code_2_in_one_line(command, models, tmp_path, args, word):
    run = command("quantize", models["dense"], tmp_path / "out", *args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert word in run.err
    assert not (tmp_path / "out").exists()


def test_a_quantized_folder_is_not_quantized_again(command, models, tmp_path):
    assert command("quantize", models["dense"], tmp_path / "out", "--weights", "int8").code == 0
    run = command("quantize", tmp_path / "out", tmp_path / "again", "--weights", "int4")
    assert (run.code, run.err.count("\n")) == (3, 1)
    assert "holds quantized weights" in run.err


def test_gguf_takes_its_own_weights_option(command, models, tmp_path):
    run = command("convert", models["dense"], tmp_path / "x.gguf", "--to", "gguf")
    assert (run.code, run.err.count("\n")) == (3, 1)  # a tekken tokenizer has no place in it
    assert "SentencePiece" in run.err
    for args in (["--to", "gguf", "--dtype", "float16"], ["--to", "hf", "--weights", "q8_0"]):
        run = command("convert", models["dense"], tmp_path / "x.gguf", *args)
        assert (run.code, run.err.count("\n")) == (2, 1)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.filterwarnings("always:llama.cpp has no window")
def test_a_gguf_file_of_the_bundled_model_is_written_inspected_and_run(command, tmp_path):
    path = tmp_path / "x.gguf"
    run = command("convert", "stories", path, "--to", "gguf", "--weights", "q8_0")
    assert run.code == 0
    assert run.out.startswith(f"{path}: ")
    assert (run.err.count("\n"), "has no window" in run.err) == (1, True)
    shown = command("inspect", path)
    assert (shown.code, "GGUF" in shown.out, "of Q8_0" in shown.out) == (0, True, True)
    options = ("-p", "Once upon a time", "--max-tokens", "8", "--temperature", "0", "--backend", "torch", "--json")
    assert json.loads(command("generate", path, *options).out)["finish_reason"] == "length"
    whole = tmp_path / "whole.gguf"
    assert command("convert", "stories", whole, "--to", "gguf", "--weights", "bf16").code == 0
    texts = [json.loads(command("generate", model, *options).out)["text"] for model in (whole, "stories")]
    assert texts[0] == texts[1]
