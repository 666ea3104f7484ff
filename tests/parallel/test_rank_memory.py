"""A rank takes the memory of its share, and not more while it loads: as the system counts it."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from parallel.start import run, torchrun
from tiny import DENSE, write_native

from maestrale.plan import tensor_plan

WIDE = replace(
    DENSE, dim=1024, n_layers=8, head_dim=64, hidden_dim=4096, n_heads=16, n_kv_heads=8, sliding_window=(None,) * 8
)  # 16 M parameters a layer
SMALL = replace(WIDE, dim=64, hidden_dim=64, n_heads=2, n_kv_heads=2)


def folder_of(path, config, dtype):
    weights = {name: torch.zeros(plan.shape, dtype=dtype) for name, plan in tensor_plan(config).items()}
    return write_native(path, config, weights)


def ranks(folder, backend, split):
    asked = [folder, "--backend", backend, split, 2, "--dtype", "bfloat16", "--json"]
    little = ["--batch", 1, "--repeats", 1, "--decode-tokens", 4, "--prompt-tokens", 16]
    done = run("bench", *asked, *little, launcher=(sys.executable, *torchrun(2)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["ranks"]


# What is stored otherwise than it is computed with is copied, and what was mapped of it goes back. Of a part that stays
# mapped the system counts what lies beside it, up to 2 MB for each cut: little of a real model, much of this one. With
# what torch takes to multiply such layers, 8 MB, eight of them would be at the limit.
LONGER = replace(WIDE, n_layers=12, sliding_window=(None,) * 12)
CASES = {
    "native-stages": ("native", "--num-pipeline-ranks", WIDE, torch.bfloat16),
    "torch-stages": ("torch", "--num-pipeline-ranks", WIDE, torch.bfloat16),
    "torch-shards": ("torch", "--tensor-parallel", LONGER, torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_takes_at_most_a_tenth_more_than_its_share_of_the_weights(case, tmp_path):
    """Beside what the program itself takes: a model of next to nothing tells how much that is."""
    backend, split, config, stored = CASES[case]
    small = ranks(folder_of(tmp_path / "small", SMALL, stored), backend, split)
    wide = ranks(folder_of(tmp_path / "wide", config, stored), backend, split)
    share = sum(plan.size * 2 for plan in tensor_plan(config).values()) / 2
    for program, rank in zip(small, wide, strict=True):
        assert rank["weight_bytes"] == pytest.approx(share, rel=0.02)
        taken = rank["peak_memory_bytes"] - program["peak_memory_bytes"]
        assert 0.9 * share < taken < 1.1 * share
