"""What /metrics tells: Prometheus' text, from counters of this server alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from maestrale.serve.job import Job, Piece

Watched = tuple[str, str, Callable[[], float]]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True)
class _Watch(Collector):
    gauges: Sequence[Watched]
    counters: Sequence[Watched]

    def collect(self) -> Iterator[Metric]:
        for name, what, read in self.gauges:
            yield GaugeMetricFamily(name, what, read())
        for name, what, read in self.counters:
            yield CounterMetricFamily(name, what, read())


class _Times(Collector):
    """A histogram of seconds for what comes once a token: the library's own takes locks, 10 us of the event loop each
    time. To be fed by one thread."""

    def __init__(self, name: str, what: str):
        self._name, self._what = name, what
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        ends = [*map(floatToGoString, _SECONDS), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._what, buckets, self._sum)


class Metrics:
    """outcomes counts jobs by how they ended: done, error, cancelled, rejected, refused, timeout, slow reader."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("maestrale_http_responses", "HTTP answers.", ("route", "status"), registry=self.registry)
        self.outcomes = Counter(
            "maestrale_requests", "Generation requests by how they ended.", ("outcome",), registry=self.registry
        )
        self.prompt_tokens = self.tokens = 0
        counted = [
            ("maestrale_prompt_tokens", "Tokens of prompts begun.", lambda: float(self.prompt_tokens)),
            ("maestrale_generated_tokens", "Tokens generated.", lambda: float(self.tokens)),
        ]
        self.watch([], counted)
        self.first = self._times("maestrale_time_to_first_token_seconds", "From the request to its first token.")
        self.between = self._times("maestrale_inter_token_seconds", "Between two steps that gave it tokens.")
        self.whole = self._times("maestrale_request_seconds", "From the request to its last token.")

    def _times(self, name: str, what: str) -> _Times:
        times = _Times(name, what)
        self.registry.register(times)
        return times

    def watch(self, gauges: Iterable[Watched], counters: Iterable[Watched]) -> None:
        """Numbers (name, description, function) that are read when they are asked for."""
        self.registry.register(_Watch(tuple(gauges), tuple(counters)))

    def observe(self, job: Job, when: float, pieces: list[Piece]) -> None:
        """A step's pieces for one job, at the time the step ended."""
        if job.last is None:
            self.first.observe(when - job.began)
            self.prompt_tokens += sum(len(work.ids) for work in job.work)
        else:
            self.between.observe(when - job.last)
        job.last = when
        for piece in pieces:
            self.tokens += len(piece.completion.token_ids)

    def text(self) -> bytes:
        return generate_latest(self.registry)
