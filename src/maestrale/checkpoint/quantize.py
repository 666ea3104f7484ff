"""From a model folder to a packed one, weight by weight: memory holds one of them, the disk gets all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from maestrale.checkpoint import packed_room
from maestrale.checkpoint.classifier import copy_classifier
from maestrale.checkpoint.companions import write_companions
from maestrale.checkpoint.dtypes import StoredTensor, byte_count, cast, is_finite
from maestrale.checkpoint.packed import GROUPS, PackedWeight, part_layout
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.checkpoint.rounding import fitting_group
from maestrale.checkpoint.writer import Progress, atomic_folder, write_json, write_safetensors
from maestrale.errors import CheckpointError, UsageError
from maestrale.plan import tensor_plan

FORMATS = ("int8", "int4")
HEAD, EMBEDDINGS = "output.weight", "tok_embeddings.weight"
# (canonical name, stored weight, format, group) → packed; called layer by layer in ascending order, then for the head.
Quantizer = Callable[[str, StoredTensor, str, int], PackedWeight]


@dataclass(frozen=True)
class Recipe:
    """weights: "int8" or "int4". group: inputs that share an int4 scale. head: the output layer's own format, or None
    for that of the others."""

    weights: str
    group: int = 32
    head: str | None = None

    def __post_init__(self) -> None:
        for option, format in (("weights", self.weights), ("head", self.head or self.weights)):
            if format not in FORMATS:
                raise UsageError(f"{option} {format!r}: expected {' or '.join(FORMATS)}")
        if self.group not in GROUPS:
            raise UsageError(f"group {self.group}: expected {', '.join(map(str, GROUPS))}")

    def of(self, name: str, k: int) -> tuple[str, int]:
        """The format and group of a linear layer with k inputs: int4 needs a group that divides them."""
        format = self.head if self.head and name == HEAD else self.weights
        group = fitting_group(k, self.group) if format == "int4" else None
        return ("int4", group) if group else ("int8", 0)


def quantize(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    quantizer: Quantizer,
    force: bool = False,
    ignore_unexpected: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the model in folder `src` as a packed folder `dst`, with its tokenizer's files and a classifier's.

    quantizer: `round_to_nearest`, or one that has read some text (torch_backend/gptq.py).
    progress(bytes done, bytes in all) is called after each stored tensor.
    Errors: UsageError for a wrong option or an output that is in the way, CheckpointError for a damaged source, one
    that is quantized already, or weights with NaN or Inf, DiskError for the disk. `dst` is written whole or not at
    all; `src` is only read.
    """
    if os.path.realpath(src) == os.path.realpath(dst):
        raise UsageError(f"{dst}: is the source too; name another folder for the output")
    with open_checkpoint(src, ignore_unexpected) as source, atomic_folder(dst, force) as partial:
        if source.quantized:
            raise CheckpointError(f"{src}: holds quantized weights; quantize the folder that they were made from")
        _write(source, partial, recipe, quantizer, progress)
        source.verify_unchanged()


def _write(source: Checkpoint, folder: Path, recipe: Recipe, quantizer: Quantizer, progress: Progress | None) -> None:
    config = replace(source.config, tied_embeddings=False)  # a quantized head is no longer the embeddings' matrix
    plan = tensor_plan(config)
    names = [*(name for name in plan if name != HEAD), HEAD]
    formats = {name: recipe.of(name, plan[name].shape[-1]) for name in names if packed_room.is_linear(name)}
    entries: list[packed_room.Entry] = []
    for name in names:
        if name in formats:
            n, k = plan[name].shape
            layout = part_layout(formats[name][0], (n, k), formats[name][1])
            entries += [(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in layout.items()]
        else:
            entries.append((name, _plain_dtype(source, name), plan[name].shape))
    entries = list(packed_room.aligned(entries))
    made = _tensors(source, names, formats, quantizer)
    write_companions(source.folder, folder, sum(byte_count(dtype, shape) for _, dtype, shape in entries))
    copy_classifier(source.folder, folder)
    write_json(folder / packed_room.CONFIG, config.to_mistral())
    write_safetensors(
        folder / packed_room.WEIGHTS,
        entries,
        (packed_room.padding(shape) if packed_room.is_padding(name) else next(made) for name, _, shape in entries),
        packed_room.description({name: (format, group, False) for name, (format, group) in formats.items()}),
        progress,
        packed_room.ALIGNMENT,
    )


def _tensors(
    source: Checkpoint, names: list[str], formats: dict[str, tuple[str, int]], quantizer: Quantizer
) -> Iterator[StoredTensor]:
    """What is stored for each name, in order: the parts of a linear layer's weight, or the tensor."""
    for name in names:
        stored = EMBEDDINGS if name == HEAD and source.config.tied_embeddings else name
        tensor = source.tensor(stored)
        if not is_finite(tensor):
            raise CheckpointError(f"{source.folder}: NaN or Inf in {name}; inspect --check-tensors lists all such")
        if name in formats:
            weight = quantizer(name, tensor, *formats[name])
            dtypes = part_layout(weight.format, weight.shape, weight.group)
            for part, array in weight.parts.items():
                yield StoredTensor.from_array(array, dtypes[part][0])
        else:
            yield cast(tensor, _plain_dtype(source, name))
        source.release(stored)


def _plain_dtype(source: Checkpoint, name: str) -> str:
    return "BF16" if name == EMBEDDINGS else source.stored_dtype(name)
