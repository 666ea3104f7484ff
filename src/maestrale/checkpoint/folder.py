"""Which of the accepted layouts a folder has, and in which files its weights are."""

from __future__ import annotations

import warnings
from pathlib import Path

from maestrale.checkpoint import hf, mistral, packed_room
from maestrale.checkpoint.jsonfile import read_json
from maestrale.errors import CheckpointError

ROOMS = {"packed": packed_room, "mistral": mistral, "hf": hf}  # in order of preference
GGUF = ".gguf"
ACCEPTED = (
    "params.json with packed.safetensors, or with consolidated.safetensors, its shards and "
    "consolidated.safetensors.index.json, consolidated.00.pth or consolidated.0*.pt; or config.json with "
    "model.safetensors, or its shards and model.safetensors.index.json; or one .gguf file"
)


def find_weights(folder: Path) -> tuple[str, dict[Path, list[str]]]:
    """The layout's name, and its weight files, each with the tensors that an index says it holds.

    Where a folder has several, the choice is fixed and a warning tells it: packed, native, Hugging Face; one
    .safetensors file before shards, those before pickles. A GGUF file counts where nothing else is there, or by its
    own path.
    """
    try:
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such folder; expected a model's folder, or a GGUF file")
        if not folder.is_dir():
            if folder.suffix == GGUF:
                return "gguf", {folder: []}
            raise CheckpointError(f"{folder}: is a file; expected the folder that holds it, or a GGUF file")
        choices = {layout: _weights(folder, layout) for layout in ROOMS}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot read: {error.strerror or error}") from None
    whole = {name: kinds for name, kinds in choices.items() if kinds and (folder / ROOMS[name].CONFIG).exists()}
    if not whole and (files := gguf_files(folder)):
        if len(files) > 1:
            raise CheckpointError(f"{folder}: holds {', '.join(p.name for p in files)}; name the one that you mean")
        return "gguf", {files[0]: []}
    if not whole:
        found = sorted({p.name for kinds in choices.values() for kind in kinds for p in kind})
        found += sorted({room.CONFIG for room in ROOMS.values() if (folder / room.CONFIG).exists()}, reverse=True)
        raise CheckpointError(
            f"{folder}: no model here; found {', '.join(found) or 'nothing of one'}; expected {ACCEPTED}"
        )
    layout, kinds = next(iter(whole.items()))
    chosen = kinds[0]
    others = [p.name for kind in (*kinds[1:], *(k for name in list(whole)[1:] for k in whole[name])) for p in kind]
    if others:
        warnings.warn(
            f"{folder}: holds more than one layout; using {chosen[0].name}, ignoring {', '.join(others)}", stacklevel=3
        )
    if chosen[0].name == ROOMS[layout].INDEX:
        return layout, _shards(chosen[0])
    return layout, {path: [] for path in chosen}


def gguf_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == GGUF)


def _weights(folder: Path, layout: str) -> list[list[Path]]:
    """The kinds of weights that are there, each as its files (of shards, the index), the preferred one first."""
    room = ROOMS[layout]
    kinds = [[folder / name] for name in (room.WEIGHTS, room.INDEX) if name and (folder / name).exists()]
    if layout == "mistral" and (pickles := mistral.pickled_weights(folder)):
        kinds.append(pickles)
    return kinds


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, in order of name; CheckpointError where one is absent or outside the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected weight_map, from tensors to files")
    shards: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or set(name) & set("/\\")
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index}: puts {tensor!r} into {str(name)[:80]!r}; expected a .safetensors file beside the index"
            )
        shards.setdefault(index.parent / name, []).append(tensor)
    if absent := sorted(path.name for path in shards if not path.exists()):
        raise CheckpointError(f"{index}: names files that are not there: {', '.join(absent)}; download them")
    return dict(sorted(shards.items()))
