"""`train` from text files to a folder that opens, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import tiny_config, tiny_mixture, tiny_settings

from maestrale.checkpoint.reader import open_checkpoint
from maestrale.errors import CheckpointError, MaestraleError, UsageError
from maestrale.text.tokenizer import load_tokenizer
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train import loop, run
from maestrale.torch_backend.train.losses import read_log
from maestrale.torch_backend.train.run import train
from maestrale.torch_backend.train.state import load_state


@pytest.fixture
def settings(corpus, tmp_path):
    def made(**changes):
        values = {"train": (f"{corpus}/o*.txt", f"{corpus}/two.txt"), "heldout": f"{corpus}/heldout.txt"}
        return tiny_settings(**{**values, "out": str(tmp_path / "model"), "log_every": 1, "save_every": 2, **changes})

    return made


def weights(folder) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name).array.copy() for name in checkpoint.names()}


@pytest.mark.parametrize("model", [tiny_config(), tiny_mixture()], ids=["dense", "mixture"])
def test_the_folder_that_training_writes_opens_and_learnt(settings, model):
    made = settings(model=model, steps=40, lr=2e-2, heldout_every=10)
    result = train(made)
    with open_checkpoint(made.out) as checkpoint:
        assert checkpoint.config == model
        assert checkpoint.dtype == "BF16"
        assert sum(checkpoint.tensor(name).array.size for name in checkpoint.names()) == result.parameters
    tokenizer = load_tokenizer(made.out, model.vocab_size)
    text = "A fox  went\n\nhome, na\u00efve \u72d0.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert result.nats_per_token < np.log(320) - 1  # a twenty-word language is soon known
    log = read_log(run.Path(made.out + ".run") / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in log if "heldout_nats_per_token" in line] == [10, 20, 30, 40]
    loads = [line["expert_load"] for line in log if "expert_load" in line]
    assert len(loads) == (40 if model.moe else 0)
    for shares in loads:  # of two layers, each over four experts
        assert [len(layer) for layer in shares] == [4, 4]
        np.testing.assert_allclose(np.sum(shares, axis=1), 1, atol=1e-3)
    assert (run.Path(made.out + ".run") / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result.nats_per_token:.4f} nats per token" in (run.Path(made.out) / "README.md").read_text()


def test_a_run_stopped_by_ctrl_c_saves_and_goes_on_to_the_same_weights(settings, tmp_path, monkeypatch):
    whole = settings(out=str(tmp_path / "whole"))
    train(whole)
    made, learn, calls = settings(), loop.steps.learn, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*args)

    monkeypatch.setattr(loop.steps, "learn", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(made)
    assert caught.value.code == 130
    assert not run.Path(made.out).exists()
    with pytest.raises(UsageError, match="--resume continues it"):
        train(made)
    train(made, resume=True)
    assert len(calls) == 6
    for name, array in weights(whole.out).items():
        assert np.array_equal(array, weights(made.out)[name]), name
    steps = [line["step"] for line in read_log(run.Path(made.out + ".run") / "log.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_second_ctrl_c_does_not_wait_for_the_step(settings, monkeypatch, capsys):
    made, calls = settings(), []

    def interrupted(*args):
        calls.append(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping when this step has ended" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("it waited")

    monkeypatch.setattr(loop.steps, "learn", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(made)
    assert (caught.value.code, len(calls)) == (130, 1)


def test_a_warm_up_longer_than_the_run_is_told(settings, capsys):
    train(settings(warmup_steps=6))
    assert "the learning rate never comes to lr" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(settings, monkeypatch):
    made, learn, calls = settings(), loop.steps.learn, []

    def broken(*args):
        calls.append(0)
        learnt = learn(*args)
        return replace(learnt, loss=torch.nan) if len(calls) == 4 else learnt

    monkeypatch.setattr(loop.steps, "learn", broken)
    with pytest.raises(
        MaestraleError, match=r"step 4: loss nan.*state\.safetensors holds the last good state"
    ) as caught:
        train(made)
    assert caught.value.exit_code == 1
    assert not run.Path(made.out).exists()
    model = Transformer(made.model)
    optimizer = run.steps.new_optimizer(model, made)
    state = run.Path(made.out + ".run") / "state.safetensors"
    assert load_state(state, model, optimizer, made.to_dict()).step == 2


def test_changed_text_is_not_resumed(settings, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"The fox saw {i} wolves and a queen in her castle." for i in range(300)))
    made = settings(train=(str(text),))
    train(made)
    text.write_text(text.read_text().replace("fox", "ox"))
    with pytest.raises(UsageError, match="the training data has changed"):
        train(made, resume=True, force=True)


def test_what_is_there_is_not_replaced_without_force(settings):
    made = settings(steps=1)
    train(made)
    with pytest.raises(UsageError, match="exists and is not empty; --force replaces it"):
        train(made)
    train(made, force=True)


def test_a_second_process_is_refused(settings):
    made = settings()
    with loop.Run(made, False, False).owned(), pytest.raises(UsageError, match="another process is training there"):
        train(made)


def test_several_processes_are_refused(settings, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="train runs in one process, and 2 were started"):
        train(settings())


def test_a_pattern_that_names_no_file_is_refused(settings):
    with pytest.raises(UsageError, match=r"no-such.*: no such file"):
        train(settings(train=("no-such*.txt",)))


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(settings):
    with pytest.raises(UsageError, match="cannot learn a tokenizer"):
        train(settings(model=tiny_config(vocab_size=9000)))


def test_a_tokenizer_that_is_a_pipe_or_no_tokenizer_is_refused_in_a_line(settings, tmp_path):
    """A pipe that nobody writes to would keep the run waiting."""
    os.mkfifo(tmp_path / "pipe.model")
    (tmp_path / "noise.model").write_bytes(b"no tokenizer" * 50)
    for name, said in (
        ("pipe", "is not a regular file"),
        ("noise", "damaged, or no SentencePiece"),
        ("no", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}\.model: {said}"):
            train(settings(tokenizer=str(tmp_path / f"{name}.model")))


def test_the_verb_says_what_is_wrong_and_prints_json(settings, tmp_path, corpus, capsys):
    from maestrale.cli.train import train as verb

    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {dim: 16, n_layers: 1, n_heads: 2, hidden_dim: 24, vocab_size: 320, tied_embeddings: true}\n"
        "steps: 2\nseq_len: 16\nout: nowhere\ndata: {train: [a.txt], heldout: b.txt}\n"
    )
    with pytest.raises(UsageError, match="give one of them"):
        verb(config, resume=True, force=True)
    out = str(tmp_path / "model")
    verb(config, data=[f"{corpus}/one.txt"], heldout=f"{corpus}/heldout.txt", out=out, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["out"] == out
    assert answer["steps"] == 2
