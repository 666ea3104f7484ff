"""A rank that dies, hangs or meets a bad file ends the job on every other rank, with code 6, its name and the cause."""

import re
import shutil
import time

import pytest
from parallel import failing
from parallel.start import WARM, free_port, rank_environment
from tiny import DENSE, make_folder

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
def test_a_rank_that_fails_ends_the_job_by_name(backend, split, how, folder, tmp_path):
    (folder / "idle").unlink(missing_ok=True)
    begun, port = time.monotonic(), free_port()
    said = [tmp_path / "rank0", tmp_path / "rank1"]
    ranks = [
        WARM.Process(
            target=failing.rank, args=(rank_environment(rank, 2, port), said[rank], how, backend, split, folder)
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    try:
        ranks[0].join(90)
        words = " ".join(said[0].read_text().split())
        assert ranks[0].exitcode == 6, words
        assert re.search(ENDS[how], words), words
        if how in ("bad_file", "raises"):  # the one that can still speak names the cause
            ranks[1].join(30)
            other = said[1].read_text()
            assert ranks[1].exitcode == 6, other
            assert ("made for the test" if how == "raises" else "consolidated.safetensors") in other
        assert time.monotonic() - begun < 80
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
            rank.close()
