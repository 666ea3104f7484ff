"""The scripts in bench/: checkpoints that load, and a comparison whose figures mean what its table says."""

from dataclasses import replace

import compare_transformers as compare
import make_checkpoint
import numpy as np
import pytest
from tiny import DENSE, MIXTURE

from maestrale.checkpoint.reader import check_finite, open_checkpoint
from maestrale.plan import count_parameters

LIMITS = {"read_bytes_per_second": 1e9, "matmul_operations_per_second": 1e12}
OURS, THEIRS = compare.OURS, compare.THEIRS


@pytest.mark.parametrize(("shape", "parameters"), [("7B", 7_241_732_096)])
def test_the_7b_has_mistrals_size_and_d_has_its_layers(shape, parameters):
    whole, quarter = make_checkpoint.SHAPES["7B"], make_checkpoint.SHAPES["D"]
    assert count_parameters(whole)[0] == parameters
    assert replace(quarter, n_layers=32, sliding_window=whole.sliding_window) == whole


def test_a_made_checkpoint_is_a_native_folder_of_finite_bfloat16(tmp_path):
    config = replace(MIXTURE, dim=64, hidden_dim=4096)
    make_checkpoint.make_checkpoint(config, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.model").stat().st_size == make_checkpoint.packaged(
        make_checkpoint.V1
    ).stat().st_size
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert (checkpoint.config, checkpoint.dtype) == (config, "BF16")
        assert check_finite(checkpoint) == []
        widened = {
            name: (checkpoint.tensor(name).array.astype(np.uint32) << 16).view(np.float32)
            for name in (
                "norm.weight",
                "layers.0.feed_forward.experts.0.w1.weight",
                "layers.1.feed_forward.experts.0.w1.weight",
            )
        }
    norm, first, second = widened.values()
    assert (norm == 1).all()
    assert (first.mean(), first.std()) == pytest.approx((0, 0.02), abs=2e-4)
    assert (first != second).any()


def test_the_ratio_is_of_neighbours_so_that_a_slow_moment_of_both_cancels_out(monkeypatch):
    monkeypatch.setitem(compare.SHAPES, "S", DENSE)
    sides = {
        OURS: [{"seconds": s, "engine": 0.001} for s in (1.0, 10.0, 1.0)],
        THEIRS: [{"seconds": s, "way": "forward"} for s in (2.0, 20.0, 1.9)],
    }
    row = compare.summary("S", "decode 8", sides, LIMITS)
    assert (row["ratio"], row["ratio_lowest"], row["ratio_highest"]) == (2.0, 1.9, 2.0)
    assert (row[OURS]["tokens_per_second"], row[THEIRS]["tokens_per_second"]) == (8.0, 4.0)
    assert row[OURS]["engine_ms_per_step"] == 1.0
    assert row["limit_tokens_per_second"] * row[OURS]["share_of_limit"] == pytest.approx(8.0)
