"""`finetune` from a model folder and samples to an adapter, a model or a classifier, and how it stops and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import DENSE, MIXTURE, make_folder, write_tekken

from maestrale import LLM
from maestrale.checkpoint.adapter import open_adapter
from maestrale.checkpoint.gguf_writer import convert_to_gguf
from maestrale.errors import DataError, DiskError, MaestraleError, MemoryLimitError, UsageError
from maestrale.launch import BUNDLED
from maestrale.text.tokenizer import load_tokenizer
from maestrale.torch_backend.train import loop
from maestrale.torch_backend.train.finetune import finetune
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings, read_finetune_settings
from maestrale.torch_backend.train.losses import read_log

ANIMALS = ["fox", "wolf", "crow"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, folders = tmp_path_factory.mktemp("models"), {}
    for name, config in (("dense", DENSE), ("mixture", MIXTURE)):
        folders[name] = make_folder(root / name, replace(config, vocab_size=288))
        write_tekken(folders[name])
    return folders


def chats(count: int) -> list[dict]:
    asked = [ANIMALS[i % 3] for i in range(count)]
    return [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"A {a}, {i}."}]}
        for i, a in enumerate(asked)
    ]


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"{ANIMALS[i % 3]}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def labelled(count: int) -> list[dict]:
    return [{"text": f"{i} the {ANIMALS[i % 3]}", "label": ANIMALS[i % 3]} for i in range(count)]


MADE = {"lm": chats, "dpo": pairs, "classify": labelled}


@pytest.fixture
def made(models, tmp_path):
    """Settings of a short run on a fresh file of samples; changes over them."""

    def make(model="dense", **changes) -> FinetuneSettings:
        task = changes.get("task", "lm")
        for name, count in (("train", 24), ("heldout", 6)):
            lines = MADE[task](count)
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl"), "steps": 6}
        values |= {"model": str(models[model]), "out": str(tmp_path / "out"), "seq_len": 48, "batch_size": 4}
        values |= {"micro_batch": 2, "lr": 5e-3, "warmup_steps": 1, "rank": 4, "log_every": 1, "save_every": 2}
        return FinetuneSettings(**values | {"heldout_every": 2} | changes)

    return make


def adapter_arrays(folder) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize(
    ("method", "task", "model"),
    [
        ("lora", "lm", "dense"),
        ("lora", "lm", "mixture"),
        ("dora", "lm", "dense"),
        ("qlora", "lm", "mixture"),
        ("lora", "dpo", "mixture"),
        ("qlora", "dpo", "dense"),
    ],
)
def test_an_adapter_learns_and_opens(method, task, model, made, tmp_path):
    targets = ("attention", "experts" if model == "mixture" else "ffn")
    settings = made(model, method=method, task=task, steps=24, heldout_every=8, targets=targets)
    result = finetune(settings)
    lines = read_log(tmp_path / "out.run/log.jsonl")
    steps = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))
    assert np.mean(steps[-4:]) < np.mean(steps[:4]) - (0.3 if task == "lm" else 0.1)
    looks = [line["heldout_nats_per_token"] for line in lines if "heldout_nats_per_token" in line]
    assert len(looks) == 3
    assert result.heldout_loss == pytest.approx(min(looks), abs=1e-5)
    assert (tmp_path / "out.run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result.learnable:,} parameters" in (tmp_path / "out/README.md").read_text()
    adapter = open_adapter(tmp_path / "out", replace(DENSE if model == "dense" else MIXTURE, vocab_size=288))
    assert all((delta.b != 0).any() for delta in adapter.deltas.values()) or model == "mixture"
    llm = LLM(settings.model, max_len=64, adapters={"a": tmp_path / "out"})
    ids = [[1, *range(40, 60)]]
    assert abs(llm.logits(ids, adapter="a")[0] - llm.logits(ids)[0]).max() > 1e-2
    if model == "mixture":
        loads = np.array(lines[0]["expert_load"])
        np.testing.assert_allclose(loads.sum(1), [1, 1], atol=1e-3)


@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_full_fine_tuning_writes_a_model_with_its_tokenizer(model, made, tmp_path):
    result = finetune(made(model, method="full", steps=24, lr=3e-3))
    llm = LLM(tmp_path / "out", max_len=64)
    assert llm.tokenizer.encode("a") == load_tokenizer(made(model).model, 288).encode("a")
    completion = llm.chat([{"role": "user", "content": "fox?"}])
    assert completion.token_ids
    assert result.learnable == sum(t.numel() for t in load_file(tmp_path / "out/consolidated.safetensors").values())


def test_a_model_that_learnt_to_chat_says_so_by_its_tokenizers_name(made, tmp_path):
    """The bundled base model's own tokenizer has no tokens for turns."""
    base, told = str(BUNDLED / "stories"), []
    finetune(replace(made(method="full", steps=1), model=base), notice=told.append)
    assert not told
    assert LLM(tmp_path / "out", max_len=8).tokenizer.chats
    assert not (tmp_path / "out/tokenizer.model").exists()
    finetune(replace(made(steps=1, out=str(tmp_path / "adapter")), model=base), notice=told.append)
    assert len(told) == 1
    assert told[0].startswith(f"{BUNDLED}/stories/tokenizer.model: tells no form of chats")
    assert told[0].endswith("call their tokenizer.model tokenizer.model.v1")
    with pytest.warns(UserWarning, match="no window"):
        convert_to_gguf(base, tmp_path / "base.gguf", "bf16")  # a file that holds its vocabulary itself
    whole = made(method="full", steps=1, out=str(tmp_path / "whole"))
    finetune(replace(whole, model=str(tmp_path / "base.gguf")))
    assert LLM(tmp_path / "whole", max_len=8).tokenizer.chats
    settings = made(method="full", steps=1, out=str(tmp_path / "text"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "A fox."}) + "\n")
    finetune(replace(settings, model=base, heldout=None))
    assert not LLM(tmp_path / "text", max_len=8).tokenizer.chats


def test_a_disk_too_small_for_the_states_is_told_of_before_anything_is_learnt(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(loop.steps, "learn", None)
    with pytest.raises(DiskError, match=r"out\.run: needs .* has 1,000 free"):
        finetune(made())
    assert not (tmp_path / "out").exists()


def test_parquet_rows_train_as_json_lines_do(made, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    from pyarrow import parquet

    settings = made(steps=3)
    finetune(settings)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    finetune(replace(settings, train=str(tmp_path / "train.parquet"), out=str(tmp_path / "again")))
    expected = adapter_arrays(tmp_path / "out")
    for name, array in adapter_arrays(tmp_path / "again").items():
        np.testing.assert_array_equal(array, expected[name])


def test_tensorboard_gets_every_number_of_the_log(made, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the extra of that name")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(made(steps=4, tensorboard=True))
    board = EventAccumulator(str(tmp_path / "out.run/tensorboard"))
    board.Reload()
    lines = read_log(tmp_path / "out.run/log.jsonl")
    for name in ("loss", "lr", "gradient_norm", "heldout_nats_per_token"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert logged
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert shown == [(step, pytest.approx(value, rel=1e-5)) for step, value in logged]


def test_tensorboard_that_is_not_installed_is_asked_for(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'maestrale\[tensorboard\]'"):
        finetune(made(steps=1, tensorboard=True))


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it imports and does itself
def test_a_compiled_run_has_the_losses_of_one_that_is_not(made, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler: g++ is not installed")
    found = []
    for compiled in (False, True):
        out = tmp_path / f"compiled-{compiled}"
        finetune(made(out=str(out), compile=compiled, bf16=False, steps=2, heldout=None))
        found.append([line["loss"] for line in read_log(out.with_name(out.name + ".run") / "log.jsonl")])
    assert len(found[0]) == 2
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_what_a_model_said_again_is_unlearnt(made, tmp_path):
    """Beside the same samples: the loop is less likely than after a run without it."""
    loop_of = {"role": "assistant", "content": "A fox, a fox, a fox, a fox."}
    talk = [{"role": "user", "content": "fox?"}, loop_of]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    found = {}
    for name, own in (("plain", None), ("own", str(tmp_path / "own.jsonl"))):
        changes = {"method": "full", "steps": 30, "lr": 3e-3, "own_share": 0.5, "heldout_every": 100}
        finetune(made(out=str(tmp_path / name), own=own, keep_best=False, **changes))
        llm = LLM(tmp_path / name, dtype="float32", max_len=64)
        ids, _ = llm.tokenizer.encode_conversation(talk)
        logprobs = torch.from_numpy(llm.logits([ids])[0]).log_softmax(-1)
        found[name] = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 8, len(ids) - 4)]
    assert sum(found["own"]) < sum(found["plain"]) - 1


def test_the_exported_weights_have_the_loss_that_was_told(made, tmp_path):
    """Scored by the engine, from the files, in fp32."""
    result = finetune(made(steps=12, bf16=False))
    llm = LLM(made().model, dtype="float32", max_len=64, adapters={"a": tmp_path / "out"})
    total, count = 0.0, 0
    for line in (tmp_path / "heldout.jsonl").read_text().splitlines():
        ids, weights = llm.tokenizer.encode_conversation(json.loads(line)["messages"])
        (logits,) = llm.logits([ids], adapter="a")
        logprobs = torch.from_numpy(logits).log_softmax(-1)
        for i in range(len(ids) - 1):
            total -= weights[i + 1] * float(logprobs[i, ids[i + 1]])
            count += weights[i + 1]
    assert result.heldout_loss == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_learns_and_is_written_whole(method, made, tmp_path):
    result = finetune(made(task="classify", method=method, steps=30, heldout_every=10, lr=1e-2))
    assert result.heldout_accuracy == 1.0
    assert json.loads((tmp_path / "out/classifier.json").read_text()) == {"labels": sorted(ANIMALS)}
    assert load_file(tmp_path / "out/classifier.safetensors")["score.weight"].shape == (3, 32)
    assert LLM(tmp_path / "out", max_len=64).logits([[1, 40]])[0].shape == (2, 288)


def test_the_best_weights_are_written_not_the_last(made, tmp_path):
    """With a learning rate that ruins the model from step 5 on."""
    settings = made(steps=12, lr=1e-2)
    learning_rate = loop.steps.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "learning_rate", lambda s, step: 1.0 if step >= 4 else learning_rate(s, step))
        result = finetune(settings)
    looks = {
        line["step"]: line["heldout_nats_per_token"]
        for line in read_log(tmp_path / "out.run/log.jsonl")
        if "heldout_nats_per_token" in line
    }
    assert min(looks, key=looks.get) == 4
    assert looks[12] > looks[4] + 0.5
    assert result.heldout_loss == pytest.approx(looks[4], abs=1e-5)


def test_stopped_by_ctrl_c_and_resumed_the_weights_are_those_of_one_run(made, tmp_path, monkeypatch, capsys):
    finetune(made(out=str(tmp_path / "whole")))
    settings, learn, calls = made(), loop.steps.learn, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*args)

    monkeypatch.setattr(loop.steps, "learn", interrupted)
    with pytest.raises(SystemExit) as caught:
        finetune(settings)
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith("stopped after step 3 of 6; --resume goes on\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume continues it"):
        finetune(settings)
    with pytest.raises(UsageError, match=r"rank was 4, is 8"):
        finetune(replace(settings, rank=8), resume=True)
    finetune(settings, resume=True)
    assert len(calls) == 6
    expected = adapter_arrays(tmp_path / "whole")
    for name, array in adapter_arrays(tmp_path / "out").items():
        np.testing.assert_array_equal(array, expected[name])


def test_other_samples_are_not_resumed(made, tmp_path):
    settings = made()
    finetune(settings)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("fox", "dog"))
    with pytest.raises(UsageError, match="the training data has changed"):
        finetune(settings, resume=True, force=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12, of a fork beside threads
def test_killed_at_random_moments_and_resumed_each_time_the_weights_are_those_of_one_run(made, tmp_path):
    settings = made(steps=40, save_every=1, heldout_every=7, checkpointing=True)
    finetune(replace(settings, out=str(tmp_path / "whole")))
    state, killed, draw = tmp_path / "out.run/state.safetensors", 0, np.random.default_rng(0)
    while not (tmp_path / "out").exists():
        resume, before = state.exists(), state.stat().st_mtime_ns if state.exists() else 0
        child = os.fork()
        if child == 0:
            finetune(settings, resume=resume)
            os._exit(0)
        ended = 0
        while not ended and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)  # at least one step further each time
            ended = os.waitpid(child, os.WNOHANG)[0]
        if not ended and killed < 10:
            time.sleep(float(draw.uniform(0, 0.1)))
            os.kill(child, signal.SIGKILL)
            killed += 1
        status = 0 if ended else os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
    assert killed == 10
    expected = adapter_arrays(tmp_path / "whole")
    for name, array in adapter_arrays(tmp_path / "out").items():
        np.testing.assert_array_equal(array, expected[name])


def test_no_number_in_the_loss_stops_and_names_the_step(made, tmp_path, monkeypatch):
    learn, calls = loop.steps.learn, []

    def broken(*args):
        calls.append(0)
        learnt = learn(*args)
        return replace(learnt, loss=torch.nan) if len(calls) == 4 else learnt

    monkeypatch.setattr(loop.steps, "learn", broken)
    with pytest.raises(MaestraleError, match=r"step 4: loss nan.*state\.safetensors holds the last good state"):
        finetune(made())
    assert not (tmp_path / "out").exists()


def test_samples_over_the_length_are_told_of(made, tmp_path):
    settings, told = made(steps=1), []
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "word " * 40}) + "\n")
        long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 40}]
        file.write(json.dumps({"messages": long}) + "\n")
    result = finetune(settings, notice=told.append)
    assert told == ["2 of 26 samples are longer than seq_len = 48: 1 texts are cut, 1 others left out"]
    assert (result.cut, result.left_out) == (1, 1)


def test_bad_samples_and_impossible_runs_are_refused_before_anything_is_learnt(made, tmp_path, monkeypatch):
    settings = made(steps=1)
    (tmp_path / "train.jsonl").write_text("{\n" + json.dumps(chats(1)[0]) + "\n[]\n")
    with pytest.raises(DataError, match=r"2 bad lines: .*train\.jsonl:1: not JSON.*train\.jsonl:3: expected"):
        finetune(settings)
    settings = made(task="classify")
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": "a", "label": "dog"}) + "\n")
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: 'dog'"):
        finetune(settings)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a", "label": "dog"}) + "\n")
    with pytest.raises(DataError, match="one label"):
        finetune(settings)
    with pytest.raises(DataError, match="every sample is longer than seq_len = 2"):
        finetune(made(seq_len=2))
    with pytest.raises(UsageError, match="seq_len = 4096 is over the model's max_position_embeddings = 512"):
        finetune(made(seq_len=4096))
    with pytest.raises(UsageError, match="targets: 'experts' names no linear layer"):
        finetune(made(targets=("experts",)))
    monkeypatch.setattr("maestrale.torch_backend.train.finetune.available_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError, match="method lora needs"):
        finetune(made())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: magic", "method = 'magic': expected one of lora, dora, qlora, full"),
        ("task: sing", "task = 'sing'"),
        ("rank: 0", "rank = 0"),
        ("alpha: -1", "alpha = -1"),
        ("targets: wq", "targets = 'wq': expected a list of words"),
        ("group: 7", "group = 7"),
        ("schedule: steep", "schedule = 'steep'"),
        ("method: dora\nlayout: native", "no native layout"),
        ("method: full\ntask: dpo", "task dpo needs an adapter"),
        ("steps: -1", "steps = -1"),
        ("epochs: 0", "epochs = 0"),
        ("model_: x", "model_: unknown key; expected model"),
        ("methd: lora", "methd: unknown key; expected method"),
        ("zzz: 1", "zzz: unknown key; expected alpha, balance,"),
        ("steps: 10\nlr 3\n", "c.yaml:2: not YAML: could not find expected ':'"),
    ],
)
def test_a_wrong_setting_is_named(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_finetune_settings(path, model="m", train="t", out="o")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_come_from_the_file_and_the_command_line_stands_in_for_it(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('out = "o"\nrank = 3\n[data]\ntrain = "a"\nheldout = "h"\n')
    settings = read_finetune_settings(path, model="m", train="b", out=None)
    assert (settings.model, settings.train, settings.heldout, settings.out) == ("m", "b", "h", "o")
    assert read_finetune_settings(None, model="m", train="b", out="o").rank == 16
    path.write_text("rank = 3\n")
    with pytest.raises(UsageError, match=r"c\.toml: missing out, data\.train"):
        read_finetune_settings(path, model="m", train=None, out=None)
    with pytest.raises(UsageError, match="missing DATA, which"):
        read_finetune_settings(None, model="m", train=None, out=None)
    with pytest.raises(UsageError, match="missing --out, which"):
        read_finetune_settings(None, model="m", train="t", out=None)
