"""Tiny model folders, written by the safetensors library and by transformers, never by our own writer."""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from maestrale.config import ModelConfig
from maestrale.errors import MaestraleError
from maestrale.plan import tensor_plan

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 10000.0,
}
MOE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}


@pytest.fixture
def params() -> dict:
    return dict(PARAMS)


@pytest.fixture
def moe_params() -> dict:
    return PARAMS | MOE


@pytest.fixture
def weights() -> Callable[[dict], dict[str, np.ndarray]]:
    """params.json's values → random float32 weights by canonical name."""

    def make(values: dict) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        plan = tensor_plan(ModelConfig.from_mistral(values))
        return {name: rng.standard_normal(t.shape, np.float32) for name, t in plan.items()}

    return make


@pytest.fixture
def native_folder(tmp_path, params, weights) -> Callable[..., Path]:
    """Writes params.json and consolidated.safetensors; `change` may edit the weights before."""

    def make(values: dict | None = None, change: Callable[[dict], object] = lambda w: None, name="native") -> Path:
        values = values or params
        folder = tmp_path / name
        folder.mkdir()
        arrays = weights(values)
        change(arrays)
        (folder / "params.json").write_text(json.dumps(values))
        save_file(arrays, folder / "consolidated.safetensors")
        return folder

    return make


@pytest.fixture
def raw_file(tmp_path) -> Callable[..., Path]:
    """A .safetensors file of any header (an object, or bytes) and data."""

    def make(header: object, data: bytes = b"", name="x.safetensors") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    return make


@pytest.fixture
def refused() -> Callable:
    """A context that must raise `kind` with its exit code and, in one line, all of `words`."""

    @contextmanager
    def check(kind: type[MaestraleError], exit_code: int, *words: object) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is kind
        assert caught.value.exit_code == exit_code
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    return check


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory) -> dict[str, Path]:
    """Random models written by transformers' save_pretrained, in bfloat16, one shard each."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hf")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "sliding_window": None,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-5,
    }
    folders = {}
    for tied in (False, True):
        dense = transformers.MistralConfig(**sizes, tie_word_embeddings=tied)
        mixture = transformers.MixtralConfig(**sizes, num_local_experts=4, tie_word_embeddings=tied)
        for kind, model in (
            ("mistral", transformers.MistralForCausalLM(dense)),
            ("mixtral", transformers.MixtralForCausalLM(mixture)),
        ):
            folder = root / f"{kind}-{'tied' if tied else 'untied'}"
            model.to(torch.bfloat16).save_pretrained(folder)
            folders[folder.name] = folder
    return folders
