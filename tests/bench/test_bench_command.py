"""`maestrale bench`: what it times is what it says, and the limits are counted right."""

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import DENSE, MIXED, MIXTURE, TIED, hf_model, make_folder

from maestrale.batch import visible
from maestrale.choices import Options
from maestrale.cli import main
from maestrale.cli.bench import CONTEXT, Stand, prompt, rates, read_sizes
from maestrale.cli.limits import machine_limits, prefill_operations, step_bytes
from maestrale.errors import UsageError
from maestrale.launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bench") / "model", MIXED)


class Recorder:
    """Stands between the timer and the runner."""

    def __init__(self, runner):
        self.runner, self.layout, self.batches = runner, runner.layout, []

    def step(self, batch):
        self.batches.append(batch)
        return self.runner.step(batch)


@pytest.fixture
def stand(folder):
    stand = Stand(folder, prompt_tokens=70, decode_tokens=6, sizes=[1, 5])
    stand.engine.runner = Recorder(stand.engine.runner)
    return stand


def batches(stand):
    return stand.engine.runner.batches


def test_prefill_is_one_prompt_and_the_token_after_it(stand):
    assert stand.prefill() > 0
    assert [batch.positions.tolist() for batch in batches(stand)] == [list(range(70))]
    assert [batch.logit_rows.tolist() for batch in batches(stand)] == [[69]]


@pytest.mark.parametrize("size", [1, 5])
def test_what_is_timed_of_decoding_is_one_token_of_every_sequence_a_step(stand, size):
    found = stand.decode(size)
    assert 0 < found.outside < found.seconds
    assert found.busy == []
    measured = batches(stand)[-6:]
    assert [len(batch.token_ids) for batch in measured] == [size] * 6
    assert all((batch.positions >= CONTEXT).all() for batch in measured)
    prompts = sum(int((batch.positions < CONTEXT).sum()) for batch in batches(stand))
    assert prompts == size * CONTEXT


def test_a_measurement_leaves_nothing_behind(stand):
    free = stand.engine.pages.available
    stand.decode(5)
    stand.prefill()
    assert stand.engine.pages.available == free
    assert not stand.engine.has_work


def test_a_prompt_is_random_but_always_the_same():
    assert prompt(50, 200, 1) == prompt(50, 200, 1) != prompt(50, 200, 2)
    assert set(prompt(50, 1000, 3)) == set(range(50))


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["unwindowed", "one layer of three unwindowed"])
def test_operations_of_a_prompt_count_the_visible_pairs_and_one_row_of_logits(config):
    length, positions = 20, torch.arange(20)
    pairs = sum(int(visible(positions[:, None], positions, window).sum()) for window in config.sliding_window)
    attention = 4 * config.n_heads * config.head_dim
    one = prefill_operations(config, 1) - attention * config.n_layers
    logits = 2 * config.vocab_size * config.dim
    assert prefill_operations(config, length) == (one - logits) * length + logits + attention * pairs


def test_a_dense_step_reads_all_weights_but_the_embedding_table_and_the_cache_of_every_sequence():
    weights = sum(w.numel() for name, w in hf_model(DENSE).named_parameters() if "embed_tokens" not in name)
    cache = 2 * DENSE.n_layers * DENSE.n_kv_heads * DENSE.head_dim
    assert step_bytes(DENSE, 3, 100, 2) == 2 * (weights + 3 * 100 * cache)


def test_a_window_bounds_the_cache_that_a_step_reads():
    assert step_bytes(MIXED, 1, 1000, 2) - step_bytes(MIXED, 1, 999, 2) == 2 * 2 * MIXED.n_kv_heads * MIXED.head_dim


def test_tied_embeddings_are_read_by_the_output_layer():
    untied = replace(TIED, tied_embeddings=False)
    assert step_bytes(TIED, 2, 10, 4) == step_bytes(untied, 2, 10, 4)


def test_a_mixture_reads_the_experts_that_an_even_router_is_expected_to_choose():
    expert = 3 * MIXTURE.dim * MIXTURE.hidden_dim * MIXTURE.n_layers
    draw = torch.Generator().manual_seed(0)
    found = Counter()
    for size in (1, 3):
        for _ in range(4000):
            chosen = torch.rand(size, 4, generator=draw).topk(2).indices
            found[size] += len(chosen.unique()) / 4000
    grown = (step_bytes(MIXTURE, 3, 0, 1) - step_bytes(MIXTURE, 1, 0, 1)) / expert
    assert grown == pytest.approx(found[3] - found[1], abs=0.05)


def test_rates_are_the_median_and_the_ends():
    assert rates([3.0, 1.0, 10.0]) == {"tokens_per_second": 3.0, "lowest": 1.0, "highest": 10.0}


def test_sizes_are_read_in_order_and_once():
    assert read_sizes("8,1, 8") == [8, 1]


@pytest.mark.parametrize("text", ["", "0", "-1", "1,x", "257", "1,,2", "1.5"])
def test_a_wrong_batch_is_refused_by_name(text):
    with pytest.raises(UsageError, match="--batch"):
        read_sizes(text)


def bench(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys.modules["maestrale.cli.bench"], "machine_limits", lambda launched, threads: LIMITS)
    monkeypatch.setattr(sys, "argv", ["maestrale", "bench", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code or 0, *capsys.readouterr()


LIMITS = {"read_bytes_per_second": 1e9, "matmul_operations_per_second": 1e12}
QUICK = ("--prompt-tokens", 20, "--decode-tokens", 3, "--repeats", 2, "--batch", "1,2")


def test_with_json_there_is_one_line_and_the_dtype_can_be_chosen(folder, monkeypatch, capsys):
    code, out, _ = bench(monkeypatch, capsys, folder, *QUICK, "--json", "--dtype", "bfloat16")
    assert code == 0
    assert json.loads(out)["dtype"] == "bfloat16"
    assert out.count("\n") == 1


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_the_native_backend_measures_the_limits_by_its_own_kernels_without_torch(folder, weights):
    launched = launch(folder, Options(backend="native", weights=weights))
    limits = machine_limits(launched, 1)
    assert set(limits) == set(LIMITS)
    assert all(1e8 < rate < 1e14 for rate in limits.values())


@pytest.mark.parametrize("name", ["--prompt-tokens", "--decode-tokens", "--repeats"])
def test_nothing_can_be_measured_zero_times(folder, name, monkeypatch, capsys):
    code, out, err = bench(monkeypatch, capsys, folder, name, 0)
    assert (code, out) == (2, "")
    assert f"{name} 0: expected a whole number of at least 1" in err
