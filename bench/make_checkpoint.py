"""Random checkpoints in the shapes that the benchmark measures: `python bench/make_checkpoint.py S DST`.

A speed does not depend on what a weight says, so all tensors are cut from one block of 2^24 bfloat16 numbers drawn
from a normal distribution of deviation 0.02, each from a place of its own; norms are 1. Activations stay finite.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.checkpoint.writer import save_checkpoint
from maestrale.config import ModelConfig, MoeConfig
from maestrale.plan import count_parameters, tensor_plan

CHECKPOINTS = Path(__file__).parent / "checkpoints"
_BLOCK = 1 << 24
_ONE = 0x3F80  # 1.0 in bfloat16
V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
_V3_SIZE = 32768  # tokens; V1 has 32000


def _shape(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    experts: int = 0,
    vocab_size: int = 32000,
) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=(None,) * n_layers,
        moe=MoeConfig(experts, 2) if experts else None,
    )


SHAPES = {
    "S": _shape(768, 12, 12, 4, 2048),
    "D": _shape(4096, 8, 32, 8, 14336),  # the layers of Mistral 7B, a quarter of them
    "M": _shape(2048, 8, 16, 4, 5632, experts=8),
    "7B": _shape(4096, 32, 32, 8, 14336),
    "T": _shape(256, 6, 4, 2, 640, vocab_size=_V3_SIZE),  # little to compute, and a tokenizer with tools
}


def make_checkpoint(config: ModelConfig, folder: Path, seed: int = 0) -> None:
    """Writes a native folder with a tokenizer, that of v0.3 where the vocabulary is its; one tensor at a time is in
    memory."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    block = cast(StoredTensor.from_array(values, "F32"), "BF16").array

    def tensor(shape: tuple[int, ...]) -> StoredTensor:
        if len(shape) == 1:
            return StoredTensor.from_array(np.full(shape, _ONE, np.uint16), "BF16")
        start = int(draw.integers(_BLOCK))
        return StoredTensor.from_array(np.resize(np.roll(block, -start), shape), "BF16")

    shapes = {name: planned.shape for name, planned in tensor_plan(config).items()}
    tensors = {name: (lambda shape=shape: tensor(shape)) for name, shape in shapes.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, config, tensors)
    if config.vocab_size == _V3_SIZE:
        (folder / "tokenizer.model.v3").write_bytes(packaged(V3).read_bytes())
    else:
        (folder / "tokenizer.model").write_bytes(packaged(V1).read_bytes())


def packaged(name: str) -> Path:
    """A SentencePiece model that comes inside the mistral-common package."""
    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        raise SystemExit("mistral-common is not installed: run  pip install maestrale")
    return Path(package.origin).parent / "data" / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, nargs="?", help="default: bench/checkpoints/SHAPE")
    chosen = parser.parse_args()
    folder = chosen.folder or CHECKPOINTS / chosen.shape
    make_checkpoint(SHAPES[chosen.shape], folder)
    print(f"{folder}: {count_parameters(SHAPES[chosen.shape])[0]:,} parameters")


if __name__ == "__main__":
    main()
