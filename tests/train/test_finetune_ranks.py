"""Fine-tuning on two ranks under torchrun: the losses and weights of one, stopped and resumed on the way.

In bf16 too, since a micro-batch is what goes through the model, on one rank or the other; bf16 and fp32 differ by more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from parallel.start import free_port
from safetensors.torch import load_file
from tiny import MIXTURE, WINDOWED, make_folder, write_tekken

from maestrale.errors import UsageError
from maestrale.torch_backend.train.finetune import finetune
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.losses import read_log
from maestrale.torch_backend.train.parallel import ranks_of_torchrun

# Every run interrupts itself, on one rank alone, in the step that it is told. All settings one after another: starting
# ranks takes longer than their training.
_SCRIPT = """
import json, os, signal, sys
from maestrale.torch_backend.train import loop
from maestrale.torch_backend.train.finetune import finetune
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings

at, resume, ends = int(sys.argv[2]), sys.argv[3] == "resume", []
learn, calls = loop.steps.learn, []

def interrupted(*args):
    calls.append(0)
    if len(calls) == at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return learn(*args)

loop.steps.learn = interrupted
for values, port in json.loads(sys.argv[1]):
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}  # as if started anew
    calls.clear()
    try:
        finetune(FinetuneSettings(**values | {"targets": tuple(values["targets"])}), resume)
        ends.append(0 if os.path.exists(values["out"]) else "before it was written")
    except SystemExit as left:
        ends.append(left.code)
sys.stdout.write(f"ends {ends}\\n")  # in one piece
"""
CASES = {
    "full-mixture": ("full", MIXTURE, False),
    "lora-windowed": ("lora", WINDOWED, False),
    "dora-windowed": ("dora", WINDOWED, False),
    "lora-on-bf16": ("lora", WINDOWED, True),
}


def torchrun(folder, settings, at, how) -> None:
    """Runs all settings on two ranks, each of which must end as it should."""
    (folder / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", str(folder / "script.py")]
    command += [json.dumps([(one.to_dict(), free_port()) for one in settings]), str(at), how]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"ends {[130 if at else 0] * len(settings)}") == 2, done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name in CASES → (method, folder with the runs of one rank, `one`, and of two, `two`)."""
    made = {}
    for name, (method, config, bf16) in CASES.items():
        root = tmp_path_factory.mktemp(name)
        folder = make_folder(root / "model", replace(config, vocab_size=288))
        write_tekken(folder)
        lines = [{"text": f"{'the bora blows ' * (1 + i % 3)}{i}"} for i in range(16)]
        data = root / "data.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        one = FinetuneSettings(
            model=str(folder),
            train=str(data),
            heldout=str(data),
            out=str(root / "one"),
            method=method,
            steps=6,
            seq_len=64,
            batch_size=4,
            bf16=bf16,
            lr=3e-3,
            warmup_steps=1,
            log_every=1,
            save_every=10,
            heldout_every=3,
        )
        finetune(one)
        made[name] = (method, root, replace(one, out=str(root / "two")))
    runs, scripts = [two for _, _, two in made.values()], tmp_path_factory.mktemp("scripts")
    torchrun(scripts, runs, 4, "begin")
    for _, root, _ in made.values():
        assert json.loads((root / "two.run/state.json").read_text())["progress"]["step"] == 4
    torchrun(scripts, runs, 0, "resume")
    return {name: (method, root) for name, (method, root, _) in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_losses_and_weights_of_one(case, trained):
    method, root = trained[case]
    found, expected = (read_log(root / f"{n}.run/log.jsonl") for n in ("two", "one"))
    for name in ("loss", "heldout_nats_per_token"):
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (found, expected))
        assert len(theirs) == (6 if name == "loss" else 2)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    file = "consolidated.safetensors" if method == "full" else "adapter_model.safetensors"
    weights = load_file(root / "one" / file)
    for name, tensor in load_file(root / "two" / file).items():
        np.testing.assert_allclose(tensor, weights[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ],
)
def test_a_rank_that_is_told_nonsense_says_so_in_a_line(told, said, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said), ranks_of_torchrun():
        pass
