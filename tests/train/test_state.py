"""A stopped run goes on bit for bit, and a state is there whole or not at all."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_training import random_documents, tiny_config, tiny_mixture, tiny_settings

from maestrale.errors import CheckpointError, UsageError
from maestrale.torch_backend.train.objective import Language
from maestrale.torch_backend.train.packing import batch_rows, pack
from maestrale.torch_backend.train.state import Progress, load_state, save_state
from maestrale.torch_backend.train.step import learn, learning_rate, new_model, new_optimizer

DATA = Language(pack(random_documents(70, 40, 90, 8, 61), 16))
START = Progress(step=0, data="", seconds=0.0)


def begin(settings):
    model = new_model(settings.model, settings.seed)
    return model, new_optimizer(model, settings)


def go(settings, model, optimizer, first: int, end: int) -> list[float]:
    losses = []
    for step in range(first, end):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        rows = batch_rows(len(DATA), settings.batch_size, step, settings.seed)
        losses.append(learn(model, optimizer, DATA, rows, settings).loss)
    return losses


@pytest.mark.parametrize("model", [tiny_config(), tiny_mixture()], ids=["dense", "mixture"])
def test_three_steps_and_three_after_a_stop_are_six_bit_for_bit(tmp_path, model):
    settings = tiny_settings(model)
    whole, optimizer = begin(settings)
    expected = go(settings, whole, optimizer, 0, 6)
    first, optimizer = begin(settings)
    losses = go(settings, first, optimizer, 0, 3)
    save_state(tmp_path / "s", first, optimizer, Progress(3, "", 1.0), settings.to_dict())
    torch.manual_seed(99)
    second, optimizer = begin(settings)
    done = load_state(tmp_path / "s", second, optimizer, settings.to_dict())
    assert losses + go(settings, second, optimizer, done.step, 6) == expected
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_configuration_is_refused_and_its_difference_shown(tmp_path):
    settings = tiny_settings()
    model, optimizer = begin(settings)
    go(settings, model, optimizer, 0, 1)
    save_state(tmp_path / "s", model, optimizer, START, settings.to_dict())
    other = tiny_settings(tiny_config(hidden_dim=32), lr=0.5, out="elsewhere")
    with pytest.raises(UsageError) as caught:
        load_state(tmp_path / "s", *begin(other), other.to_dict())
    assert "lr was 0.002, is 0.5; model.hidden_dim was 24, is 32;" in str(caught.value)
    assert "out" not in str(caught.value).split("configuration:")[1].split(";")[0]


def test_a_damaged_state_is_refused(tmp_path):
    settings = tiny_settings()
    model, optimizer = begin(settings)
    go(settings, model, optimizer, 0, 1)
    path = tmp_path / "s"
    save_state(path, model, optimizer, START, settings.to_dict())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path, *begin(settings), settings.to_dict())


# Saves step 1, then forks once for each moment to die in while saving step 2, and after each loads what is there.
_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from maestrale.checkpoint import writer
from maestrale.torch_backend.train.state import Progress, load_state, save_state

path = Path(sys.argv[1])
model = nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())

def save(step):
    for parameter in model.parameters():
        parameter.data.fill_(step)
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": parameter.data.clone(),
                                      "exp_avg_sq": parameter.data.clone()}
    save_state(path, model, optimizer, Progress(step, "", 0.0), {})

save(1)
calls = 0
def dying(real, last):
    def call(*args):
        global calls
        calls += 1
        if calls == last:
            if real is os.write:
                real(args[0], bytes(args[1])[:3])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call

killed = 0
for last in range(1, 100):
    child = os.fork()
    if child == 0:
        for name in ("write", "fsync", "ftruncate"):
            setattr(writer.os, name, dying(getattr(os, name), last))
        save(2)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    killed += 1
    step = load_state(path, model, optimizer, {}).step
    values = {float(v) for p in model.parameters() for v in p.data.unique()}
    assert step in (1, 2) and values == {float(step)}, (last, step, values)
assert killed >= 8, killed
assert load_state(path, model, optimizer, {}).step == 2
print("killed", killed)
"""


def test_killed_at_any_moment_of_a_save_a_state_still_loads(tmp_path):
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "state.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("killed"), done.stderr


def test_no_number_in_the_gradient_leaves_the_weights_alone():
    settings = tiny_settings(bf16=False)
    model, optimizer = begin(settings)
    before = [parameter.clone() for parameter in model.parameters()]
    model.norm.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    learnt = learn(model, optimizer, DATA, np.arange(4), settings)
    assert np.isnan(learnt.loss)
    assert np.isnan(learnt.norm)
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    settings = tiny_settings(steps=101, lr=1.0, warmup_steps=20)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:3] == pytest.approx([0.05, 0.10, 0.15])
    assert (rates[19], rates[20], rates[60], rates[100]) == pytest.approx((1.0, 1.0, 0.55, 0.1))
