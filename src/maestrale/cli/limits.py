"""What bounds a model's speed: what this machine can do at most, and what a pre-fill or a decode step must do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from maestrale.config import ModelConfig
from maestrale.plan import cache_bytes, count_parameters, tensor_plan
from maestrale.threads import choose_threads

if TYPE_CHECKING:
    import torch

    from maestrale.launch import Launched


def machine_limits(launched: Launched, threads: int | None) -> dict[str, float]:
    """Bytes read a second, and operations of a matrix product (a multiplication and an addition are two): by the
    backend's own kernels with the model's weights, or by torch in what the model computes in."""
    if launched.backend != "native":
        from maestrale.checkpoint.dtypes import TORCH_NAMES

        return _torch_limits(launched.device, TORCH_NAMES[launched.dtype])
    from maestrale.native_backend.limits import multiply_rate, read_rate

    name = "layers.0.attention.wq.weight"
    bits = 8 * launched.tensor_bytes[name] / tensor_plan(launched.config)[name].size
    weights = "f32" if bits > 16 else "bf16" if bits > 12 else "int8" if bits > 7 else "int4"
    count = choose_threads(threads)
    rate = multiply_rate(count, weights)
    return {"read_bytes_per_second": read_rate(count), "matmul_operations_per_second": rate}


def _torch_limits(place: str, dtype: str) -> dict[str, float]:
    """The best of several runs, over 512 MiB."""
    import torch

    device = torch.device(place)

    def best(run: Callable[[], torch.Tensor], work: float) -> float:
        def seconds() -> float:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        return work / min(seconds() for _ in range(8))

    memory = torch.ones(1 << 27, device=device)
    extent = 2048 if device.type == "cpu" else 8192
    matrix = torch.ones(extent, extent, dtype=getattr(torch, dtype), device=device)
    return {
        "read_bytes_per_second": best(memory.sum, memory.nbytes),
        "matmul_operations_per_second": best(lambda: matrix @ matrix.T, 2 * extent**3),
    }


def prefill_operations(config: ModelConfig, length: int) -> int:
    """Additions and multiplications of a prompt: two for each weight a token meets, the output layer once, and two
    products for each visible pair of query and key."""
    _, active = count_parameters(config)
    tables = config.vocab_size * config.dim
    weights = 2 * length * (active - tables * (1 if config.tied_embeddings else 2)) + 2 * tables
    pairs = sum(sum(min(i + 1, window or length) for i in range(length)) for window in config.sliding_window)
    return weights + 4 * pairs * config.n_heads * config.head_dim


def step_bytes(
    config: ModelConfig, size: int, length: int, element_bytes: float, tensor_bytes: Mapping[str, float] | None = None
) -> int:
    """Bytes that a decode step of `size` sequences of `length` tokens must read: weights and cache.

    element_bytes: of the cache, and of the weights where `tensor_bytes` does not say what each takes.
    Of a mixture's E experts, those that an even router would choose for so many tokens: E * (1 - (1 - K / E)^size).
    """
    weights = 0.0
    sizes = tensor_bytes or {name: tensor.size * element_bytes for name, tensor in tensor_plan(config).items()}
    for name, size_of in sizes.items():
        if name == "tok_embeddings.weight" and (not config.tied_embeddings or "output.weight" in sizes):
            continue  # a row for each sequence: nothing
        chosen = 1.0
        if config.moe and ".experts." in name:
            chosen -= (1 - config.moe.num_experts_per_tok / config.moe.num_experts) ** size
        weights += chosen * size_of
    return round(weights) + size * cache_bytes(config, length, element_bytes)
