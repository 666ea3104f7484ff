"""One GPU against its own limits and against transformers: `python bench/gpu.py`.

    python bench/gpu.py [--quick] [--tiny] [--device cuda] [--only checks,ceilings,7B,8x7B,windows,theirs,bundled]

Makes random weights of Mistral 7B and Mixtral 8x7B on the device (16 and 94 GB: one after the other), checks each
kernel against the reference on fresh random inputs, measures the ceilings (bytes copied and read a second, operations
of a bf16 product), and prints each figure beside its limit and its goal, and beside transformers with a compiled static
cache in the same run. A limit is the larger of bytes / read rate and operations / product rate;
there is none where --only leaves the ceilings out.

--quick: fewer steps and batches. --tiny: small models, which with --device cpu and TRITON_INTERPRET=1 show that the
script runs; those figures mean nothing. Results, losses too, go to bench/results/gpu.json (not with --tiny).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_checks import CHECKS
from gpu_inputs import chunk_batch, decode_batch, mixed, random_int4, random_model

from maestrale.batch import CacheLayout, Runner
from maestrale.checkpoint.packed_room import is_linear
from maestrale.cli.bench import prefill_operations, step_bytes
from maestrale.config import ModelConfig, MoeConfig
from maestrale.engine.engine import Engine
from maestrale.engine.layout import make_layout
from maestrale.plan import tensor_plan
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend.runner import TorchRunner
from maestrale.torch_backend.triton.runner import TritonRunner

RESULTS = Path(__file__).parent / "results" / "gpu.json"
LARGE = ModelConfig(4096, 32, 128, 14336, 32, 8, 32000, 1e-5, 1e6, (None,) * 32)
SMALL = ModelConfig(64, 2, 16, 96, 4, 2, 128, 1e-5, 1e6, (None,) * 2)
PARTS = ("checks", "ceilings", "7B", "windows", "8x7B", "theirs", "bundled")


class Report:
    """Lines as they come, and all of them in the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, unit: str, limit: float | None = None, goal: str = "") -> None:
        share = None if limit is None else value / limit
        self.rows.append({"what": what, "value": value, "unit": unit, "limit": limit, "share": share, "goal": goal})
        beside = "" if limit is None else f"limit {_number(limit)}   {value / limit:6.1%}"
        print(f"{what:58} {_number(value)} {unit:10} {beside:34} {goal}", flush=True)


def _number(value: float) -> str:
    return f"{value:14,.1f}" if value >= 100 else f"{value:14.5f}"


class Bench:
    def __init__(self, device: torch.device, quick: bool, tiny: bool):
        self.device, self.quick, self.tiny, self.report = device, quick, tiny, Report()
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.read_rate = self.product_rate = math.inf
        self.dense = SMALL if tiny else LARGE
        self.mixture = replace(self.dense, moe=MoeConfig(4 if tiny else 8, 2))
        self.context = 40 if tiny else 1000

    def seconds(self, work: Callable[[], object], repeats: int = 0) -> float:
        """The median of several runs, after one that warms up; the device is waited for."""
        times = []
        for _ in range(1 + (repeats or (2 if self.tiny else 10))):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def checks(self) -> None:
        for name, check in CHECKS.items():
            error, allowed = check(self.device, self.tiny)
            self.report.add(f"check: {name}", error, "error", allowed, "" if error <= allowed else "WRONG")

    def ceilings(self) -> None:
        size = 1 << 20 if self.tiny else 4 << 30
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        self.report.add("copy, read and written", 2 * size / self.seconds(lambda: target.copy_(source)) / 1e9, "GB/s")
        words = source.view(torch.float32)
        rates = [size / self.seconds(work) for work in (lambda: words.sum(), lambda: words.amax())]
        self.read_rate = max(rates)
        self.report.add("read, the best of sum and max", self.read_rate / 1e9, "GB/s")
        n = 128 if self.tiny else 8192
        a, b = (torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        self.product_rate = 2 * n**3 / self.seconds(lambda: a @ b)
        self.report.add(f"product [{n}, {n}] in {self.dtype}", self.product_rate / 1e12, "TFLOP/s")

    def layout(self, config: ModelConfig, max_len: int, sequences: int, chunk: int) -> CacheLayout:
        element = torch.empty((), dtype=self.dtype).element_size()
        sizes: dict[str, Any] = {"max_chunk": chunk, "max_sequences": sequences, "element_bytes": element}
        return make_layout(config, max_len=max_len, budget=1 << 45, **sizes)

    def decode(
        self, name: str, runner: Runner, config: ModelConfig, size: int, goal: str = "", bits: float = 0
    ) -> float:
        """A step of `size` sequences with `context` tokens each in the cache, and its limit: tokens a second.

        bits: of a linear layer's weight, where it is not the model's dtype.
        """
        batch = decode_batch(config, runner.layout, size, self.context)
        seconds = self.seconds(lambda: runner.step(batch))
        element = torch.empty((), dtype=self.dtype).element_size()
        sizes = {
            name: tensor.size * (bits / 8 if bits and is_linear(name) else element)
            for name, tensor in tensor_plan(config).items()
        }
        read = step_bytes(config, size, self.context, element, sizes) / self.read_rate
        attended = 4 * size * self.context * config.n_heads * config.head_dim * config.n_layers
        operations = (prefill_operations(config, 1) * size + attended) / self.product_rate
        self.report.add(f"{name}: decode, {size} at {self.context}", size / seconds, "tokens/s",
                        size / bound if (bound := max(read, operations)) else None, goal)  # fmt: skip
        return size / seconds

    def engine(self, name: str, runner: Runner, config: ModelConfig, prompts: list[int], counts: list[int]) -> float:
        """Requests of mixed lengths through the whole engine, sampling included: tokens a second after pre-fill."""
        engine = Engine(runner, config.vocab_size, None, len(prompts), prefix_cache=False, speculate=False)
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
        self.report.add(f"{name}: engine, {len(prompts)} at once", rate, "tokens/s")
        return rate

    def batches(self) -> list[int]:
        return [1, 3] if self.tiny else [1, 64] if self.quick else [1, 64, 256]

    def family(self, name: str, config: ModelConfig, goals: dict[int, str]) -> None:
        longest, most = self.context + 256, self.batches()[-1]
        model, layout = (
            random_model(config, self.dtype, self.device),
            self.layout(config, longest, most, 8 if self.tiny else 2048),
        )
        plain = TorchRunner(model, layout)
        for size in self.batches()[:2]:
            self.decode(f"{name}, torch's kernels", plain, config, size)
        del plain
        gc.collect()
        runner = TritonRunner(model, layout)
        rates = {size: self.decode(name, runner, config, size, goals.get(size, "")) for size in self.batches()}
        for size in self.batches()[:2]:
            prompts, counts = mixed(size, self.context, 4 if self.tiny else 96)
            self.engine(name, runner, config, prompts, counts)
        if config.moe is None:
            self.prefill(name, runner, config)
            del runner
            gc.collect()
            runner = TritonRunner(random_int4(model), layout)
            for size in self.batches():
                rate = self.decode(f"{name} int4", runner, config, size, bits=4.5)
                goal = ">= 2.5" if size == 1 else ""
                self.report.add(f"{name} int4: beside its bf16, {size} at once", rate / rates[size], "times", goal=goal)

    def prefill(self, name: str, runner: Runner, config: ModelConfig) -> None:
        """Prompts of one chunk each, all in one step."""
        count, length = (2, 8) if self.tiny else (8, min(2048, runner.layout.max_len))
        batch = chunk_batch(config, runner.layout, count, length)
        seconds = self.seconds(lambda: runner.step(batch), 3)
        operations = count * prefill_operations(config, length)
        self.report.add(f"{name}: pre-fill of {count} x {length}", operations / seconds / 1e12, "TFLOP/s",
                        self.product_rate / 1e12 if math.isfinite(self.product_rate) else None, ">= 65%")  # fmt: skip

    def windows(self) -> None:
        """A long prompt with and without a window: seconds, and bytes of cache."""
        length, window, chunk = (64, 8, 8) if self.tiny else (32768, 4096, 512)
        found = []
        for sight in (None, window):
            config = replace(self.dense, n_layers=2, sliding_window=(sight,) * 2)
            layout = self.layout(config, length, 1, chunk)
            runner = TritonRunner(random_model(config, self.dtype, self.device), layout)
            batches = [chunk_batch(config, layout, 1, chunk, start) for start in range(0, length, chunk)]
            seconds = self.seconds(lambda runner=runner, batches=batches: [runner.step(b) for b in batches], 2)
            found.append((seconds, sum(pool.nbytes for pool in runner.cache.pools)))
        self.report.add(f"pre-fill of {length} with W = {window}, seconds", found[1][0], "s", found[0][0])
        self.report.add("its cache, bytes", found[1][1], "bytes", found[0][1], "an 8th")

    def bundled(self) -> None:
        """The bundled models: greedy text in fp32 as on the CPU, and bf16's logits beside the CPU's in fp32."""
        from maestrale.llm import LLM

        for name in ("stories", "stories-moe"):
            texts, logits = [], []
            for device, dtype in (("cpu", "float32"), (str(self.device), "float32"), (str(self.device), "bfloat16")):
                llm = LLM(name, device=device, dtype=dtype, backend="torch", max_len=256)
                asked = SamplingParams(max_tokens=3 if self.tiny else 64, temperature=0)
                texts.append([answer.text for answer in llm.generate(["Once upon a time", "The"], asked)])
                logits.append(llm.logits([list(range(3, 12))])[0])
                del llm
            self.report.add(
                f"{name}: greedy text in fp32 that differs", float(texts[0] != texts[1]), "texts", None, "0"
            )
            off = np.abs(logits[2] - logits[0]).max() / np.abs(logits[0]).max()
            self.report.add(f"{name}: bf16's logits off by, of the largest", float(off), "", 2**-5, "<= 100%")

    def theirs(self) -> None:
        """transformers, compiled, with a static cache, on the same shapes: all rows as long as the longest."""
        import transformers

        config, count = self.dense, 4 if self.tiny else 96
        with torch.device("meta"):
            shape = transformers.MistralConfig(
                hidden_size=config.dim, num_hidden_layers=config.n_layers, intermediate_size=config.hidden_dim,
                num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
                vocab_size=config.vocab_size, sliding_window=None, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = transformers.MistralForCausalLM(shape)
        model = model.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
        with self.device:  # its table is no parameter, so it is made anew where memory is
            model.model.rotary_emb = type(model.model.rotary_emb)(shape)
        for size in self.batches()[:2]:
            prompts, counts = mixed(size, self.context, count)
            ids = torch.randint(3, config.vocab_size, (size, max(prompts)), device=self.device)

            def run(tokens: int, ids: torch.Tensor = ids) -> None:
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                    do_sample=False, pad_token_id=0, cache_implementation="static",
                )  # fmt: skip

            whole, first = (self.seconds(partial(run, tokens), 2) for tokens in (max(counts), 1))
            seconds = whole - first
            # Only tokens that were asked for count: those of rows that had to wait for longer ones do not.
            self.report.add(f"transformers, static cache, {size} at once", (sum(counts) - size) / seconds, "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(PARTS))
    arguments = parser.parse_args()
    wanted, device = arguments.only.split(","), torch.device(arguments.device)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny runs the script itself, with TRITON_INTERPRET=1")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    bench = Bench(device, arguments.quick, arguments.tiny)
    print(f"{name}, torch {torch.__version__}\n", flush=True)
    # Order matters where memory does: nothing outlives its part.
    parts: dict[str, Callable[[], None]] = {
        "checks": bench.checks,
        "ceilings": bench.ceilings,
        "7B": lambda: bench.family("7B", bench.dense, {1: ">= 90%", 64: ">= 75%", 256: ">= 75%"}),
        "windows": bench.windows,
        "theirs": bench.theirs,
        "8x7B": lambda: bench.family("8x7B", bench.mixture, {1: ">= 80%", 64: ">= 65%"}),
        "bundled": bench.bundled,
    }
    for part, run in parts.items():
        if part in wanted:
            with torch.inference_mode():
                run()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    facts = {"device": name, "torch": torch.__version__, "quick": arguments.quick, "rows": bench.report.rows}
    if not arguments.tiny:
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
