"""What a run tells: a progress bar or plain lines, a log of JSON lines, a model card."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from maestrale.errors import DiskError, UsageError
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.losses import read_log
from maestrale.torch_backend.train.settings import LoopSettings, TrainSettings
from maestrale.torch_backend.train.step import Step

_PLAIN_SECONDS = 30.0  # between two lines where there is no terminal


class Report:
    """A context that follows a run from step `done`. Lines of the log after that step, of a run cut off, go.

    silent: on all ranks but the first, which says nothing and writes nothing.
    """

    def __init__(self, path: Path, settings: LoopSettings, done: int, silent: bool = False):
        self._settings, self._done, self._silent, self._path = settings, done, silent, path
        self._board: Any = None if silent or not settings.tensorboard else _open_board(path.parent / "tensorboard")
        self._tokens_per_step = settings.batch_size * settings.seq_len
        kept = [line for line in read_log(path) if line["step"] <= done] if done else []
        self._append(kept, "w")
        self._bar: Any = None
        self._begun = self._printed = time.monotonic()
        self._last = (self._begun, done)

    def __enter__(self) -> Report:
        if sys.stderr.isatty() and not self._silent:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._settings.steps, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()

    def step(self, step: int, learnt: Step, lr: float) -> None:
        """After step `step`, counted from 1."""
        now = time.monotonic()
        speed = (step - self._done) * self._tokens_per_step / (now - self._begun)
        if step % self._settings.log_every == 0 or step == self._settings.steps:
            before, before_step = self._last
            lately = (step - before_step) * self._tokens_per_step / (now - before)
            self._last = (now, step)
            line: dict[str, Any] = {
                "step": step,
                "tokens": step * self._tokens_per_step,
                "loss": round(learnt.loss, 5),
                "gradient_norm": round(learnt.norm, 5),
                "lr": lr,
                "tokens_per_s": round(lately, 1),
            }
            if learnt.loads is not None:  # of each layer, the share of its choices that each expert had
                line["expert_load"] = [[round(share, 4) for share in layer] for layer in learnt.loads.tolist()]
            self._write(line)
        left = (self._settings.steps - step) * self._tokens_per_step / speed
        text = f"loss {learnt.loss:.3f}, {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._silent and (now - self._printed >= _PLAIN_SECONDS or step == self._settings.steps):
            self._printed = now
            print(f"step {step} of {self._settings.steps}: {text}, {left / 60:.0f} min left", file=sys.stderr)

    def heldout(self, step: int, nats_per_token: float, bits_per_byte: float | None = None) -> None:
        """bits_per_byte: of the whole held-out text; None where only part of it was looked at."""
        line: dict[str, Any] = {"step": step, "heldout_nats_per_token": round(nats_per_token, 5)}
        text = f"step {step}: held-out {nats_per_token:.4f} nats per token"
        if bits_per_byte is not None:
            line["heldout_bits_per_byte"] = round(bits_per_byte, 5)
            text += f", {bits_per_byte:.4f} bits per byte"
        self._write(line)
        self.tell(text)

    def stopped(self, step: int) -> None:
        """After a signal, and after step `step` was saved."""
        self.tell(f"stopped after step {step} of {self._settings.steps}; --resume goes on")

    def stopping(self) -> None:
        self.tell("stopping when this step has ended and is saved; once more, and what it has done is lost")

    def tell(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        elif not self._silent:
            print(text, file=sys.stderr)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and not isinstance(value, list):
                    self._board.add_scalar(name, value, line["step"])
        self._append([line], "a")

    def _append(self, lines: Iterable[Mapping[str, Any]], mode: str) -> None:
        if self._silent:
            return
        try:
            with open(self._path, mode, encoding="utf-8") as log:
                log.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise DiskError(f"{self._path}: cannot write: {error.strerror}") from error


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard: true needs it installed: pip install 'maestrale[tensorboard]'") from None
    return SummaryWriter(str(folder))


def model_card(settings: TrainSettings, result: Mapping[str, Any]) -> str:
    """README.md of the exported folder: what is known without a person."""
    model = settings.model
    kind = "dense"
    if model.moe is not None:
        kind = f"mixture of {model.moe.num_experts} experts, {model.moe.num_experts_per_tok} a token"
    return f"""# {Path(settings.out).name}

A small language model trained from scratch by `maestrale train`.

| | |
|---|---|
| parameters | {result["parameters"]:,} |
| form | {kind}, {model.n_layers} layers, dim {model.dim}, vocabulary {model.vocab_size} |
| trained on | {result["tokens"]:,} tokens in {result["steps"]:,} steps of {settings.batch_size} x {settings.seq_len} |
| time | {result["seconds"] / 60:.0f} minutes |
| held-out loss | {result["nats_per_token"]:.4f} nats per token, {result["bits_per_byte"]:.4f} bits per byte |
"""


def finetune_card(settings: FinetuneSettings, result: Mapping[str, Any]) -> str:
    """README.md of a fine-tuned folder."""
    how = "all weights"
    if settings.method != "full":
        how = f"{settings.method}, rank {settings.rank}, alpha {settings.alpha:g}, on {', '.join(settings.targets)}"
    loss = "not measured" if result["heldout_loss"] is None else f"{result['heldout_loss']:.4f}"
    if result["heldout_accuracy"] is not None:
        loss += f", {result['heldout_accuracy']:.1%} of the classes right"
    return f"""# {Path(settings.out).name}

{Path(settings.model).name}, fine-tuned by `maestrale finetune`.

| | |
|---|---|
| task | {settings.task} |
| learnt | {how}: {result["learnable"]:,} parameters |
| data | {Path(settings.train).name}: {result["samples"]:,} samples |
| steps | {result["steps"]:,} of {settings.batch_size}, lr {settings.lr:g}, {result["seconds"] / 60:.1f} minutes |
| held-out loss | {loss} |
"""
