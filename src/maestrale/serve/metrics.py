"""What /metrics tells: Prometheus' text, from counters of this server alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from maestrale.serve.job import Job, Piece

Watched = tuple[str, str, Callable[[], float]]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class _Watch(Collector):
    gauges: Sequence[Watched]
    counters: Sequence[Watched]

    def collect(self) -> Iterator[Metric]:
        for name, what, read in self.gauges:
            yield GaugeMetricFamily(name, what, read())
        for name, what, read in self.counters:
            yield CounterMetricFamily(name, what, read())


class Metrics:
    """outcomes counts jobs by how they ended: done, error, cancelled, rejected, refused, timeout, slow reader."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("maestrale_http_responses", "HTTP answers.", ("route", "status"), registry=self.registry)
        self.outcomes = Counter(
            "maestrale_requests", "Generation requests by how they ended.", ("outcome",), registry=self.registry
        )
        self.prompt_tokens = Counter("maestrale_prompt_tokens", "Tokens of prompts begun.", registry=self.registry)
        self.tokens = Counter("maestrale_generated_tokens", "Tokens generated.", registry=self.registry)
        self.first = self._histogram("maestrale_time_to_first_token_seconds", "From the request to its first token.")
        self.between = self._histogram("maestrale_inter_token_seconds", "Between two steps that gave it tokens.")
        self.whole = self._histogram("maestrale_request_seconds", "From the request to its last token.")

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self.registry)

    def watch(self, gauges: Iterable[Watched], counters: Iterable[Watched]) -> None:
        """Numbers (name, description, function) that are read when they are asked for."""
        self.registry.register(_Watch(tuple(gauges), tuple(counters)))

    def observe(self, job: Job, when: float, pieces: list[Piece]) -> None:
        """A step's pieces for one job, at the time the step ended."""
        count = sum(len(piece.completion.token_ids) for piece in pieces)
        if job.last is None:
            self.first.observe(when - job.began)
            self.prompt_tokens.inc(sum(len(work.ids) for work in job.work))
        else:
            self.between.observe(when - job.last)
        job.last = when
        self.tokens.inc(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
