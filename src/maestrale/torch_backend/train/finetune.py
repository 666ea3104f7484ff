"""A fine-tuning run: a model folder and samples in, an adapter or a model folder out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from maestrale.checkpoint.adapter import Adapter, save_adapter
from maestrale.checkpoint.classifier import write_classifier
from maestrale.checkpoint.companions import write_companions
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.quantize import Quantizer
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.checkpoint.writer import save_checkpoint
from maestrale.errors import DataError, MemoryLimitError, UsageError
from maestrale.memory import available_memory
from maestrale.parallel.launcher import ranks_on_this_host
from maestrale.plan import count_parameters
from maestrale.text.samples import require_samples
from maestrale.text.tokenizer import Tokenizer, load_tokenizer
from maestrale.torch_backend import lora
from maestrale.torch_backend.load import load_model
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.int4 import int4_layer
from maestrale.torch_backend.train.loop import Run
from maestrale.torch_backend.train.objective import Classes, Language, Objective, Preferences
from maestrale.torch_backend.train.packing import TooLong, pack_samples
from maestrale.torch_backend.train.parallel import Ranks, ranks_of_torchrun
from maestrale.torch_backend.train.report import finetune_card
from maestrale.torch_backend.train.step import autocast
from maestrale.torch_backend.train.unlikely import language


@dataclass(frozen=True)
class FinetuneResult:
    """out: the folder written. cut, left_out: samples over the length. Losses are means; None without held-out data."""

    out: str
    steps: int
    samples: int
    cut: int
    left_out: int
    learnable: int
    seconds: float
    heldout_loss: float | None
    heldout_accuracy: float | None


@dataclass(frozen=True)
class _File:
    """A file's samples. kept: in task `lm` as sequences, else those that are short enough. long: of all."""

    path: str
    samples: Sequence[Any]
    kept: Any
    long: TooLong


@dataclass(frozen=True)
class _Data:
    """files: what is learnt first. form: what tokenizer.model's name is to tell, where there are conversations to learn
    and it does not."""

    train: Objective
    heldout: Objective | None
    files: Sequence[_File]
    form: str | None

    @property
    def labels(self) -> Sequence[str]:
        return self.train.labels if isinstance(self.train, Classes) else ()


def finetune(
    settings: FinetuneSettings,
    resume: bool = False,
    force: bool = False,
    notice: Callable[[str], None] = lambda line: None,
    quantizer: Quantizer = round_to_nearest,
) -> FinetuneResult:
    """Trains, or with `resume` goes on from the last state, and writes the adapter or the model to `settings.out`.

    notice: gets a line, on the first rank, for what the user should know before it starts. quantizer: rounds the base
    of `qlora`. Errors as Run's; CheckpointError for the model, DataError for the samples, MemoryLimitError where it
    cannot fit.
    """
    with ranks_of_torchrun() as ranks, open_checkpoint(settings.model) as checkpoint:
        return _run(Run(settings, resume, force, ranks), checkpoint, settings, notice, quantizer)


def _run(
    run: Run,
    checkpoint: Checkpoint,
    settings: FinetuneSettings,
    notice: Callable[[str], None],
    quantizer: Quantizer,
) -> FinetuneResult:
    """As `finetune`; when it returns, nobody holds the model, nor so the ranks' links any more."""
    ranks = run.ranks
    with run.owned():
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
        longest = checkpoint.config.max_position_embeddings
        if longest is not None and settings.seq_len > longest:
            raise UsageError(f"seq_len = {settings.seq_len} is over the model's max_position_embeddings = {longest}")
        data = _read(settings, tokenizer)
        if ranks.first:
            _tell(notice, settings, data, tokenizer)
        steps = settings.steps or max(1, math.ceil(settings.epochs * len(data.train) / settings.batch_size))
        run.settings = settings = replace(settings, steps=steps)
        require_memory(checkpoint, settings, ranks)
        model = prepare(checkpoint, settings, len(data.labels), quantizer)
        learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ranks.shard(model)
        model.train()
        seconds = run.go(model, data.train, data.heldout, settings.keep_best)
        loss = None if data.heldout is None else run.look(model, data.heldout, everything=True)
        run.draw()
        result = FinetuneResult(
            out=settings.out,
            steps=steps,
            samples=len(data.files[0].samples),
            cut=data.files[0].long.cut,
            left_out=data.files[0].long.left_out,
            learnable=learnable,
            seconds=round(seconds, 1),
            heldout_loss=loss,
            heldout_accuracy=_accuracy(model, data.heldout, settings),
        )
        ranks.rest(model)
        _export(run, settings, checkpoint, model, data, result)
    return result


def _tell(notice: Callable[[str], None], settings: FinetuneSettings, data: _Data, tokenizer: Tokenizer) -> None:
    for file in data.files:
        if file.long.cut or file.long.left_out:
            notice(
                f"{file.path}: {file.long.cut + file.long.left_out} of {len(file.samples)} samples are longer than "
                f"seq_len = {settings.seq_len}: {file.long.cut} texts are cut, {file.long.left_out} others left out"
            )
    if data.form and settings.method != "full":
        notice(
            f"{tokenizer.path}: tells no form of chats: for merged weights to chat, call their tokenizer.model "
            f"tokenizer.model.{data.form}"
        )


def prepare(
    checkpoint: Checkpoint, settings: FinetuneSettings, classes: int, quantizer: Quantizer = round_to_nearest
) -> Transformer:
    """The model with all that can learn in fp32 and free to, and nothing else."""
    full = settings.method == "full"
    dtype = torch.bfloat16 if settings.bf16 and not full else torch.float32

    def keep(name: str) -> nn.Module | None:
        return int4_layer(checkpoint, name, settings.group, quantizer, dtype) if settings.method == "qlora" else None

    model = load_model(checkpoint, dtype, torch.device("cpu"), keep=keep)
    if full:
        model.requires_grad_(True)
    else:
        names = lora.target_layers(checkpoint.config, settings.targets)
        lora.add_lora(
            model, names, settings.rank, settings.alpha / settings.rank, settings.method == "dora", settings.seed
        )
    if settings.task == "classify":
        model.output.requires_grad_(checkpoint.config.tied_embeddings and full)  # nobody reads it
        score = nn.Linear(checkpoint.config.dim, classes, bias=False)
        nn.init.normal_(score.weight, std=0.02, generator=torch.Generator().manual_seed(settings.seed))
        model.add_module("score", score)
    return model


def require_memory(checkpoint: Checkpoint, settings: FinetuneSettings, ranks: Ranks) -> None:
    """MemoryLimitError, on all ranks alike, where the weights and what learns them do not fit. Each rank loads the
    model whole before it is cut; int4 weights are made one by one, and never cut."""
    full, parameters = settings.method == "full", count_parameters(checkpoint.config)[0]
    name, size = ("F32", 4.0) if full or not settings.bf16 else ("BF16", 2.0)
    mapped = checkpoint.dtype == name and not checkpoint.quantized  # from the file, until a part of it is copied
    each = max((16.0 if full else size) / ranks.size, 0.0 if mapped else size)
    needed = int((0.6 if settings.method == "qlora" else each) * parameters)
    free = ranks.least(available_memory() // ranks_on_this_host())
    if needed > free:
        where = "" if ranks.size == 1 else f" on each of {ranks.size} ranks"
        raise MemoryLimitError(
            f"{checkpoint.folder}: method {settings.method} needs {needed / 2**30:.1f} GiB for weights alone{where}, "
            f"{free / 2**30:.1f} GiB are to be had; lora and qlora need less, and ranks on several hosts divide it"
        )


def _read(settings: FinetuneSettings, tokenizer: Tokenizer) -> _Data:
    def opened(path: str | None) -> _File | None:
        return None if path is None else _open(path, settings, tokenizer)

    train, heldout, own = _open(settings.train, settings, tokenizer), opened(settings.heldout), opened(settings.own)
    files = [file for file in (train, heldout, own) if file is not None]
    if settings.task == "lm":
        objective = language(train.kept, None if own is None else own.kept, settings.own_share)
        form = tokenizer.untold_form if any(sample.whole for sample in train.samples) else None
        return _Data(objective, None if heldout is None else Language(heldout.kept), files, form)
    if settings.task == "dpo":
        test_pairs = None if heldout is None else Preferences(heldout.kept, settings.beta)
        return _Data(Preferences(train.kept, settings.beta), test_pairs, files, tokenizer.untold_form)
    labels = sorted({sample.label for sample in train.kept})
    if len(labels) < 2:
        raise DataError(f"{train.path}: one label, {labels[0]!r}, in all samples; expected two or more")
    if heldout is None:
        return _Data(Classes(train.kept, labels), None, files, form=None)
    if strange := [f"{heldout.path}:{s.line}: {s.label!r}" for s in heldout.kept if s.label not in labels]:
        raise DataError(f"labels that {train.path} does not hold: {', '.join(strange[:10])}")
    return _Data(Classes(train.kept, labels), Classes(heldout.kept, labels), files, form=None)


def _open(path: str, settings: FinetuneSettings, tokenizer: Tokenizer) -> _File:
    samples = require_samples(path, tokenizer, settings.task)
    if settings.task == "lm":
        packed, long = pack_samples(samples, settings.seq_len)
        file = _File(path, samples, packed, long)
    else:
        kept = [sample for sample in samples if _length(sample) <= settings.seq_len]
        file = _File(path, samples, kept, TooLong(cut=0, left_out=len(samples) - len(kept)))
    if not len(file.kept):
        raise DataError(f"{path}: every sample is longer than seq_len = {settings.seq_len}: raise it")
    return file


def _length(sample: Any) -> int:
    if hasattr(sample, "chosen"):
        return max(len(sample.chosen.ids), len(sample.rejected.ids))
    return len(sample.ids)


@torch.no_grad()
def _accuracy(model: Transformer, heldout: Objective | None, settings: FinetuneSettings) -> float | None:
    """The share of held-out texts whose own class has the highest score; every rank does all of them."""
    if not isinstance(heldout, Classes):
        return None
    right = 0
    for row in range(len(heldout)):
        with autocast(settings):
            scores, _ = heldout.scores(model, np.array([row]))
        right += heldout.labels[int(scores.argmax())] == heldout.samples[row].label
    return right / len(heldout)


def _export(
    run: Run,
    settings: FinetuneSettings,
    checkpoint: Checkpoint,
    model: Transformer,
    data: _Data,
    result: FinetuneResult,
) -> None:
    """The first rank writes; all must help to put its parts together."""
    adapter = None if settings.method == "full" else lora.to_adapter(model, run.ranks.whole)
    whole = {name: run.ranks.whole(p) for name, p in model.named_parameters() if p.requires_grad}
    if not run.ranks.first:
        return
    card = finetune_card(settings, vars(result))
    if adapter is not None and settings.task != "classify":
        save_adapter(settings.out, adapter, checkpoint.config, settings.layout, card, run.force)
        return
    beside = run.folder / "tokenizer"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write_companions(checkpoint.folder, beside, 0)
    if data.form and (beside / "tokenizer.model").exists():
        (beside / "tokenizer.model").rename(beside / f"tokenizer.model.{data.form}")
    files = sorted(beside.iterdir())
    (run.folder / "README.md").write_text(card, encoding="utf-8")
    files.append(run.folder / "README.md")
    if settings.task == "classify":
        files += write_classifier(run.folder, data.labels, whole["score.weight"].numpy())
    tensors = _tensors(checkpoint, adapter, whole)
    save_checkpoint(settings.out, checkpoint.config, tensors, files, checkpoint.dtype, force=run.force)


def _tensors(
    checkpoint: Checkpoint, adapter: Adapter | None, whole: Mapping[str, torch.Tensor]
) -> dict[str, Callable[[], StoredTensor]]:
    """Each tensor of the model that was learnt, made when its turn comes."""

    def made(name: str) -> StoredTensor:
        if adapter is not None:
            return adapter.merge(name, checkpoint.tensor(name), "F32")
        return StoredTensor.from_array(whole[name].numpy(), "F32") if name in whole else checkpoint.tensor(name)

    return {name: partial(made, name) for name in checkpoint.names()}
