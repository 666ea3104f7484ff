"""A classifier's folder: a native model folder with the classes and their scores' weights beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import WEIGHT_DTYPES, StoredTensor, cast
from maestrale.checkpoint.jsonfile import read_json
from maestrale.checkpoint.safetensors_room import open_safetensors
from maestrale.checkpoint.writer import copy_file, write_json, write_safetensors
from maestrale.errors import CheckpointError, shown

LABELS, WEIGHTS = "classifier.json", "classifier.safetensors"
_TENSOR = "score.weight"


@dataclass(frozen=True, eq=False)
class Classifier:
    """labels: of the classes. weight: float32 [classes, dim], from the last token's hidden state to their scores."""

    labels: tuple[str, ...]
    weight: NDArray[np.float32]


def read_classifier(folder: Path) -> Classifier:
    """CheckpointError where the folder holds none, or one with other scores than labels."""
    if not is_classifier(folder):
        raise CheckpointError(
            f"{folder}: no classifier; expected {LABELS} and {WEIGHTS}, as finetune --task classify writes"
        )
    labels = read_json(folder / LABELS).get("labels")
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{folder / LABELS}: labels = {shown(labels)}: expected a list of two texts or more")
    file = open_safetensors(folder / WEIGHTS)
    entry = file.entries.get(_TENSOR)
    fits = entry is not None and len(entry.shape) == 2 and entry.shape[0] == len(labels)
    if entry is None or not fits or entry.dtype not in WEIGHT_DTYPES:
        found = "nothing of that name" if entry is None else f"{entry.dtype} {entry.shape}"
        raise CheckpointError(f"{folder / WEIGHTS}: {_TENSOR}: expected ({len(labels)}, dim), got {found}")
    return Classifier(tuple(labels), cast(file.tensor(_TENSOR), "F32").array.copy())


def is_classifier(folder: Path) -> bool:
    return (folder / LABELS).exists()


def copy_classifier(source: Path, folder: Path) -> None:
    """Both files, byte for byte, where `source` is a classifier's folder. CheckpointError where they are damaged."""
    if is_classifier(source):
        read_classifier(source)
        for name in (LABELS, WEIGHTS):
            copy_file(source / name, folder / name)


def write_classifier(folder: Path, labels: Sequence[str], weight: NDArray[np.float32]) -> list[Path]:
    """Both files into a folder that is there."""
    write_json(folder / LABELS, {"labels": list(labels)})
    write_safetensors(folder / WEIGHTS, [(_TENSOR, "F32", weight.shape)], [StoredTensor.from_array(weight, "F32")])
    return [folder / LABELS, folder / WEIGHTS]
