"""The torch backend's step by these kernels; a Runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.checkpoint.adapter import Adapter
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.runner import TorchRunner, memory_errors
from maestrale.torch_backend.staging import put
from maestrale.torch_backend.triton.model import FusedTransformer, Step
from maestrale.torch_backend.triton.steps import SIZES, DecodeStep, is_decode, make_step


class TritonRunner:
    """A model and its cache on one device. What these kernels do not do (adapters, the experts of a row, a text as one
    vector) goes through a TorchRunner on the same weights and the same cache."""

    def __init__(
        self, model: Transformer, layout: CacheLayout, adapters: Sequence[Adapter] = (), fp8_cache: bool = False
    ):
        with memory_errors():
            self._fused = FusedTransformer(model)
        self._plain = TorchRunner(model, layout, adapters=adapters, fp8_cache=fp8_cache)
        self.model, self.cache, self._decodes = model, self._plain.cache, dict[int, DecodeStep]()
        device = self.cache.device
        gpu = device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if gpu else None
        self._here: AbstractContextManager = (
            torch.cuda.device(device) if gpu else nullcontext()
        )  # triton launches on the current device

    @property
    def draws(self) -> bool:
        return self._plain.draws

    @property
    def depth(self) -> int:
        return self._plain.depth

    @property
    def layout(self) -> CacheLayout:
        return self._plain.layout

    def step(self, batch: Batch) -> StepOutput:
        return self.begin(batch)()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> Callable[[], StepOutput]:
        if batch.experts or batch.adapters is not None:
            return self._plain.begin(batch)
        drawer, device = self._plain.drawer, self.cache.device
        with memory_errors(), self._here:
            for kind, copies in enumerate(batch.copies):
                self.cache.copy_pages(kind, copies)
            if is_decode(batch):
                logits_NV = self._decode(batch)
                if len(batch.logit_rows) < len(logits_NV):  # they ascend, so as many are all in order
                    logits_NV = logits_NV[put(batch.logit_rows, device)]
            else:
                config = self._fused.config
                logits_NV = self._work(make_step(batch, config.n_heads, config.n_kv_heads, device, drawer))
            return drawer.answer(logits_NV, batch.draws)

    def embed(self, texts: Sequence[Sequence[int]], last: bool = False) -> Iterator[list[NDArray[np.float32]] | None]:
        return self._plain.embed(texts, last)

    def _decode(self, batch: Batch) -> torch.Tensor:
        size = next(size for size in SIZES if size >= len(batch.token_ids))
        if size not in self._decodes:
            self._decodes[size] = DecodeStep(
                size,
                self.layout,
                self._fused.config.n_kv_heads,
                self.cache.device,
                self._work,
                self._plain.drawer,
                self._memory,
            )
        return self._decodes[size].run(batch)

    def _work(self, step: Step) -> torch.Tensor:
        return self._fused.logits(step, self.cache)
