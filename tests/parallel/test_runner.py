"""Rank 0's runner alone: what a step that broke off leaves behind."""

from types import SimpleNamespace

import numpy as np
import pytest

from maestrale.batch import Batch, CacheLayout
from maestrale.errors import DistributedError
from maestrale.mesh import Mesh
from maestrale.parallel.runner import ParallelRunner

NONE = np.empty((0, 2), np.int64)
BATCH = Batch(np.array([1]), np.array([0]), np.array([0, 1]), (np.array([[0]]),), (NONE,), np.array([0]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_after_a_step_that_broke_off_the_ranks_are_given_up(error):
    """Else the next step would read what the last one left on its way."""

    def run(batch):
        raise error

    link = SimpleNamespace(mesh=Mesh(2, 1), size=1, host="here", timeout=3600.0, close=lambda: None)
    runner = ParallelRunner(SimpleNamespace(run=run, link=link), CacheLayout(4, 8, 8, (None,), (2,), (2,)))
    with pytest.raises(error):
        runner.begin(BATCH)
    with pytest.raises(DistributedError, match="rank 0 on here: a step was broken off"):
        runner.begin(BATCH)
    runner.close()
