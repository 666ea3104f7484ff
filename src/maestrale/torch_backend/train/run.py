"""A training run from its settings to a model folder.

Beside the folder `out` stands `out.run`: tokenizer.model, state.safetensors, log.jsonl (a line every few steps) and
loss.png. Killed at any moment, the run goes on from the last state; nothing in it is a pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.writer import atomic_file, save_checkpoint
from maestrale.errors import SIGINT_EXIT, SIGTERM_EXIT, DiskError, MaestraleError, UsageError
from maestrale.torch_backend.load import load_model
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train import step as steps
from maestrale.torch_backend.train.packing import Packed, batch_rows, pack
from maestrale.torch_backend.train.report import Report, draw_losses, model_card
from maestrale.torch_backend.train.settings import TrainSettings
from maestrale.torch_backend.train.state import Progress, load_state, save_state
from maestrale.torch_backend.train.text import find_files, load_tokenizer, read_documents, train_tokenizer

_HELDOUT_SEQUENCES = 64  # of the held-out text, looked at now and then; all of it at the end
_NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class TrainResult:
    """out: the folder written. Losses of the whole held-out text."""

    out: str
    steps: int
    tokens: int
    parameters: int
    seconds: float
    nats_per_token: float
    bits_per_byte: float


def train(settings: TrainSettings, resume: bool = False, force: bool = False) -> TrainResult:
    """Trains, or with `resume` goes on from the last state, and writes the model to `settings.out`.

    UsageError where the run or the folder is there already (and `force` is not set), or differs from the one to be
    resumed; MaestraleError where the loss is no finite number. After SIGINT or SIGTERM the state is saved and
    SystemExit leaves with 130 or 143.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = Path(settings.out)
    folder = out.with_name(out.name + ".run")
    state_path = folder / "state.safetensors"
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; --force replaces it")
    if state_path.exists() and not (resume or force):
        raise UsageError(f"{state_path}: a run is there; --resume continues it, --force begins again")
    if resume and not state_path.exists():
        raise UsageError(f"{state_path}: no run to resume")
    with _owned(folder):
        data, heldout, heldout_bytes = _prepare(settings, folder, resume)
        model = steps.new_model(settings.model, settings.seed) if settings.start is None else _load(settings)
        optimizer = steps.new_optimizer(model, settings)
        digest = hashlib.sha256(data.tokens.tobytes()).hexdigest()
        done = Progress(step=0, data=digest, seconds=0.0)
        if resume:
            done = load_state(state_path, model, optimizer, settings.to_dict())
            if done.data != digest:
                raise UsageError(f"{state_path}: the training text has changed since; --force begins again")
        if settings.compile:
            steps.compile_parts(model)
        report = Report(folder / "log.jsonl", settings, done.step)
        with report, _stop_signals() as stopped:
            seconds = _loop(settings, model, optimizer, data, heldout, done, state_path, report, stopped)
            nats, n_labels = steps.evaluate(model, heldout, np.arange(len(heldout)), settings)
            result = TrainResult(
                out=settings.out,
                steps=settings.steps,
                tokens=settings.steps * settings.batch_size * settings.seq_len,
                parameters=sum(p.numel() for p in model.parameters()),
                seconds=round(seconds, 1),
                nats_per_token=nats / n_labels,
                bits_per_byte=nats / _NATS_PER_BIT / heldout_bytes,
            )
            report.heldout(settings.steps, result.nats_per_token, result.bits_per_byte)
        with atomic_file(folder / "loss.png") as partial:
            draw_losses(folder / "log.jsonl", partial)
        _export(model, settings, result, folder, force)
    return result


def _load(settings: TrainSettings) -> Transformer:
    """The model of `settings.start`, its weights in fp32 and free to change."""
    with open_checkpoint(str(settings.start)) as checkpoint:
        if checkpoint.config != settings.model:
            raise UsageError(f"{settings.start}: its params.json is not the model of these settings")
        model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    return model.requires_grad_(True).train()


def _loop(
    settings: TrainSettings,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    data: Packed,
    heldout: Packed,
    done: Progress,
    state_path: Path,
    report: Report,
    stopped: list[int],
) -> float:
    """The steps from `done` to the last; seconds spent, those of earlier runs included."""
    sample = np.unique(np.linspace(0, len(heldout) - 1, _HELDOUT_SEQUENCES).astype(np.int64))
    begun = time.monotonic() - done.seconds
    for step in range(done.step, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = steps.learning_rate(settings, step)
        rows = batch_rows(len(data), settings.batch_size, step, settings.seed)
        loss, norm = steps.learn(model, optimizer, data, rows, settings)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = f"{state_path} holds the last good state" if state_path.exists() else "no state was saved yet"
            raise MaestraleError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}: the run is stopped; {kept}; lower lr"
            )
        report.step(step + 1, loss, norm, optimizer.param_groups[0]["lr"])
        last = step + 1 == settings.steps
        if (step + 1) % settings.save_every == 0 or last or stopped:
            progress = Progress(step + 1, done.data, time.monotonic() - begun)
            save_state(state_path, model, optimizer, progress, settings.to_dict())
        if stopped:
            sys.exit(SIGINT_EXIT if stopped[0] == signal.SIGINT else SIGTERM_EXIT)
        if (step + 1) % settings.heldout_every == 0 and not last:
            nats, n_labels = steps.evaluate(model, heldout, sample, settings)
            report.heldout(step + 1, nats / n_labels)
    return time.monotonic() - begun


def _prepare(settings: TrainSettings, folder: Path, resume: bool) -> tuple[Packed, Packed, int]:
    """(training data, held-out data, bytes of the held-out text); leaves the tokenizer in `folder`."""
    documents = read_documents(find_files(settings.train))
    heldout = read_documents([Path(settings.heldout)])
    path = folder / "tokenizer.model"
    if not resume:
        (folder / "state.safetensors").unlink(missing_ok=True)  # of a run before, with a tokenizer of its own
        if settings.tokenizer is None:
            content = train_tokenizer(documents, settings.model.vocab_size, torch.get_num_threads())
        else:
            load_tokenizer(Path(settings.tokenizer), settings.model.vocab_size)
            content = Path(settings.tokenizer).read_bytes()
        with atomic_file(path) as partial:
            partial.write_bytes(content)
    tokenizer = load_tokenizer(path, settings.model.vocab_size)
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()

    def packed(texts: list[str]) -> Packed:
        return pack(([bos, *tokenizer.encode(text), eos] for text in texts), settings.seq_len)

    return packed(documents), packed(heldout), sum(len(text.encode()) for text in heldout)


def _export(model: Transformer, settings: TrainSettings, result: TrainResult, folder: Path, force: bool) -> None:
    card = folder / "README.md"
    with atomic_file(card) as partial:
        partial.write_text(model_card(settings, vars(result)), encoding="utf-8")
    tensors: dict[str, Any] = {
        name: StoredTensor.from_array(parameter.detach().numpy(), "F32") for name, parameter in model.named_parameters()
    }
    save_checkpoint(settings.out, settings.model, tensors, [folder / "tokenizer.model", card], force=force)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Only one process trains into a folder. UsageError for the second."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DiskError(f"{folder}: cannot write: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is training there; wait for it") from None
        yield


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM is put into, so that a step can end before the run does."""
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: stopped.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
