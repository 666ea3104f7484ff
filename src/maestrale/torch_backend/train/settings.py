"""What a training run is told: the keys of its YAML or TOML file, checked and frozen."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestrale.config import ModelConfig
from maestrale.errors import UsageError


@dataclass(frozen=True)
class TrainSettings:
    """model: the keys of params.json. The rest are keys of the file, `train` and `heldout` those of its `data`.

    train: globs of text files; heldout: one text file; both hold documents separated by three line feeds.
    tokenizer: a SentencePiece file; None trains one of model.vocab_size pieces on the training text.
    start: a model folder whose weights to begin from; None draws new ones. Its tokenizer must be given as `tokenizer`.
    seq_len: tokens in a sequence. batch_size: sequences in a step. micro_batch: how many of them go through the model
    at once. Then the optimizer's: steps, the peak learning rate lr, reached after warmup_steps and falling along a
    cosine to a tenth, weight_decay of matrices, the gradient norm's limit grad_clip. balance: the weight of a
    mixture's load-balancing loss. log_every, heldout_every, save_every: in steps. compile: let torch.compile make
    kernels. threads: of the processor; 0 is torch's own choice.
    """

    model: ModelConfig
    train: tuple[str, ...]
    heldout: str
    out: str
    steps: int
    tokenizer: str | None = None
    start: str | None = None
    seq_len: int = 512
    batch_size: int = 16
    micro_batch: int = 4
    lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    balance: float = 0.01
    seed: int = 0
    log_every: int = 10
    heldout_every: int = 200
    save_every: int = 100
    compile: bool = False
    bf16: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "seq_len": 2, "batch_size": 1, "micro_batch": 1, "log_every": 1, "heldout_every": 1}
        for name, low in {**least, "save_every": 1, "warmup_steps": 0, "seed": 0, "threads": 0}.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least {low}")
        if self.seed >= 1 << 63:
            raise UsageError(f"seed = {self.seed}: expected less than {1 << 63}")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a finite number above 0")
        for name in ("weight_decay", "balance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a finite number of at least 0")
        if self.start is not None and self.tokenizer is None:
            raise UsageError("start without tokenizer: a new tokenizer's ids would mean nothing to the old weights")
        if self.batch_size % self.micro_batch:
            raise UsageError(f"batch_size = {self.batch_size} is not a multiple of micro_batch = {self.micro_batch}")
        longest = self.model.max_position_embeddings
        if longest is not None and self.seq_len > longest:
            raise UsageError(f"seq_len = {self.seq_len} is over max_position_embeddings = {longest}")

    def to_dict(self) -> dict[str, Any]:
        """The file's keys, so that a run can tell whether it is resumed with the same ones."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "model": self.model.to_mistral(), "train": list(self.train)}


def read_settings(
    path: str | Path, train: list[str] | None = None, heldout: str | None = None, out: str | None = None
) -> TrainSettings:
    """The settings in a .yaml, .yml or .toml file; `train`, `heldout` and `out` stand in for the file's own.

    UsageError for an unreadable file, an unknown, missing or wrong key; ConfigError for an impossible model.
    """
    values = _read(Path(path))
    data = _mapping(path, "data", values.pop("data", {}))
    if unknown := set(data) - {"train", "heldout"}:
        raise UsageError(f"{path}: data.{min(unknown)}: unknown key; expected train and heldout")
    values = {**values, **data}
    values |= {k: v for k, v in (("train", train), ("heldout", heldout), ("out", out)) if v is not None}
    if isinstance(values.get("train"), str):
        values["train"] = [values["train"]]
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    if unknown := set(values) - set(fields):
        raise UsageError(f"{path}: {min(unknown)}: unknown key; expected {', '.join(sorted({'data', *fields}))}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        names = ", ".join(f"data.{name}" if name in ("train", "heldout") else name for name in missing)
        raise UsageError(f"{path}: missing {names}")
    values["model"] = ModelConfig.from_mistral(_mapping(path, "model", values["model"]), f"{path}: model")
    types = typing.get_type_hints(TrainSettings)
    checked = {name: _typed(path, name, value, types[name]) for name, value in values.items()}
    try:
        return TrainSettings(**checked)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{path}: cannot read the training configuration: {error}") from None
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path}: not TOML: {error}") from None
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: expected a file that ends in .yaml, .yml or .toml")
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return dict(_mapping(path, "the file", values))


def _mapping(path: str | Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path}: {name}: expected keys and values, got {value!r:.60}")
    return value


def _typed(path: str | Path, name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-3, which has no point, as text
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"{path}: {name} = {value!r}: expected a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...]:
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{path}: {name} = {value!r}: expected a list of file patterns")
    if type(value) in (kind, *typing.get_args(kind)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    raise UsageError(f"{path}: {name} = {value!r}: expected {names.get(kind, 'text')}")
