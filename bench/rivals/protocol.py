"""What the comparison's driver and a side's worker say to each other: a JSON object a line, and its answer a line.

    {"do": "load", "model": PATH, "weights": "int4", "threads": 2, "sequences": 16, "length": 2049}
    {"do": "prefill", "tokens": 512, "seed": 0}      → {"seconds": of the prompt and the token after it, …}
    {"do": "decode", "sequences": 8, "steps": 16}    → {"seconds": of one step of all of them, …}

Each answer has "peak", the most bytes of main memory that the process has held. `decode` goes on with the sequences of
the call before, where it was of as many; else it starts new ones, each after CONTEXT tokens and a step that warms up.
`python WORKER prepare SRC DST WEIGHTS` makes the model that the side loads.

A worker runs in its side's own environment, so this file needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol

CONTEXT = 128  # tokens of each sequence before it decodes
VOCABULARY = 32000


class Side(Protocol):
    """A loaded model. version: what a table names it by. settings: what was chosen, where there was a choice."""

    version: str
    settings: str

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        """Loads. sequences: the most at once; length: the most tokens of one of them."""

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        """Writes at `target` the model that `__init__` loads."""

    def prefill(self, prompt: list[int]) -> None:
        """Computes the prompt and the greedy token after it, from an empty cache."""

    def start(self, prompts: list[list[int]]) -> None:
        """Computes the prompts and the first greedy token of each, in place of the sequences before."""

    def step(self) -> None:
        """One greedy token more of each sequence, in one batch; end-of-sequence ends nothing."""


def draw_prompt(tokens: int, seed: int) -> list[int]:
    """The same ordinary token ids for the same arguments, whatever the environment."""
    return random.Random(seed).choices(range(3, VOCABULARY), k=tokens)


def peak_memory() -> int:
    """The most bytes of main memory that this process has held, mapped weights included."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def serve(side: type[Side]) -> None:
    """A worker's main: answers until standard input ends. What a library prints goes to standard error."""
    if sys.argv[1:2] == ["prepare"]:
        side.prepare(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: Any = None
    running = 0
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        answer: dict[str, Any] = {}
        start = time.perf_counter()
        if do == "load":
            asked["model"] = Path(asked["model"])
            loaded = side(**asked)
            answer = {"version": loaded.version, "settings": loaded.settings}
        elif do == "prefill":
            prompt, running = draw_prompt(asked["tokens"], asked["seed"]), 0
            start = time.perf_counter()
            loaded.prefill(prompt)
        else:
            if running != asked["sequences"]:
                running = asked["sequences"]
                loaded.start([draw_prompt(CONTEXT, seed) for seed in range(running)])
                loaded.step()
            start = time.perf_counter()
            for _ in range(asked["steps"]):
                loaded.step()
        seconds = (time.perf_counter() - start) / asked.get("steps", 1)
        print(json.dumps(answer | {"seconds": seconds, "peak": peak_memory()}), file=answers, flush=True)
    sys.stdout.flush()
    os._exit(0)  # some libraries' threads do not end by themselves
