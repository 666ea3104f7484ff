"""What a constraint costs a decode step: CPU time of finding the allowed tokens and choosing one, beside a step's.

    python bench/constraint_cost.py MODEL [--tokens 200]

For each kind of constraint the model's own greedy text is generated, so that the masks are those of real texts. CPU
time of one thread is taken, which other programs on the machine cannot stretch much; a step's limit is its own time
without a constraint. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from maestrale import LLM, SamplingParams
from maestrale.engine import engine as engine_module
from maestrale.sampling.grammar import Matcher

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "friends": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "note", "parameters": PERSON}}]
PROMPT = "Once upon a time there was a"


class Stopwatch:
    """CPU time of this thread in some functions, a number of microseconds for each call of `lap`."""

    def __init__(self) -> None:
        self.spent, self.laps = 0, []

    def wrap(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.thread_time_ns() - start

        return timed

    def lap(self) -> None:
        self.laps.append(self.spent / 1000)
        self.spent = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--backend", default="auto")
    asked = parser.parse_args()
    llm = LLM(asked.model, backend=asked.backend)
    constraints = {
        "JSON schema": {"json_schema": PERSON},
        "any JSON object": {"json_object": True},
        "regex": {"regex": "([A-Z][a-z]+ ){20,400}"},
        "free text, tools offered": llm.tokenizer.tool_constraint(TOOLS) if llm.tokenizer.has_tools else None,
    }
    step_us = statistics.median(steps(llm, None, asked.tokens)[0])
    print(f"{asked.model}: {llm.config.vocab_size} tokens; a step without a constraint: {step_us / 1000:.2f} ms of CPU")
    shares = {}
    for name, constraint in constraints.items():
        if constraint is None:
            continue
        start = time.perf_counter()
        llm.tokenizer.grammars.matcher(SamplingParams(constraint=constraint).constraint, False)
        ready = time.perf_counter() - start
        _, masks = steps(llm, constraint, asked.tokens)
        middle, most = statistics.median(masks), max(masks)
        shares[name] = middle / step_us
        print(
            f"{name:25} {middle:6.0f} us a token (mean {statistics.mean(masks):.0f}, most {most:.0f}, of {len(masks)})"
            f" = {middle / step_us:.1%} of a step; made ready in {ready:.2f} s"
        )
    print(json.dumps({"vocab_size": llm.config.vocab_size, "step_us": round(step_us), "shares": shares}))


def steps(llm: LLM, constraint: Any, tokens: int) -> tuple[list[float], list[float]]:
    """Microseconds of CPU time of each decode step at batch 1, and of the constraint's part in it."""
    params = SamplingParams(max_tokens=tokens, temperature=0, constraint=constraint, ignore_eos=constraint is None)
    watch, whole, consume, plain = Stopwatch(), [], Matcher.consume, engine_module.sample

    Matcher.consume, engine_module.sample = watch.wrap(consume), watch.wrap(plain)  # type: ignore[method-assign]
    try:
        stream, start = llm.stream(PROMPT, params), time.thread_time_ns()
        for piece in stream:
            whole.append((time.thread_time_ns() - start) / 1000)
            if piece.token_ids:
                watch.lap()
            start = time.thread_time_ns()
    finally:
        Matcher.consume, engine_module.sample = consume, plain  # type: ignore[method-assign]
    return whole[1:], watch.laps[1:]


if __name__ == "__main__":
    main()
