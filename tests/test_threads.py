"""How many threads compute, where nobody says it and where somebody does."""

import os

import numpy as np
import pytest

from maestrale import threads
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.errors import UsageError
from maestrale.threads import available_cores, choose_threads


def test_threads_are_as_asked_then_as_the_environment_says_then_the_processes_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda: 7)
    monkeypatch.setenv("MAESTRALE_THREADS", "3")
    assert (choose_threads(), choose_threads(2)) == (3, 2)
    monkeypatch.delenv("MAESTRALE_THREADS")
    assert [choose_threads(processes=n) for n in (1, 2, 8)] == [7, 3, 1]


@pytest.mark.parametrize("asked", [0, -1, 1025])
def test_an_impossible_number_of_threads_is_refused(asked):
    with pytest.raises(UsageError, match=f"^threads = {asked}: expected a whole number from 1 to 1024$"):
        choose_threads(asked)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("max 100000\n", 6),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("900000 100000\n", 6),
        ("", 6),
    ],
)
def test_a_containers_share_of_time_counts_where_it_is_less_than_the_cores(share, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(threads, "_SHARE", tmp_path / "cpu.max")
    assert available_cores() == 6
    (tmp_path / "cpu.max").write_text(share)
    assert available_cores() == expected


def test_where_the_system_tells_no_affinity_every_core_counts(tmp_path, monkeypatch):
    """As macOS and Windows, which have no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(threads, "_SHARE", tmp_path / "cpu.max")
    monkeypatch.delenv("MAESTRALE_THREADS", raising=False)
    assert available_cores() == choose_threads() == 5
    assert round_to_nearest("w", StoredTensor.from_array(np.ones((16, 32), np.float32), "F32"), "int8").shape == (
        16,
        32,
    )


def test_rounding_takes_as_many_threads_as_the_environment_says(monkeypatch):
    monkeypatch.setenv("MAESTRALE_THREADS", "many")
    with pytest.raises(UsageError, match="MAESTRALE_THREADS=many: expected a whole number from 1 to 1024"):
        round_to_nearest("w", StoredTensor.from_array(np.ones((16, 32), np.float32), "F32"), "int8")
