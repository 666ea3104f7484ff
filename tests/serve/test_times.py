"""Our histogram beside the library's own."""

import random

import pytest

prometheus_client = pytest.importorskip("prometheus_client")

from maestrale.serve.metrics import _SECONDS, _Times  # noqa: E402 (it imports the library)


def test_times_are_told_as_the_librarys_histogram_tells_them():
    theirs = prometheus_client.CollectorRegistry()
    histogram = prometheus_client.Histogram("t_seconds", "What.", buckets=_SECONDS, registry=theirs)
    ours, times = prometheus_client.CollectorRegistry(), _Times("t_seconds", "What.")
    ours.register(times)
    rng = random.Random(1)
    for seconds in [0.0, *_SECONDS, 601.0, *(2 ** rng.uniform(-10, 11) for _ in range(500))]:
        histogram.observe(seconds)
        times.observe(seconds)
    expected = prometheus_client.generate_latest(theirs).decode().splitlines()
    created = [line for line in expected if "_created" in line]  # when it was made: ours does not tell
    found = prometheus_client.generate_latest(ours).decode().splitlines()
    assert len(created) == 3
    assert found == [line for line in expected if line not in created]
