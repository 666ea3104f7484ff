"""The parts of bench/gpu.py that run in this process: checks, ceilings, decoding, pre-fill, windows, bundled models.

A limit is the larger of bytes / read rate and operations / product rate, both as measured here; a decode's is that of
its products and that of its attention together, since in every layer one waits for the other.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_checks import CHECKS
from gpu_inputs import chunk_batch, decode_batch, mixed, random_int4, random_model
from gpu_report import Report

from maestrale.batch import Asynchronous, CacheLayout, Runner
from maestrale.checkpoint.packed_room import is_linear
from maestrale.cli.limits import prefill_operations, step_bytes
from maestrale.config import ModelConfig, MoeConfig
from maestrale.engine.engine import Engine
from maestrale.engine.layout import make_layout
from maestrale.plan import cache_bytes, tensor_plan
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import reference
from maestrale.torch_backend.runner import TorchRunner
from maestrale.torch_backend.triton.attention import attend
from maestrale.torch_backend.triton.choose import VARIABLE
from maestrale.torch_backend.triton.packed import round_linears
from maestrale.torch_backend.triton.runner import TritonRunner
from maestrale.torch_backend.triton.tiles import Tiles, deal

LARGE = ModelConfig(4096, 32, 128, 14336, 32, 8, 32000, 1e-5, 1e6, (None,) * 32)
SMALL = ModelConfig(64, 2, 16, 96, 4, 2, 128, 1e-5, 1e6, (None,) * 2)


class Bench:
    def __init__(self, device: torch.device, quick: bool, tiny: bool, report: Report):
        self.device, self.tiny, self.report = device, tiny, report
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.element = torch.empty((), dtype=self.dtype).element_size()
        self.read_rate = self.product_rate = math.inf
        self.dense = SMALL if tiny else LARGE
        self.mixture = replace(self.dense, moe=MoeConfig(4 if tiny else 8, 2))
        self.context, self.sizes = 40 if tiny else 1000, [1, 3] if tiny else [1, 64] if quick else [1, 64, 256]

    def seconds(self, work: Callable[[], object], repeats: int = 0) -> float:
        """The median of several runs, after one that warms up; the device is waited for."""
        times = []
        for _ in range(1 + (repeats or (1 if self.tiny else 10))):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checks(self) -> None:
        """Each kernel; one that does not even run is infinitely wrong, and the others are still checked."""
        for name, check in CHECKS.items():
            try:
                error, allowed = check(self.device, self.tiny)
            except Exception as problem:  # of Triton's compiler, of the driver: whatever it is, it is told
                print(f"  {name}: {type(problem).__name__}: {str(problem)[:2000]}", flush=True)
                error, allowed = math.inf, 1.0
            self.report.add(name, error, "error", allowed, most=1)

    def ceilings(self) -> None:
        size = 1 << 20 if self.tiny else 4 << 30
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        copied = 2 * size / self.seconds(lambda: target.copy_(source))
        self.report.add("copy, read and written", copied / 1e9, "GB/s")
        words = source.view(torch.float32)
        read = max(size / self.seconds(work) for work in (lambda: words.sum(), lambda: words.amax()))
        self.report.add("read, the best of sum and max", read / 1e9, "GB/s")
        self.read_rate = max(copied, read)
        n = 128 if self.tiny else 8192
        a, b = (torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        self.product_rate = 2 * n**3 / self.seconds(lambda: a @ b)
        self.report.add(f"product [{n}, {n}] in {self.dtype}", self.product_rate / 1e12, "TFLOP/s")

    def runner(self, model: Transformer, layout: CacheLayout, fp8_cache: bool = False) -> TritonRunner:
        """Its cache filled, so that what is read is numbers."""
        runner = TritonRunner(model, layout, fp8_cache=fp8_cache)
        for pool in runner.cache.pools:
            for part in pool.flatten(0, 1):
                part.copy_(torch.randn(part.shape, dtype=self.dtype, device=self.device))
        return runner

    def layout(self, config: ModelConfig, max_len: int, sequences: int, chunk: int) -> CacheLayout:
        sizes: dict[str, Any] = {"max_chunk": chunk, "max_sequences": sequences, "element_bytes": self.element}
        return make_layout(config, max_len=max_len, budget=1 << 45, **sizes)

    def decode(
        self,
        name: str,
        runner: Asynchronous,
        config: ModelConfig,
        size: int,
        least: float | None = None,
        bits: float = 0,
        cache: float = 0,
    ) -> float:
        """A step of `size` sequences with `context` tokens each in the cache: tokens a second. bits: of a linear
        layer's weight, cache: bytes of a number in it, where they are not the model's dtype's."""
        batch = decode_batch(config, runner.layout, size, self.context)
        count = 2 if self.tiny else 8

        def several() -> None:
            waiting = runner.begin(batch)
            for _ in range(count - 1):
                following = runner.begin(batch)  # while the one before runs, as the engine does
                waiting()
                waiting = following
            waiting()

        seconds = self.seconds(several) / count
        sizes = {
            name: tensor.size * (bits / 8 if bits and is_linear(name) else self.element)
            for name, tensor in tensor_plan(config).items()
        }
        weights = step_bytes(config, size, 0, 0, sizes) / self.read_rate
        products = max(weights, prefill_operations(config, 1) * size / self.product_rate)
        attended = 4 * size * self.context * config.n_heads * config.head_dim * config.n_layers / self.product_rate
        kept = size * cache_bytes(config, self.context, cache or self.element) / self.read_rate
        limit = size / (products + max(kept, attended))
        self.report.add(f"{name}: decode, {size} at {self.context}", size / seconds, "tokens/s", limit, least)
        return size / seconds

    def engine(self, name: str, runner: Runner, config: ModelConfig, size: int) -> None:
        """Requests of mixed lengths through the whole engine, sampling included: tokens a second after pre-fill. The
        first of two rounds compiles and captures what its sizes need."""
        prompts, counts = mixed(size, self.context, 4 if self.tiny else 96)
        rate = 0.0
        for _ in range(2):
            engine = Engine(runner, config.vocab_size, None, size, prefix_cache=False, speculate=False)
            for i, (length, count) in enumerate(zip(prompts, counts, strict=True)):
                ids = np.random.default_rng(i).integers(3, config.vocab_size, length).tolist()
                engine.submit(ids, SamplingParams(max_tokens=count, temperature=0))
            while engine.scheduler.waiting or any(s.pending > 1 for r in engine.scheduler.running for s in r.sequences):
                engine.step()
            self.wait()
            start, before = time.perf_counter(), engine.tokens_out
            while engine.has_work:
                engine.step()
            rate = (engine.tokens_out - before) / (time.perf_counter() - start)
        self.report.add(f"{name}: engine, {size} at once", rate, "tokens/s")

    def family(self, name: str, config: ModelConfig, least: dict[int, float], sizes: list[int]) -> None:
        """Decoding by torch's operations and by these kernels, the engine; pre-fill, or of a mixture int4."""
        model = random_model(config, self.dtype, self.device)
        layout = self.layout(config, self.context + 128, sizes[-1], 8 if self.tiny else 2048)
        runner: Asynchronous = TorchRunner(model, layout)
        for size in sizes[:2]:
            self.decode(f"{name}, torch's kernels", runner, config, size)
        del runner
        self.clear()
        runner = self.runner(model, layout)
        for size in sizes:
            self.decode(name, runner, config, size, least.get(size))
        for size in sizes[:2]:
            self.engine(name, runner, config, size)
        del runner
        self.clear()
        if config.moe is None:
            self.prefill(name, model, config)
            return
        runner = self.runner(random_int4(model), layout)
        for size in sizes:
            self.decode(f"{name} int4", runner, config, size, bits=4.5)

    def prefill(self, name: str, model: Transformer, config: ModelConfig) -> None:
        """Prompts of one chunk each, all in one step."""
        count, length = (2, 8) if self.tiny else (8, 2048)
        runner = TritonRunner(model, self.layout(config, length, count, length))
        batch = chunk_batch(config, runner.layout, count, length)
        rate = count * prefill_operations(config, length) / self.seconds(lambda: runner.step(batch), 3)
        self.report.add(
            f"{name}: pre-fill of {count} x {length}", rate / 1e12, "TFLOP/s", self.product_rate / 1e12, 0.65
        )

    def packed(self) -> None:
        """7B with an fp8 cache, and with fp8 and int4 weights, beside bf16."""
        config, layout = self.dense, self.layout(self.dense, self.context + 1, self.sizes[-1], 8)
        model = random_model(config, self.dtype, self.device)
        runner = self.runner(model, layout)
        whole = {size: self.decode("7B", runner, config, size) for size in self.sizes}
        del runner
        self.clear()
        runner = self.runner(model, layout, fp8_cache=True)
        for size in self.sizes:
            rate = self.decode("7B, fp8 cache", runner, config, size, cache=1)
            self.report.add(f"7B, fp8 cache: beside whole, {size} at once", rate / whole[size], "times")
        for form, bits in (("fp8", 8.0), ("int4", 4.5)):
            del runner
            self.clear()
            if form == "fp8":
                round_linears(model)
            else:
                del model
                self.clear()
                model = random_int4(random_model(config, self.dtype, self.device))
            runner = self.runner(model, layout)
            for size in self.sizes:
                rate = self.decode(f"7B {form}", runner, config, size, bits=bits)
                least = 2.5 if form == "int4" and size == 1 else None
                self.report.add(f"7B {form}: beside whole, {size} at once", rate / whole[size], "times", least=least)

    def windows(self) -> None:
        """A long prompt's attention with and without a window: seconds of one layer, and bytes of cache."""
        length, window, chunk = (64, 8, 8) if self.tiny else (32768, 4096, 512)
        H, G, C = self.dense.n_heads, self.dense.n_kv_heads, self.dense.head_dim
        times, bytes_kept = [], []
        for sight in (None, window):
            config = replace(self.dense, n_layers=1, sliding_window=(sight,))
            layout = self.layout(config, length, 1, chunk)
            cache = PagedCache(config, layout, self.dtype, self.device, reference.attend)
            cache.pools[0].normal_()
            q = torch.randn(chunk, H, C, dtype=self.dtype, device=self.device)
            table = torch.arange(layout.rings[0], dtype=torch.int32, device=self.device)[None]
            tiles = deal(np.array([0, chunk]), H, G, self.device)
            every = torch.arange(length, dtype=torch.int32, device=self.device)

            def work(
                cache: PagedCache = cache,
                q: torch.Tensor = q,
                table: torch.Tensor = table,
                tiles: Tiles = tiles,
                every: torch.Tensor = every,
                sight: int | None = sight,
            ) -> None:
                k, v = cache.pools[0][:, 0]
                for positions in every.split(chunk):
                    attend(q, k, v, positions, table, tiles, cache.layout.page_size, sight)

            times.append(self.seconds(work, 3))
            bytes_kept.append(cache.pools[0].nbytes)
            pairs = sum(min(i + 1, sight or length) for i in range(length))
            rate = 4 * pairs * H * C / times[-1]
            what = f"attention of {length}, W = {sight}, chunks of {chunk}"
            self.report.add(what, rate / 1e12, "TFLOP/s", self.product_rate / 1e12)
        self.report.add(f"attention of {length} with W = {window}", times[0] / times[1], "times", least=1.8)
        self.report.add("its cache, smaller", bytes_kept[0] / bytes_kept[1], "times", least=8)

    def bundled(self) -> None:
        """The bundled models: greedy text in fp32 as on the CPU, and bf16's logits beside the CPU's in fp32."""
        from maestrale.llm import LLM

        ways = {
            "the CPU's": ("cpu", "float32", "torch"),
            "torch's kernels": (str(self.device), "float32", "torch"),
            "Triton's": (str(self.device), "float32", "triton"),
            "Triton's in bf16": (str(self.device), "bfloat16", "triton"),
        }
        for name in ("stories", "stories-moe"):
            texts, logits = {}, {}
            for way, (device, dtype, kernels) in ways.items():
                os.environ[VARIABLE] = kernels
                llm = LLM(name, device=device, dtype=dtype, backend="torch", max_len=256)
                asked = SamplingParams(max_tokens=2 if self.tiny else 64, temperature=0)
                texts[way] = [answer.text for answer in llm.generate(["Once upon a time", "The"], asked)]
                logits[way] = llm.logits([list(range(3, 12))])[0]
                del llm
                self.clear()
            first, *others = ways
            for way in others[:2]:
                self.report.add(f"{name}: {way} greedy text differs", float(texts[way] != texts[first]), "", most=0)
            off = np.abs(logits["Triton's in bf16"] - logits[first]).max() / np.abs(logits[first]).max()
            self.report.add(f"{name}: bf16's logits off by, of the largest", float(off), "", 2**-5, most=1)
