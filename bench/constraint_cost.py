"""What a constraint costs a decode step: CPU time of asking it and choosing tokens, beside a step's own.

    python bench/constraint_cost.py MODEL [--tokens 200] [--batch 1 16]

For each kind of constraint the model's own text is generated, greedily and drawn at temperature 0.8, so that the masks
are those of real texts. CPU time of the engine's thread is taken, which other programs on the machine cannot stretch
much; choosing the same tokens without a constraint is measured too and subtracted; the limit is 5% of a step without a
constraint. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from compare_rivals import RESULTS, Book

from maestrale import LLM, SamplingParams
from maestrale.engine import growth
from maestrale.sampling.grammar import Matcher

LIMIT = 0.05  # of a step

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
    """CPU time of this thread in some functions, in microseconds of each token."""

    def __init__(self) -> None:
        self.spent, self.laps = 0, list[float]()

    def wrap(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.thread_time_ns() - start

        return timed

    def lap(self, tokens: int) -> None:
        self.laps.append(self.spent / 1000 / tokens)
        self.spent = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--keep", action="store_true", help="the result in results/serving.json too")
    asked = parser.parse_args()
    llm = LLM(asked.model, backend=asked.backend, max_len=2048, speculate=False)
    constraints = {
        "JSON schema": {"json_schema": PERSON},
        "any JSON object": {"json_object": True},
        "regex": {"regex": "([A-Z][a-z]+ ){20,400}"},
        "free text, tools offered": llm.tokenizer.tool_constraint(TOOLS) if llm.tokenizer.has_tools else None,
    }
    rows = []
    for batch in asked.batch:
        for temperature in (0.0, 0.8):
            whole, plain = steps(llm, None, asked.tokens, batch, temperature)
            step_us, plain_us = statistics.median(whole), statistics.median(plain)
            print(f"batch {batch}, temperature {temperature}: a step of {step_us / 1000:.2f} ms without a constraint")
            for name, constraint in constraints.items():
                if constraint is None:
                    continue
                cost = statistics.mean(steps(llm, constraint, asked.tokens, batch, temperature)[1]) - plain_us
                share = round(cost * batch / step_us, 4)
                rows.append({"batch": batch, "temperature": temperature, "constraint": name, "share": share})
                print(f"  {name:25} {cost:6.1f} us a token = {share:6.2%} of a step", flush=True)
    worst = max(row["share"] for row in rows)
    result = {"vocab_size": llm.config.vocab_size, "worst": worst, "pass": worst < LIMIT, "rows": rows}
    if asked.keep:
        Book(RESULTS / "serving.json").keep(f"constraints {asked.model.name}", result)
    print(json.dumps(result))


def steps(llm: LLM, constraint: Any, tokens: int, batch: int, temperature: float) -> tuple[list[float], list[float]]:
    """Microseconds of each decode step of `batch` sequences, by the clock; and of CPU time of the engine's thread, for
    each token, for choosing it and asking the constraint. The first step, which reads the prompts, is left out."""
    watch, whole = Stopwatch(), list[float]()
    requests = [
        llm.submit(
            llm.tokenizer.encode(f"{PROMPT} {i}"),
            SamplingParams(tokens, temperature, seed=i, constraint=constraint, ignore_eos=constraint is None),
        )
        for i in range(batch)
    ]
    try:
        with (
            patch.object(Matcher, "consume", watch.wrap(Matcher.consume)),
            patch.object(growth, "sample", watch.wrap(growth.sample)),
        ):
            while llm.has_work:
                start = time.perf_counter_ns()
                pieces = llm.step()
                if pieces:
                    whole.append((time.perf_counter_ns() - start) / 1000)
                    watch.lap(len(pieces))
    finally:
        for request in requests:
            llm.abort(request)
    return whole[1:], watch.laps[1:]


if __name__ == "__main__":
    main()
