"""This package on the stand: the whole engine (scheduling, sampling, detokenizing), not a bare model."""

from __future__ import annotations

from pathlib import Path

from protocol import serve

from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.choices import Options, nearest_rounding
from maestrale.engine.request import Request
from maestrale.launch import launch
from maestrale.sampling.params import SamplingParams


class Maestrale:
    version = "maestrale"
    settings = "no prefix cache, no speculation"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        options = Options(
            backend="native",
            max_len=length,
            max_sequences=sequences,
            threads=threads,
            prefix_cache=False,
            speculate=False,
        )
        self.engine = launch(model, options).engine
        self.length = length
        self.running: list[Request] = []

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        quantize(source, target, Recipe(weights), nearest_rounding())

    def prefill(self, prompt: list[int]) -> None:
        self._end()
        request = self._submit(prompt, 1)
        while not request.finished:
            self.engine.step()

    def start(self, prompts: list[list[int]]) -> None:
        self._end()
        self.running = [self._submit(prompt, self.length - len(prompt)) for prompt in prompts]
        while any(request.sequences[0].generated == 0 for request in self.running):
            self.engine.step()

    def step(self) -> None:
        self.engine.step()

    def _end(self) -> None:
        for request in self.running:
            self.engine.abort(request)
        self.running = []

    def _submit(self, prompt: list[int], tokens: int) -> Request:
        return self.engine.submit(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))


if __name__ == "__main__":
    serve(Maestrale)
