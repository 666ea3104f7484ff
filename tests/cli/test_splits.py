"""`inspect --devices`: what fits and how long a step takes, against the formulas worked out by hand for Mistral 7B."""

from dataclasses import replace

import pytest
from tiny import MIXTURE

from maestrale.cli.splits import Devices, read_devices, splits
from maestrale.config import ModelConfig
from maestrale.errors import UsageError

SEVEN_B = ModelConfig(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=32000,
    norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=(None,) * 32,
)


def by_mesh(found):
    return {(split["pipeline"], split["tensor"], split["expert"]): split for split in found}


def test_seven_b_on_one_device_reads_all_but_the_embedding_at_each_step():
    (one,) = splits(SEVEN_B, Devices(1, 24 * 10**9, 1e12, 25e9), length=1000, batch=1, element_bytes=2)
    assert one["weight_bytes"] == 7_241_732_096 * 2
    assert one["cache_bytes"] == 131_072 * 1000
    read = (7_241_732_096 - 32000 * 4096 + 4096) * 2 + 131_072 * 1000
    assert one["seconds_per_token"] == pytest.approx(read / 1e12)
    assert one["fits"]


def test_shards_share_weights_and_cache_and_pay_two_reductions_a_layer():
    devices = Devices(2, 24 * 10**9, 1e12, 25e9, latency=10e-6)
    two = by_mesh(splits(SEVEN_B, devices, length=1000, batch=4, element_bytes=2))[1, 2, 1]
    norms = (2 * 32 + 1) * 4096
    weights = (7_241_732_096 - norms) // 2 + norms
    assert two["weight_bytes"] == weights * 2
    assert two["cache_bytes"] == 4 * 131_072 * 1000 // 2
    read = (weights - 16000 * 4096 + 4 * 4096) * 2 + two["cache_bytes"]
    reduction = 2 * 1 * (10e-6 + 4 * 4096 * 2 / (2 * 25e9))
    assert two["seconds_per_token"] == pytest.approx(read / 1e12 + 64 * reduction)


def test_stages_add_up_for_one_sequence_and_overlap_for_many():
    devices = Devices(2, 24 * 10**9, 1e12, 25e9)
    one = splits(SEVEN_B, replace(devices, count=1), length=1000, batch=1, element_bytes=2)[0]
    two = by_mesh(splits(SEVEN_B, devices, length=1000, batch=1, element_bytes=2))[2, 1, 1]
    hop = 10e-6 + 4096 * 2 / 25e9
    assert two["seconds_per_token"] == pytest.approx(one["seconds_per_token"] + hop, rel=1e-6)
    assert two["tokens_per_second"] > 1.8 * one["tokens_per_second"]


def test_of_experts_only_those_chosen_are_read():
    devices = Devices(1, 10**9, 1e9, 1e9)
    one, many = (splits(MIXTURE, devices, 10, batch, 2)[0]["seconds_per_token"] for batch in (1, 64))
    assert many > 1.3 * one


def test_what_does_not_fit_comes_last():
    found = splits(SEVEN_B, Devices(2, 8 * 10**9, 1e12, 25e9), length=10_000, batch=1, element_bytes=2)
    assert [split["fits"] for split in found] == sorted((split["fits"] for split in found), reverse=True)
    assert not all(split["fits"] for split in splits(SEVEN_B, Devices(2, 7 * 10**9, 1e12, 25e9), 10, 1, 2))


@pytest.mark.parametrize("text", ["", "24GB", "2x", "0x24GB", "2x24", "9999x1GB", "-1x2GB", "2x24TB"])
def test_devices_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError, match="2x24GB"):
        read_devices(text, 1000, 25)


@pytest.mark.parametrize(("bandwidth", "link"), [(0, 25), (1000, -1), (float("nan"), 25), (1000, float("inf"))])
def test_speeds_that_cannot_be_are_refused(bandwidth, link):
    with pytest.raises(UsageError, match="GB/s"):
        read_devices("2x24GB", bandwidth, link)
