"""The torch backend as the engine sees it: a Runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maestrale.batch import Batch, CacheLayout, Runner, StepOutput
from maestrale.checkpoint.adapter import Adapter
from maestrale.checkpoint.reader import Checkpoint
from maestrale.errors import MemoryLimitError, UsageError, first_line
from maestrale.memory import keep_freed_memory
from maestrale.torch_backend.adapters import Adapters
from maestrale.torch_backend.cache import Kernel, PagedCache
from maestrale.torch_backend.draw import Drawer
from maestrale.torch_backend.embed import embed
from maestrale.torch_backend.load import DTYPES, load_model
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import sdpa
from maestrale.torch_backend.staging import put
from maestrale.torch_backend.triton.choose import choose_kernels
from maestrale.torch_backend.watch import Watch


class TorchRunner:
    """A model, its cache and its adapters on one device. On a GPU it draws tokens itself, as logits are far to carry;
    the CPU's numpy is as fast at that as its torch."""

    def __init__(
        self,
        model: Transformer,
        layout: CacheLayout,
        kernel: Kernel = sdpa.attend,
        adapters: Sequence[Adapter] = (),
        fp8_cache: bool = False,
    ):
        weight = model.norm.weight
        self.adapters = Adapters(model, adapters) if adapters else None
        self.model, self._layout = model, layout
        self.draws, self.drawer = weight.device.type != "cpu", Drawer()
        with memory_errors():
            self.cache = PagedCache(model.config, layout, weight.dtype, weight.device, kernel, fp8_cache)

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    @property
    def depth(self) -> int:
        return 2 if self.draws else 1  # one to compute, one to be made ready

    def step(self, batch: Batch) -> StepOutput:
        return self.begin(batch)()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> Callable[[], StepOutput]:
        tokens_T = self.drawer.follow(put(batch.token_ids.copy(), self.cache.device), batch.follows)
        logits_NV, experts = compute(self.model, self.cache, self.adapters, batch, tokens_T)
        with memory_errors():
            return self.drawer.answer(logits_NV, batch.draws, experts)

    def embed(self, texts: Sequence[Sequence[int]], last: bool = False) -> Iterator[list[NDArray[np.float32]] | None]:
        with memory_errors():
            yield from embed(self.model, texts, last, self.cache.kernel, self.layout.max_chunk, self.adapters)


def compute(
    model: Transformer,
    cache: PagedCache,
    adapters: Adapters | None,
    batch: Batch,
    x_T: torch.Tensor,
    last: bool = True,
) -> tuple[torch.Tensor, NDArray[np.int16] | None]:
    """(logits [N, V], or of layers that are not the `last` hidden rows [T, dim]; the experts [N, layers, K] of the
    wanted rows, where they are asked for). x_T: token ids, or hidden rows [T, dim] of the layers before `model`'s."""
    positions_T, rows_N = put(batch.positions, cache.device), put(batch.logit_rows, cache.device)
    if adapters is not None:
        adapters.begin(batch, cache.device)
    watch = Watch(model) if batch.experts and model.config.moe else None
    with memory_errors(), watch or nullcontext():
        attend = cache.begin(batch)
        out = model(x_T, positions_T, attend, rows_N) if last else model.hidden_states(x_T, positions_T, attend)
        return out, watch.experts(rows_N) if watch else None


@contextmanager
def memory_errors() -> Iterator[None]:
    """torch's errors of this one kind, as ours. The CPU's allocator has none of its own, only words."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryLimitError(
            f"out of memory: {first_line(error)}; lower max_len, max_batch_tokens or max_sequences"
        ) from None


def open_runner(
    checkpoint: Checkpoint,
    layout: CacheLayout,
    dtype: str,
    device: str,
    progress: Callable[[int, int], None],
    adapters: Sequence[Adapter] = (),
    *,
    fp8: bool = False,
    fp8_cache: bool = False,
) -> Runner:
    """The checkpoint's model on `device` ("cpu", "cuda", "cuda:1" …), computing in `dtype` ("F32", "BF16", "F16").

    fp8: round the linear layers' weights to it. UsageError where the device has no
    kernels for that. fp8_cache: keep keys and values in it.
    """
    place, kernels = torch.device(device), choose_kernels(torch.device(device))
    if fp8 and kernels != "triton":
        raise UsageError(
            f"weights fp8: only Triton's kernels have it; {device} runs torch's: set MAESTRALE_KERNELS=triton"
        )

    def keep(name: str) -> nn.Module | None:
        if kernels != "triton" or (packed := checkpoint.packed(name)) is None:
            return None
        from maestrale.torch_backend.triton.packed import from_packed  # slow to import, and not everywhere

        return from_packed(packed, place, DTYPES[dtype])

    keep_freed_memory()
    model = load_model(checkpoint, DTYPES[dtype], place, progress, keep)
    if fp8:
        from maestrale.torch_backend.triton.packed import round_linears

        round_linears(model)
    if kernels == "triton":
        from maestrale.torch_backend.triton.runner import TritonRunner

        return TritonRunner(model, layout, adapters, fp8_cache)
    return TorchRunner(model, layout, adapters=adapters, fp8_cache=fp8_cache)
