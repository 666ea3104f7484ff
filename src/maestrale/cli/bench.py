"""`maestrale bench`: how fast a model runs here, and what share of the machine's limits that is."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.declare import Option
from maestrale.cli.limits import machine_limits, prefill_operations, step_bytes
from maestrale.errors import UsageError
from maestrale.memory import peak_memory

if TYPE_CHECKING:
    from maestrale.launch import Launched

CONTEXT = 128  # tokens of each sequence before its decoding is measured
_LARGEST_BATCH = 256  # pre-fill of that many still goes on beside decoding in steps of 512 tokens


def bench(
    running: opt.Running,
    path: opt.Model = None,
    prompt_tokens: Annotated[int, Option(help="Tokens of the prompt whose pre-fill is measured.")] = 512,
    decode_tokens: Annotated[int, Option(help="Steps of decoding in one measurement.")] = 32,
    batch: Annotated[str, Option(help="Sequences decoded at once, one measurement for each.")] = "1,8,16",
    repeats: Annotated[int, Option(help="Measurements of each kind, after one that warms up.")] = 5,
    json: opt.Json = False,
) -> None:
    """Measure pre-fill, decoding and memory.

    And the share reached of what the machine can do; over several ranks the share of the time in which each computes,
    and its memory. Decoding starts after 128 tokens of each sequence. The last line is JSON; with --json it is the only
    one.
    """
    from maestrale.checkpoint.dtypes import TORCH_NAMES
    from maestrale.choices import kernels_here

    sizes = read_sizes(batch)
    for name, value in (("prompt-tokens", prompt_tokens), ("decode-tokens", decode_tokens), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"--{name} {value}: expected a whole number of at least 1")
    start = time.perf_counter()
    with opt.progress_line("loading") as progress:
        stand = Stand(path, prompt_tokens, decode_tokens, sizes, progress, **vars(running))
    launched = stand.launched
    facts: dict[str, Any] = {
        "path": str(path) if path else None,
        "backend": launched.backend,
        "dtype": TORCH_NAMES[launched.dtype],
        "device": launched.device,
        "kernels": kernels_here() if launched.backend == "native" else None,
        "cache_bytes_per_element": launched.element_bytes,
        "load_seconds": time.perf_counter() - start,
        "prompt_tokens": prompt_tokens,
        "context_tokens": CONTEXT,
        "decode_tokens": decode_tokens,
    }
    with opt.progress_line("measuring") as progress:
        facts |= _measure(stand, sizes, repeats, progress)
    facts["peak_memory_bytes"] = peak_memory()  # before the limits are measured, which takes memory too
    if ranks := stand.ranks():
        facts["ranks"] = ranks
    else:
        limits = machine_limits(launched, running.threads)
        facts |= {"limits": limits} | shares(launched, facts, limits)
    if not json:
        _show(facts)
    print(jsonlib.dumps(facts))


def read_sizes(text: str) -> list[int]:
    """ "1,8,16" → [1, 8, 16]; UsageError for anything else."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= size <= _LARGEST_BATCH for size in sizes):
        raise UsageError(f"--batch {text}: expected whole numbers from 1 to {_LARGEST_BATCH}, as in 1,8,16")
    return list(dict.fromkeys(sizes))


class Stopwatch:
    """Adds up the seconds spent in an object's method of this name, and in what it gives to be called later."""

    def __init__(self, thing: object, name: str):
        self.seconds = 0.0
        setattr(thing, name, self._timed(getattr(thing, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - start
            return self._timed(result) if callable(result) else result

        return timed


@dataclass(frozen=True)
class Decoding:
    """seconds: for a token of every sequence. outside: those of them not spent in the runner. busy: of each rank, the
    share of the time in which it computed; none where there is one process."""

    seconds: float
    outside: float
    busy: list[float]


class Stand:
    """A model on the test stand: an engine whose steps are timed, with a cache just large enough. options: fields of
    launch's."""

    def __init__(
        self,
        path: Path | None,
        prompt_tokens: int,
        decode_tokens: int,
        sizes: Sequence[int],
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ):
        from maestrale.batch import Asynchronous
        from maestrale.choices import Options
        from maestrale.launch import launch

        self.prompt_tokens, self.decode_tokens = prompt_tokens, decode_tokens
        # The first sequences decode while the last ones' prompts are computed: at most two steps for each sequence.
        self.slack = 2 * max(sizes) + 1
        longest = max(prompt_tokens + 1, CONTEXT + decode_tokens + self.slack)
        sized = Options(max_len=longest, max_sequences=max(sizes), prefix_cache=False, speculate=False, **options)
        self.launched: Launched = launch(path, sized, progress=progress)
        self.config, self.engine = self.launched.config, self.launched.engine
        runner = self.engine.runner
        self.depth = runner.depth if isinstance(runner, Asynchronous) else 1
        self.usage: Callable[[], Sequence[Any]] = getattr(runner, "usage", list)  # of several ranks
        self.watch = Stopwatch(runner, "begin" if self.depth > 1 else "step")

    def prefill(self) -> float:
        """Seconds from a prompt of `prompt_tokens` to the token after it."""
        request = self._submit(self.prompt_tokens, 0, 1)
        start = time.perf_counter()
        self._step_until([request], lambda: request.finished)
        return time.perf_counter() - start

    def decode(self, size: int) -> Decoding:
        """`decode_tokens` tokens of each of `size` sequences; over stages, a part of them is computed in each step."""
        requests = [self._submit(CONTEXT, i, self.decode_tokens + self.slack) for i in range(size)]
        self._step_until(requests, lambda: all(request.sequences[0].generated for request in requests))
        self.watch.seconds, before = 0.0, self.usage()
        end = self.engine.tokens_out + size * self.decode_tokens
        start = time.perf_counter()
        self._step_until(requests, lambda: self.engine.tokens_out >= end)
        seconds = time.perf_counter() - start
        outside = (seconds - self.watch.seconds) / self.decode_tokens
        busy = [(now.busy - then.busy) / seconds for now, then in zip(self.usage(), before, strict=True)]
        for request in requests:
            self.engine.abort(request)
        for _ in range(self.depth):
            self.engine.step()  # what is still under way
        return Decoding(seconds / self.decode_tokens, outside, busy)

    def ranks(self) -> list[dict[str, int]]:
        """What each rank has held at most, what before it loaded anything, and its part of the weights."""
        return [
            {"peak_memory_bytes": usage.peak, "base_memory_bytes": usage.base, "weight_bytes": usage.weights}
            for usage in self.usage()
        ]

    def _step_until(self, requests: Sequence[Any], enough: Callable[[], bool]) -> None:
        while not enough():
            self.engine.step()
            if self.engine.failed:
                raise next(request.error for request in requests if request.error)

    def _submit(self, length: int, seed: int, max_tokens: int) -> Any:
        from maestrale.sampling.params import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return self.engine.submit(prompt(self.config.vocab_size, length, seed), params)


def prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Random token ids, the same for the same arguments."""
    import numpy as np

    return np.random.default_rng(seed).integers(vocab_size, size=length).tolist()


def _measure(
    stand: Stand, sizes: Sequence[int], repeats: int, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Warms up, then measures each kind in turn, again and again, so that a slow moment of the machine hits all."""
    prefills: list[float] = []
    decodes: dict[int, list[Decoding]] = {size: [] for size in sizes}
    for done in range(repeats + 1):
        prefills.append(stand.prefill())
        for size in sizes:
            decodes[size].append(stand.decode(size))
        progress(done + 1, repeats + 1)
    return {
        "prefill": rates([stand.prompt_tokens / seconds for seconds in prefills[1:]]),
        "decode": {
            str(size): {
                **rates([size / run.seconds for run in runs[1:]]),
                "engine_ms_per_step": 1e3 * median(run.outside for run in runs[1:]),
                **(
                    {"busy": [median(shares) for shares in zip(*(run.busy for run in runs[1:]), strict=True)]}
                    if runs[0].busy
                    else {}
                ),
            }
            for size, runs in decodes.items()
        },
    }


def rates(values: Sequence[float]) -> dict[str, float]:
    """Tokens a second: the median of repeats, and between what they lie."""
    return {"tokens_per_second": median(values), "lowest": min(values), "highest": max(values)}


def shares(launched: Launched, facts: dict[str, Any], limits: dict[str, float]) -> dict[str, dict[str, Any]]:
    """`facts` of pre-fill and decoding with the work of each and its share of the limit that binds it."""
    config, element_bytes = launched.config, launched.element_bytes
    work = prefill_operations(config, facts["prompt_tokens"])
    rate = facts["prefill"]["tokens_per_second"] / facts["prompt_tokens"] * work
    prefill = {"operations": work, "share_of_limit": rate / limits["matmul_operations_per_second"]}
    decode = {}
    for size, found in facts["decode"].items():
        read = step_bytes(
            config, int(size), CONTEXT + facts["decode_tokens"] // 2, element_bytes, launched.tensor_bytes
        )
        rate = found["tokens_per_second"] / int(size) * read
        decode[size] = {**found, "bytes_per_step": read, "share_of_limit": rate / limits["read_bytes_per_second"]}
    return {"prefill": facts["prefill"] | prefill, "decode": decode}


def _show(facts: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    ranks = facts.get("ranks")
    table = Table(
        "", "tokens/s", "lowest … highest", "ranks busy" if ranks else "of limit", "engine ms/step", box=SIMPLE
    )
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(f"pre-fill, {facts['prompt_tokens']} tokens", facts["prefill"])]
    rows += [(f"decode, {size} at once", found) for size, found in facts["decode"].items()]
    for name, found in rows:
        table.add_row(
            name,
            f"{found['tokens_per_second']:,.1f}",
            f"{found['lowest']:,.1f} … {found['highest']:,.1f}",
            f"{found['share_of_limit']:.0%}" if "share_of_limit" in found else _percents(found.get("busy", ())),
            f"{found['engine_ms_per_step']:.2f}" if "engine_ms_per_step" in found else "",
        )
    console = Console(highlight=False)
    console.print(table)
    if limits := facts.get("limits"):
        console.print(
            f"limits: {limits['matmul_operations_per_second'] / 1e9:,.0f} G operations/s with such weights "
            f"(pre-fill), {limits['read_bytes_per_second'] / 1e9:,.1f} GB/s read (decode)"
        )
    if facts["kernels"]:
        console.print(f"kernels: {facts['kernels']}")
    for rank, found in enumerate(ranks or ()):
        console.print(
            f"rank {rank}: peak memory {opt.readable_bytes(found['peak_memory_bytes'])}; "
            f"{opt.readable_bytes(found['base_memory_bytes'])} before it loaded "
            f"{opt.readable_bytes(found['weight_bytes'])} of weights"
        )
    console.print(
        f"loaded in {facts['load_seconds']:.1f} s; peak memory {opt.readable_bytes(facts['peak_memory_bytes'])}"
    )


def _percents(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)
