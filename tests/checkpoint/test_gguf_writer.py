"""GGUF files that we write, as the format's own package and llama.cpp read them."""

import json
import os
import subprocess
import warnings
from importlib import resources
from pathlib import Path

import gguf as library
import numpy as np
import pytest
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor

from maestrale.checkpoint.classifier import write_classifier
from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.gguf_vocab import from_file, from_gguf, to_file
from maestrale.checkpoint.gguf_writer import convert_to_gguf
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError, ConfigError, DiskError, UsageError
from maestrale.launch import BUNDLED
from maestrale.plan import tensor_plan
from maestrale.text.tokenizer import load_tokenizer

TEXTS = [
    "Once upon a time there lived a king.",
    "  two  spaces, a tab\tand\n\n\n\nlines\n \"quoted\" é ☃ 🙂 ",
    "</s><s>[INST] no control token [/INST]",
    "",
]  # fmt: skip
LLAMA = os.environ.get("LLAMA_CPP_PYTHON")
needs_llama = pytest.mark.skipif(
    not LLAMA, reason="LLAMA_CPP_PYTHON does not name a Python that has llama-cpp-python (pip builds it with cmake)"
)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "llama.cpp has no window")
        yield


@pytest.fixture(scope="module", params=["stories", "stories-moe"])
def model(request):
    return BUNDLED / request.param


def vocabulary_files():
    data = resources.files("mistral_common") / "data"
    return sorted(str(path) for path in data.iterdir() if ".model" in path.name and "240216" not in path.name)


def values_of(reader):
    """Header key → value, by the library."""
    return {key: field.contents() for key, field in reader.fields.items()}


@pytest.mark.parametrize("weights", ["bf16", "q8_0", "q4_0"])
def test_the_library_reads_what_was_written(tmp_path, model, weights):
    path = tmp_path / "x.gguf"
    convert_to_gguf(model, path, weights)
    reader, values = library.GGUFReader(path), values_of(library.GGUFReader(path))
    config = ModelConfig.from_mistral(json.loads((model / "params.json").read_text()))
    assert values["general.architecture"] == "llama"
    assert values["general.file_type"] == getattr(library.LlamaFileType, f"MOSTLY_{weights.upper()}")
    assert values["llama.embedding_length"] == config.dim
    assert values["llama.attention.head_count_kv"] == config.n_kv_heads
    assert values.get("llama.expert_used_count") == (config.moe and config.moe.num_experts_per_tok)
    assert len(values["tokenizer.ggml.tokens"]) == config.vocab_size
    found = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(model) as source, open_checkpoint(path) as again:
        assert again.config == source.config
        stored = (source.tensor("layers.1.attention.wk.weight").array.astype(np.uint32) << 16).view(np.float32)
        wk = found["blk.1.attn_k.weight"]
        read = library.quants.dequantize(wk.data, wk.tensor_type)
        np.testing.assert_array_equal(
            again.tensor("layers.1.attention.wk.weight").array, read
        ) if weights != "bf16" else (np.testing.assert_array_equal(read, stored))
        assert (
            np.abs(read - stored).max()
            <= {"bf16": 0, "q8_0": 0.005, "q4_0": 0.08}[weights] * np.abs(stored).max() * 1.5
        )
        assert found["blk.0.attn_norm.weight"].tensor_type == library.GGMLQuantizationType.F32
        assert found["token_embd.weight"].tensor_type.name == ("BF16" if weights == "bf16" else "Q8_0")


def test_int4_weights_go_over_as_they_are(tmp_path, model):
    quantize(model, tmp_path / "packed", Recipe("int4", head="int8"), round_to_nearest)
    convert_to_gguf(tmp_path / "packed", tmp_path / "x.gguf", "q4_0")
    with open_checkpoint(tmp_path / "packed") as packed, open_checkpoint(tmp_path / "x.gguf") as written:
        for name in packed.names():
            if packed.is_packed(name) and name != "output.weight":
                before, after = packed.packed(name), written.packed(name)
                for part, array in before.parts.items():
                    np.testing.assert_array_equal(after.parts[part], array)


def test_gguf_to_native_brings_the_weights_and_the_tokenizer_back(tmp_path, model):
    convert_to_gguf(model, tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "native", dtype="bfloat16")
    with open_checkpoint(model) as before, open_checkpoint(tmp_path / "native") as after:
        assert before.config == after.config
        for name in before.names():
            np.testing.assert_array_equal(before.tensor(name).array, after.tensor(name).array)
    ours, back = (load_tokenizer(folder, before.config.vocab_size) for folder in (model, tmp_path / "native"))
    for text in TEXTS:
        assert back.encode(text) == ours.encode(text)
        assert back.decode(back.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("path", vocabulary_files(), ids=lambda path: path.rpartition(".model.")[2])
def test_a_vocabulary_survives_the_way_through_a_header(tmp_path, params, path):
    """Every id has its text again, and every text its ids, by the SentencePiece library."""
    theirs = SentencePieceProcessor(model_file=path)
    source = tmp_path / "source"
    source.mkdir()
    vocab = theirs.get_piece_size()
    values = params | {"vocab_size": vocab, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "head_dim": 4}
    (source / "params.json").write_text(json.dumps(values | {"n_kv_heads": 1}))
    (source / f"tokenizer.model.{path.rpartition('.')[2]}").write_bytes(Path(path).read_bytes())
    plan = tensor_plan(ModelConfig.from_mistral(values | {"n_kv_heads": 1}))
    save_file({n: np.zeros(t.shape, np.float32) for n, t in plan.items()}, source / "consolidated.safetensors")
    convert_to_gguf(source, tmp_path / "x.gguf")
    ours = SentencePieceProcessor(model_proto=to_file(from_gguf(tmp_path / "x.gguf")))
    ids = list(range(vocab))
    assert ours.id_to_piece(ids) == theirs.id_to_piece(ids)
    for question in ("IsControl", "IsByte", "IsUnknown"):
        assert [getattr(ours, question)(i) for i in ids] == [getattr(theirs, question)(i) for i in ids]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id(), ours.eos_id(), ours.unk_id()) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())


@pytest.mark.parametrize("cut", [1, 100, 5000, -1])
def test_a_damaged_vocabulary_is_refused(model, refused, cut):
    path = model / "tokenizer.model"
    with refused(CheckpointError, 3, path, "damaged"):
        from_file(path.read_bytes()[:cut], path)


def test_a_vocabulary_whose_scores_are_no_floats_is_refused(tmp_path, refused):
    piece = bytes([0x0A, 1, ord("a"), 0x10, 5])  # field 1: "a"; field 2, the score, as a varint
    with refused(CheckpointError, 3, tmp_path / "tokenizer.model", "damaged"):
        from_file(bytes([0x0A, len(piece)]) + piece, tmp_path / "tokenizer.model")


def asked(path, prompts, count):
    """Ids of each prompt and the `count` likeliest tokens after it, by llama.cpp."""
    script = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False)
answers = []
for prompt in json.loads(sys.argv[2]):
    ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
    model.reset()
    tokens = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    answers.append([ids, [next(tokens) for _ in range(int(sys.argv[3]))]])
print(json.dumps(answers))
"""
    command = [LLAMA, "-c", script, path, json.dumps(prompts), str(count)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@needs_llama
@pytest.mark.parametrize(("weights", "count"), [("bf16", 30), ("q8_0", 10), ("q4_0", 10)])
def test_llama_cpp_cuts_text_alike_and_goes_on_alike(tmp_path, model, weights, count):
    """It rounds activations to 8 bits where weights are quantized, so there the first tokens only are compared."""
    from maestrale import LLM, SamplingParams

    path, prompts = tmp_path / "x.gguf", ["Once upon a time", "The old king said", TEXTS[1]]
    convert_to_gguf(model, path, weights)
    llm = LLM(path, dtype="float32", max_len=256, backend="torch")
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    for prompt, (ids, tokens) in zip(prompts, asked(path, prompts, count), strict=True):
        assert llm.tokenizer.encode(prompt) == ids
        if prompt is not TEXTS[1]:
            assert llm.generate([ids], params)[0].token_ids == tokens


def test_wrong_options_and_targets_are_named(tmp_path, model, refused, monkeypatch):
    with refused(UsageError, 2, "weights 'q5_0'", "bf16, q8_0, q4_0"):
        convert_to_gguf(model, tmp_path / "x.gguf", "q5_0")
    with refused(UsageError, 2, "ends in .gguf"):
        convert_to_gguf(model, tmp_path / "folder")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with refused(UsageError, 2, "--force"):
        convert_to_gguf(model, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    convert_to_gguf(model, tmp_path / "x.gguf", force=True)
    with refused(UsageError, 2, "is the source too"):
        convert_to_gguf(tmp_path / "x.gguf", tmp_path / "x.gguf", force=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with refused(DiskError, 5, "needs"):
        convert_to_gguf(model, tmp_path / "y.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_models_that_the_format_has_no_words_for_are_refused(tmp_path, native_folder, params, refused):
    mixed = native_folder(params | {"sliding_window": [None, 4]})
    (mixed / "tokenizer.model").write_bytes((BUNDLED / "stories" / "tokenizer.model").read_bytes())
    with refused(ConfigError, 3, "windows differ"):
        convert_to_gguf(mixed, tmp_path / "x.gguf")
    with refused(CheckpointError, 3, "no tokenizer"):
        convert_to_gguf(native_folder(name="bare"), tmp_path / "x.gguf")
    classifier = native_folder(name="classifier")
    write_classifier(classifier, ["no", "yes"], np.ones((2, 64), np.float32))
    with refused(UsageError, 2, "a classifier, and GGUF has no words for its classes"):
        convert_to_gguf(classifier, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_weights_with_nan_are_named_and_nothing_is_written(tmp_path, native_folder, params, refused):
    def spoil(arrays):
        arrays["layers.1.attention.wv.weight"][1, 1] = np.inf

    source = native_folder(params | {"vocab_size": 4096}, change=spoil)
    (source / "tokenizer.model").write_bytes((BUNDLED / "stories" / "tokenizer.model").read_bytes())
    with refused(CheckpointError, 3, "NaN or Inf in layers.1.attention.wv.weight"):
        convert_to_gguf(source, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["native"]
