import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import load_file

from maestrale.checkpoint import convert as convert_module
from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.errors import CheckpointError, DiskError, UsageError

KINDS = ["mistral-untied", "mixtral-untied", "mistral-tied", "mixtral-tied"]


def logits_of(folder, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_hf_to_native_to_hf_gives_the_same_bytes_and_transformers_the_same_logits(tmp_path, hf_folders, kind):
    torch = pytest.importorskip("torch")
    source = hf_folders[kind]
    convert(source, tmp_path / "native")
    assert sorted(p.name for p in (tmp_path / "native").iterdir()) == [
        "consolidated.safetensors",
        "generation_config.json",
        "params.json",
    ]
    convert(tmp_path / "native", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert torch.equal(logits_of(tmp_path / "hf", "bfloat16"), logits_of(source, "bfloat16"))
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "hf") as after:
        assert before.config == after.config


def test_native_to_hf_to_native_gives_the_same_bytes(tmp_path, native_folder, moe_params):
    source = native_folder(moe_params)
    convert(source, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "again")
    before, after = (load_file(f / "consolidated.safetensors") for f in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_large_models_are_cut_into_shards_that_transformers_loads(tmp_path, hf_folders, monkeypatch):
    torch = pytest.importorskip("torch")
    source = hf_folders["mixtral-untied"]
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 40_000)
    convert(source, tmp_path / "hf", to="hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert [p.name for p in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    stored = (source / "model.safetensors").stat().st_size
    assert 0.9 * stored < index["metadata"]["total_size"] < stored
    assert torch.equal(logits_of(tmp_path / "hf", "bfloat16"), logits_of(source, "bfloat16"))


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("bf16", "BF16"), ("float16", "F16")])
def test_a_dtype_is_stated_in_the_folder_and_equals_torchs_cast(tmp_path, hf_folders, dtype, name):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    convert(hf_folders["mistral-untied"], tmp_path / "hf", to="hf", dtype=dtype)
    expected = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[name]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    before = load_torch(hf_folders["mistral-untied"] / "model.safetensors")
    after = load_torch(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        assert torch.equal(after[tensor], before[tensor].to(expected))


def test_mixed_dtypes_stay_as_they_are_and_stand_in_the_librarys_order(tmp_path, hf_folders):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    source = tmp_path / "mixed"
    source.mkdir()
    (source / "config.json").write_text((hf_folders["mistral-untied"] / "config.json").read_text())
    tensors = load_torch(hf_folders["mistral-untied"] / "model.safetensors")
    kinds = {"norm": torch.float32, "mlp": torch.float16}
    tensors = {n: t.to(next((d for k, d in kinds.items() if k in n), t.dtype)) for n, t in tensors.items()}
    save_torch(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_tokenizer_files_go_along_and_others_do_not(tmp_path, native_folder):
    source = native_folder()
    kept = ["tokenizer.model.v3", "tekken.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*kept, "README.md", "optimizer.bin"]:
        (source / name).write_text(name)
    convert(source, tmp_path / "out", to="hf")
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {*kept, "config.json", "model.safetensors"}
    assert (tmp_path / "out" / "tekken.json").read_text() == "tekken.json"


def test_progress_ends_at_all_bytes(tmp_path, native_folder):
    source, steps = native_folder(), []
    convert(source, tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
    with open_checkpoint(source) as checkpoint:
        sizes = [checkpoint.tensor(name).data.nbytes for name in checkpoint.names()]
    assert steps == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(len(sizes))]


def test_fault_14_nan_weights_are_all_listed_and_nothing_is_written(tmp_path, native_folder, refused):
    def spoil(arrays):
        arrays["norm.weight"][0] = np.nan
        arrays["layers.0.attention.wq.weight"][1] = np.inf

    source = native_folder(change=spoil)
    with refused(CheckpointError, 3, source, "NaN or Inf", "norm.weight", "layers.0.attention.wq.weight"):
        convert(source, tmp_path / "out", to="hf")
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def test_fault_14_weights_too_large_for_float16_are_named(tmp_path, native_folder, refused):
    source = native_folder(change=lambda arrays: arrays["norm.weight"].fill(1e6))
    with refused(CheckpointError, 3, "norm.weight", "F16"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_fault_29_a_source_that_changes_meanwhile_is_refused(tmp_path, native_folder, refused):
    source = native_folder()

    def touch(done, total):
        os.utime(source / "consolidated.safetensors")

    with refused(CheckpointError, 3, "changed while it was read"):
        convert(source, tmp_path / "out", progress=touch)
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def test_fault_31_too_little_space_is_refused_before_anything_is_written(tmp_path, native_folder, refused, monkeypatch):
    source = native_folder()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with refused(DiskError, 5, "needs", "1,000 free"):
        convert(source, tmp_path / "out", progress=lambda done, total: pytest.fail("it wrote"))
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def test_fault_34_output_in_the_way_or_the_input_itself(tmp_path, native_folder, refused):
    source = native_folder()
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", source / ".." / "native"):
        with refused(UsageError, 2, same, "is the source too"):
            convert(source, same, force=True)
    convert(source, tmp_path / "out")
    with refused(UsageError, 2, tmp_path / "out", "--force"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", to="hf", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_wrong_options_are_named(tmp_path, native_folder, refused):
    with refused(UsageError, 2, "to = 'onnx'", "native, hf or gguf"):
        convert(native_folder(), tmp_path / "out", to="onnx")
    with refused(UsageError, 2, "dtype 'int8'", "bfloat16, float16, float32"):
        convert(tmp_path / "native", tmp_path / "out", dtype="int8")


SLOW = """
    import signal, sys, time
    from maestrale.checkpoint.convert import convert

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def slowly(done, total):
        print(done, flush=True)
        time.sleep(30)

    try:
        convert(sys.argv[1], sys.argv[2], progress=slowly)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "code", "left"),
    [
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, []),
        (signal.SIGKILL, -signal.SIGKILL, ["out.partial"]),
    ],
)
def test_faults_32_33_35_a_run_that_is_stopped_in_the_middle(tmp_path, native_folder, refused, number, code, left):
    source = native_folder()
    before = (source / "consolidated.safetensors").read_bytes()
    script = [sys.executable, "-c", textwrap.dedent(SLOW), source, tmp_path / "out"]
    with subprocess.Popen(script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with refused(UsageError, 2, tmp_path / "out", "another process is writing"):
            convert(source, tmp_path / "out")
        process.send_signal(number)
        assert process.wait(10) == code
    assert sorted(p.name for p in tmp_path.iterdir() if p != source) == left
    assert (source / "consolidated.safetensors").read_bytes() == before
    convert(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "out"]
    assert open_checkpoint(tmp_path / "out").names()


MEASURED = """
    import resource, sys
    from maestrale.checkpoint.convert import convert

    convert(sys.argv[1], sys.argv[2], to="hf")  # a tiny model, so that all modules are in
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(sys.argv[3], sys.argv[4], to="hf", dtype="bfloat16")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print("torch" in sys.modules)
"""


def test_memory_holds_a_few_tensors_never_the_model(tmp_path, native_folder, params):
    large = params | {"dim": 512, "hidden_dim": 2048, "n_heads": 64, "n_layers": 6}
    source, tiny = native_folder(large, name="large"), native_folder()
    size = (source / "consolidated.safetensors").stat().st_size
    largest = 512 * 2048 * 4
    assert size > 85_000_000
    arguments = [tiny, tmp_path / "a", source, tmp_path / "b"]
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURED), *arguments], capture_output=True, check=True)
    grown, torch_loaded = out.stdout.split()
    assert int(grown) * 1024 < 8 * largest < size / 2
    assert torch_loaded == b"False"


def test_the_tokenizers_ends_and_its_file_by_any_accepted_name_come_along(tmp_path, hf_folders):
    source = tmp_path / "source"
    shutil.copytree(hf_folders["mistral-untied"], source)
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    words = {"<begin>": 5, "<stop>": 7, **{f"w{i}": i for i in range(vocab_size) if i not in (5, 7)}}
    (source / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": words, "merges": []}, "added_tokens": []})
    )
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>", "eos_token": "<stop>"}))
    convert(source, tmp_path / "native", to="native")
    convert(tmp_path / "native", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 7)
    (source / "tokenizer.json").unlink()
    (source / "tekken_240911.json").write_text("{}")
    convert(source, tmp_path / "again", to="native")
    assert (tmp_path / "again" / "tekken_240911.json").exists()
