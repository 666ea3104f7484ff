"""What a fine-tuning run is told: the keys of its file, on top of those that every run has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestrale.checkpoint.adapter import LAYOUTS
from maestrale.errors import UsageError
from maestrale.text.samples import TASKS
from maestrale.torch_backend.train.settings import LoopSettings, make_settings, read_file

METHODS = ("lora", "dora", "qlora", "full")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(LoopSettings):
    """model: a folder, or a bundled model's name. train, heldout: files of samples; keys of the file's `data`.

    task: lm (texts and chats), dpo (preferences) or classify. method: lora; dora; qlora, whose frozen base is kept in
    4 bits in groups of `group` weights; or full. rank, alpha (the adapter is scaled by alpha / rank) and targets are
    the adapter's. layout: how it is written, peft or native. beta: of DPO, arXiv 2305.18290. steps = 0 means as many
    as `epochs` take. keep_best: write the weights of the best held-out loss, not the last ones.
    """

    model: str
    train: str
    heldout: str | None = None
    task: str = "lm"
    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention",)
    group: int = 32
    layout: str = "peft"
    beta: float = 0.1
    epochs: float = 1.0
    keep_best: bool = True
    steps: int = 0
    batch_size: int = 8
    micro_batch: int = 1
    lr: float = 1e-4
    warmup_steps: int = 10
    heldout_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, words in (("task", TASKS), ("method", METHODS), ("layout", LAYOUTS)):
            if getattr(self, name) not in words:
                raise UsageError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(words)}")
        if not 1 <= self.rank <= 1 << 16:
            raise UsageError(f"rank = {self.rank}: expected 1 to {1 << 16}")
        if self.group not in (32, 64, 128):
            raise UsageError(f"group = {self.group}: expected 32, 64 or 128")
        for name in ("alpha", "beta", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a finite number above 0")
        if self.task == "dpo" and self.method == "full":
            raise UsageError(
                "task dpo needs an adapter (method lora, dora or qlora): the model without it is what it "
                "is measured against"
            )
        if self.own is not None and self.task != "lm":
            raise UsageError(f"own = {self.own!r}: task {self.task} learns no text; leave it out")
        if self.method == "dora" and self.layout == "native":
            raise UsageError("method dora has no native layout: layout must be peft")

    @property
    def _least_steps(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "targets": list(self.targets)}


def read_finetune_settings(path: str | Path | None, **given: Any) -> FinetuneSettings:
    """The settings in a file, or the defaults; what is given and not None stands in for the file's own."""
    if path is None:
        path, values = "command line", {key: value for key, value in given.items() if value is not None}
        for key, option in (("train", "DATA"), ("out", "--out")):
            if key not in values:
                raise UsageError(f"missing {option}, which a --config file could say too")
    else:
        values = read_file(path, given)
    return make_settings(FinetuneSettings, path, values)
