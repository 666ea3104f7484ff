"""A training run from scratch, from text files to a model folder. The run's own folder keeps the tokenizer too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.jsonfile import read_bounded
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.writer import atomic_file, save_checkpoint
from maestrale.errors import UsageError
from maestrale.parallel.launcher import world
from maestrale.torch_backend.load import load_model
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train import step as steps
from maestrale.torch_backend.train.loop import Run
from maestrale.torch_backend.train.objective import Language, Objective
from maestrale.torch_backend.train.packing import Packed, pack
from maestrale.torch_backend.train.report import model_card
from maestrale.torch_backend.train.settings import TrainSettings
from maestrale.torch_backend.train.text import find_files, load_pieces, read_documents, train_tokenizer
from maestrale.torch_backend.train.unlikely import language

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

    Errors as Run's; UsageError for the text, and under a launcher of several processes.
    """
    if (size := world()[1]) > 1:
        raise UsageError(f"train runs in one process, and {size} were started: leave torchrun or mpirun out")
    run = Run(settings, resume, force)
    with run.owned():
        data, heldout, heldout_bytes = _prepare(settings, run.folder, resume)
        model = steps.new_model(settings.model, settings.seed) if settings.start is None else _load(settings)
        seconds = run.go(model, data, heldout)
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
        run.report.heldout(settings.steps, result.nats_per_token, result.bits_per_byte)
        run.draw()
        card = run.folder / "README.md"
        with atomic_file(card) as partial:
            partial.write_text(model_card(settings, vars(result)), encoding="utf-8")
        save_checkpoint(
            settings.out, settings.model, stored(model), [run.folder / "tokenizer.model", card], force=force
        )
    return result


def stored(model: torch.nn.Module) -> Mapping[str, StoredTensor]:
    """The parameters as a file takes them."""
    return {
        name: StoredTensor.from_array(parameter.detach().numpy(), "F32") for name, parameter in model.named_parameters()
    }


def _load(settings: TrainSettings) -> Transformer:
    """The model of `settings.start`, its weights in fp32 and free to change."""
    with open_checkpoint(str(settings.start)) as checkpoint:
        if checkpoint.config != settings.model:
            raise UsageError(f"{settings.start}: its params.json is not the model of these settings")
        model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    return model.requires_grad_(True).train()


def _prepare(settings: TrainSettings, folder: Path, resume: bool) -> tuple[Objective, Objective, int]:
    """(training data, held-out data, bytes of the held-out text); leaves the tokenizer in `folder`."""
    documents = read_documents(find_files(settings.train))
    heldout = read_documents([Path(settings.heldout)])
    path = folder / "tokenizer.model"
    if not resume:
        if settings.tokenizer is None:
            content = train_tokenizer(documents, settings.model.vocab_size, torch.get_num_threads())
        else:
            load_pieces(Path(settings.tokenizer), settings.model.vocab_size)
            content = read_bounded(settings.tokenizer)
        with atomic_file(path) as partial:
            partial.write_bytes(content)
    pieces = load_pieces(path, settings.model.vocab_size)
    bos, eos = pieces.bos_id(), pieces.eos_id()

    def packed(texts: list[str]) -> Packed:
        return pack(([bos, *pieces.encode(text), eos] for text in texts), settings.seq_len)

    own = None if settings.own is None else packed(read_documents([Path(settings.own)]))
    train = language(packed(documents), own, settings.own_share)
    return train, Language(packed(heldout)), sum(len(text.encode()) for text in heldout)
