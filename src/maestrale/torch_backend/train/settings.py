"""What a training run is told: the keys of its YAML or TOML file, checked and frozen."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from maestrale.config import ModelConfig
from maestrale.errors import UsageError, first_line, shown

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What every run is told.

    seq_len: tokens in a sequence. batch_size: sequences in a step. micro_batch: how many of them go through the model
    at once. Then the optimizer's: steps, the peak learning rate lr, reached after warmup_steps and falling, by the
    `schedule`, to lr_end of it; weight_decay of matrices, the gradient norm's limit grad_clip. balance: the weight of
    a mixture's load-balancing loss, of each layer on its own or, if balance_pooled, of all layers together; router_z:
    the weight of its router z-loss. own: a file like that of `train`, written by the model itself; what it said again
    there is unlearnt (train/unlikely.py), and of all sequences own_share are of it. log_every, heldout_every,
    save_every: in steps. checkpointing: keep only what stands between layers and compute the rest again for the
    gradient. compile: let torch.compile make kernels. tensorboard: write its files too. threads: of the processor; 0 is
    torch's own choice.
    """

    out: str
    steps: int
    seq_len: int = 512
    batch_size: int = 16
    micro_batch: int = 4
    lr: float = 2e-3
    lr_end: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    balance: float = 0.01
    balance_pooled: bool = False
    router_z: float = 0.0
    own: str | None = None
    own_share: float = 0.25
    seed: int = 0
    log_every: int = 10
    heldout_every: int = 200
    save_every: int = 100
    checkpointing: bool = False
    compile: bool = False
    bf16: bool = True
    tensorboard: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "batch_size": 1, "micro_batch": 1, "log_every": 1, "heldout_every": 1, "save_every": 1}
        for name, low in {**least, "steps": self._least_steps, "warmup_steps": 0, "seed": 0, "threads": 0}.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least {low}")
        if self.seed >= 1 << 63:
            raise UsageError(f"seed = {self.seed}: expected less than {1 << 63}")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a finite number above 0")
        for name in ("weight_decay", "balance", "router_z", "lr_end"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a finite number of at least 0")
        if not 0 < self.own_share < 1:
            raise UsageError(f"own_share = {self.own_share}: expected a number above 0 and below 1")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule = {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if self.batch_size % self.micro_batch:
            raise UsageError(f"batch_size = {self.batch_size} is not a multiple of micro_batch = {self.micro_batch}")

    @property
    def _least_steps(self) -> int:
        return 1

    def to_dict(self) -> dict[str, Any]:
        """The file's keys, so that a run can tell whether it is resumed with the same ones."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings):
    """A run from scratch. model: the keys of params.json. `train` and `heldout` are keys of the file's `data`.

    train: globs of text files; heldout: one text file; both hold documents separated by three line feeds.
    tokenizer: a SentencePiece file; None trains one of model.vocab_size pieces on the training text.
    start: a model folder whose weights to begin from; None draws new ones. Its tokenizer must be given as `tokenizer`.
    """

    model: ModelConfig
    train: tuple[str, ...]
    heldout: str
    tokenizer: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and self.tokenizer is None:
            raise UsageError("start without tokenizer: a new tokenizer's ids would mean nothing to the old weights")
        longest = self.model.max_position_embeddings
        if longest is not None and self.seq_len > longest:
            raise UsageError(f"seq_len = {self.seq_len} is over max_position_embeddings = {longest}")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model": self.model.to_mistral(), "train": list(self.train)}


Settings = TypeVar("Settings", bound=LoopSettings)


def read_settings(
    path: str | Path, train: list[str] | None = None, heldout: str | None = None, out: str | None = None
) -> TrainSettings:
    """The settings in a .yaml, .yml or .toml file; `train`, `heldout` and `out` stand in for the file's own.

    UsageError for an unreadable file, an unknown, missing or wrong key; ConfigError for an impossible model.
    """
    values = read_file(path, {"train": train, "heldout": heldout, "out": out})
    if isinstance(values.get("train"), str):
        values["train"] = [values["train"]]
    if "model" in values:
        values["model"] = ModelConfig.from_mistral(_mapping(path, "model", values["model"]), f"{path}: model")
    return make_settings(TrainSettings, path, values)


def read_file(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's keys, those of `data` among them, with what is `given` and not None in place of its own."""
    values = _read(Path(path))
    data = _mapping(path, "data", values.pop("data", {}))
    if unknown := set(data) - {"train", "heldout"}:
        raise UsageError(f"{path}: data.{min(unknown)}: unknown key; expected train and heldout")
    return {**values, **data} | {key: value for key, value in given.items() if value is not None}


def make_settings(kind: type[Settings], path: str | Path, values: Mapping[str, Any]) -> Settings:
    """Settings of that kind; UsageError for an unknown, missing or wrong key."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := set(values) - set(fields):
        known = sorted({"data", *fields})
        close = difflib.get_close_matches(min(unknown), known, 1)
        raise UsageError(f"{path}: {min(unknown)}: unknown key; expected {close[0] if close else ', '.join(known)}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        names = ", ".join(f"data.{name}" if name in ("train", "heldout") else name for name in missing)
        raise UsageError(f"{path}: missing {names}")
    types = typing.get_type_hints(kind)
    checked = {name: _typed(path, name, value, types[name]) for name, value in values.items()}
    try:
        return kind(**checked)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the training configuration: {error.strerror}") from None
    except UnicodeError as error:
        raise UsageError(f"{path}: cannot read the training configuration: {error}") from None
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # among them a number of too many digits
            raise UsageError(f"{path}: not TOML: {first_line(error)}") from None
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: expected a file that ends in .yaml, .yml or .toml")
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark or error.problem_mark  # where what is wrong began, or where it was seen
        line = "" if mark is None else f":{mark.line + 1}"
        raise UsageError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (
        ValueError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:  # so it meets a value that belies its tag
        raise UsageError(f"{path}: a value that cannot be read as YAML: {first_line(error)}") from None
    return dict(_mapping(path, "the file", {} if values is None else values))


def _mapping(path: str | Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path}: {name}: expected keys and values, got {shown(value)}")
    return value


def _typed(path: str | Path, name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-3, which has no point, as text
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"{path}: {name} = {shown(value)}: expected a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{path}: {name} = {shown(value)}: expected a smaller number") from None
    if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
        raise UsageError(f"{path}: {name} = {shown(value)}: holds a character of code 0, which no file's name may")
    if kind == tuple[str, ...]:
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(value)
        what = "file patterns" if name == "train" else "words"
        raise UsageError(f"{path}: {name} = {shown(value)}: expected a list of {what}")
    if type(value) in (kind, *typing.get_args(kind)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    raise UsageError(f"{path}: {name} = {shown(value)}: expected {names.get(kind, 'text')}")
