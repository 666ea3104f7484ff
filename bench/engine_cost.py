"""What a decode step costs in the engine's own Python, with a runner that does nothing: `python bench/engine_cost.py`.

Processor time, the least of many rounds of 32 greedy steps, so that a busy machine shows as little as can
be. The last line is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.engine.engine import Engine
from maestrale.sampling.params import SamplingParams

VOCAB = 32_000
STEPS = 32
PROMPT = 128
KINDS = {"full": (None,), "windowed": (256,), "both": (256, None)}


class IdleRunner:
    """Answers at once: rows of logits that are ready, in an order that does not repeat itself."""

    def __init__(self, windows: tuple[int | None, ...], sequences: int, max_len: int = 4096, max_chunk: int = 512):
        rings = tuple(-(-(max_len if window is None else window + max_chunk - 1) // 16) for window in windows)
        pages = tuple(sequences * ring for ring in rings)
        self.layout = CacheLayout(16, max_len, max_chunk, windows, rings, pages)
        random = np.random.default_rng(0)
        self.rows = random.normal(size=(128, VOCAB)).astype(np.float32)
        self.order = random.integers(64, size=4096).tolist()

    def step(self, batch: Batch) -> StepOutput:
        first = self.order.pop()
        self.order.insert(0, first)
        return StepOutput(self.rows[first : first + len(batch.logit_rows)])


class IdleDevice(IdleRunner):
    """One that draws tokens itself, as a GPU does: the engine begins each step while another is under way."""

    draws, depth = True, 2

    def begin(self, batch: Batch) -> Callable[[], StepOutput]:
        output = self.step(batch)
        tokens = np.full(len(batch.logit_rows), self.order[0])
        return lambda: StepOutput(output.logits, tokens=tokens)


def microseconds_per_step(kinds: str, sequences: int, rounds: int, runner: type[IdleRunner]) -> float:
    engine = Engine(runner(KINDS[kinds], sequences), VOCAB, None, sequences)
    params = SamplingParams(max_tokens=4096 - PROMPT, temperature=0)
    prompts = np.random.default_rng(1).integers(VOCAB, size=(sequences, PROMPT)).tolist()
    requests = [engine.submit(prompt, params) for prompt in prompts]
    while any(request.sequences[0].generated == 0 for request in requests):
        engine.step()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(STEPS):
            engine.step()
        best = min(best, time.process_time() - start)
    return 1e6 * best / STEPS


def main() -> None:
    found = {
        kinds: {n: round(microseconds_per_step(kinds, n, 60, IdleRunner), 1) for n in (1, 4, 16, 64)} for kinds in KINDS
    }
    found["full, drawn by the runner"] = {
        n: round(microseconds_per_step("full", n, 20, IdleDevice), 1) for n in (1, 64, 256)
    }
    for kinds, by_size in found.items():
        sizes = ", ".join(f"{n} sequences {cost:.0f}" for n, cost in by_size.items())
        print(f"layers {kinds}: microseconds a step: {sizes}")
    print(json.dumps({"engine_microseconds_per_step": found}))


if __name__ == "__main__":
    main()
