"""A rank that dies, hangs or meets a bad file ends the job on every other rank, with code 6, its name and the cause."""

import re
import shutil
import time
from pathlib import Path

import pytest
from parallel.start import free_port, rank_environment, start
from tiny import DENSE, make_folder

SCRIPT = Path(__file__).parent / "failing.py"
ENDS = {  # how rank 1 fails → what rank 0 must say of it
    "killed_loading": "has gone",
    "killed_idle": "rank 1 has gone",
    "killed_prefill": "rank 1 has gone",
    "killed_decode": "rank 1 has gone",
    "hangs": "rank 1 does not answer",
    "bad_file": "rank 1 on .*consolidated.safetensors",
    "raises": "rank 1 has gone",
}
DIVISIONS = [("native", "num_pipeline_ranks"), ("torch", "num_pipeline_ranks"), ("torch", "tensor_parallel")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    make_folder(root / "good", DENSE)
    shutil.copytree(root / "good", root / "bad")
    weights = root / "bad" / "consolidated.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return root


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize(("backend", "split"), DIVISIONS, ids=["native-stages", "torch-stages", "torch-shards"])
def test_a_rank_that_fails_ends_the_job_by_name(backend, split, how, folder):
    (folder / "idle").unlink(missing_ok=True)
    begun, port = time.monotonic(), free_port()
    ranks = [start([SCRIPT, how, backend, split, folder], rank_environment(rank, 2, port)) for rank in (0, 1)]
    try:
        out, err = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 6, err
        words = " ".join(out.split())
        assert re.search(ENDS[how], words), words
        if how in ("bad_file", "raises"):  # the one that can still speak names the cause
            other, err = ranks[1].communicate(timeout=30)
            assert ranks[1].returncode == 6, err
            assert ("made for the test" if how == "raises" else "consolidated.safetensors") in other
        assert time.monotonic() - begun < 80
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
