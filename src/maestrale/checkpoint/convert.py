"""From one layout to another, tensor by tensor: memory holds one tensor, the disk gets all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from maestrale.checkpoint import hf, mistral
from maestrale.checkpoint.adapter import Adapter, open_adapter
from maestrale.checkpoint.classifier import copy_classifier
from maestrale.checkpoint.companions import write_companions
from maestrale.checkpoint.dtypes import STORAGE, TORCH_NAMES, StoredTensor, byte_count, cast, is_finite, read_dtype
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.checkpoint.writer import Progress, atomic_folder, write_json, write_safetensors
from maestrale.errors import CheckpointError, UsageError
from maestrale.plan import count_parameters, tensor_plan
from maestrale.text.tokenizer import load_tokenizer

SHARD_BYTES = 5_000_000_000


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "native",
    dtype: str = "auto",
    force: bool = False,
    ignore_unexpected: bool = False,
    progress: Progress | None = None,
    adapter: str | Path | None = None,
) -> None:
    """Writes the model in folder `src` to folder `dst`, as "native" or "hf", with its tokenizer's files and a
    classifier's.

    dtype: of all weights, as `read_dtype` reads it; "auto" keeps each tensor's own.
    adapter: the path of one to merge into the weights.
    progress(bytes done, bytes in all) is called after each tensor.
    Errors: UsageError for a wrong option or an output that is in the way, CheckpointError for a damaged source or
    weights with NaN or Inf, DiskError for the disk. `dst` is written whole or not at all; `src` is only read.
    """
    if to not in ("native", "hf"):
        raise UsageError(f"to = {to!r}: expected native, hf or gguf")
    wanted = None if dtype == "auto" else read_dtype(dtype, "")
    if os.path.realpath(src) == os.path.realpath(dst):
        raise UsageError(f"{dst}: is the source too; name another folder for the output")
    with open_checkpoint(src, ignore_unexpected) as source, atomic_folder(dst, force) as partial:
        merged = None if adapter is None else open_adapter(adapter, source.config)
        if merged is not None and source.config.tied_embeddings and "output" in merged.deltas:
            raise UsageError(f"{adapter}: changes the output layer, which this model shares with its embeddings")
        _Conversion(source, to, wanted, progress, merged).write(partial)
        source.verify_unchanged()


class _Conversion:
    def __init__(
        self, source: Checkpoint, to: str, dtype: str | None, progress: Progress | None, adapter: Adapter | None
    ):
        self.source, self.to, self.progress, self.adapter = source, to, progress, adapter
        self.shapes = {name: plan.shape for name, plan in tensor_plan(source.config).items()}
        # Values of a quantized weight are products in fp32; kept as such they would take eight times its bytes.
        own = {name: source.dtype if source.quantized else source.stored_dtype(name) for name in self.shapes}
        self.dtypes = {name: dtype or own[name] for name in self.shapes}
        self.main_dtype = dtype or source.dtype
        self.sizes = {name: byte_count(self.dtypes[name], shape) for name, shape in self.shapes.items()}
        self.total, self.done = sum(self.sizes.values()), 0
        self.bad: list[str] = []  # tensors with NaN or Inf, all told at the end

    def write(self, folder: Path) -> None:
        write_companions(self.source.folder, folder, self.total)
        copy_classifier(self.source.folder, folder)
        if self.to == "native":
            write_json(folder / mistral.CONFIG, self.source.config.to_mistral())
            self._write_file(folder / mistral.WEIGHTS, list(self.shapes))
        else:
            ends = _begin_and_end_ids(self.source)
            write_json(folder / hf.CONFIG, self.source.config.to_hf(TORCH_NAMES[self.main_dtype], *ends))
            self._write_hf_weights(folder)
        if self.bad:
            raise CheckpointError(
                f"{self.source.folder}: NaN or Inf in the weights, as stored or as {self.main_dtype}: "
                f"{', '.join(self.bad)}"
            )

    def _write_hf_weights(self, folder: Path) -> None:
        names = sorted(self.shapes, key=hf.hf_name)
        shards: list[list[str]] = [[]]
        filled = 0
        for name in names:
            if shards[-1] and filled + self.sizes[name] > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self.sizes[name]
        if len(shards) == 1:
            self._write_file(folder / hf.WEIGHTS, names)
            return
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            self._write_file(folder / file, shard)
            weight_map |= {hf.hf_name(name): file for name in shard}
        metadata = {"total_parameters": count_parameters(self.source.config)[0], "total_size": self.total}
        write_json(folder / hf.INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _write_file(self, path: Path, names: list[str]) -> None:
        """Hugging Face's order within a file is the safetensors library's: by dtype, then by name."""
        spell = hf.hf_name if self.to == "hf" else str
        if self.to == "hf":
            order = list(STORAGE)
            names = sorted(names, key=lambda name: (-order.index(self.dtypes[name]), spell(name)))
        entries = [(spell(name), self.dtypes[name], self.shapes[name]) for name in names]
        before = self.done

        def report(done: int, _: int) -> None:
            self.done = before + done
            if self.progress is not None:
                self.progress(self.done, self.total)

        write_safetensors(path, entries, self._tensors(names), {"format": "pt"}, report)

    def _tensors(self, names: list[str]) -> Iterator[StoredTensor]:
        for name in names:
            tensor = self.source.tensor(name)
            if self.adapter is not None:
                tensor = self.adapter.merge(name, tensor, self.dtypes[name])
            tensor = cast(tensor, self.dtypes[name])
            if not is_finite(tensor):  # a cast keeps NaN and Inf, and may make Inf
                self.bad.append(name)
            if self.to == "hf" and hf.has_permuted_rows(name):
                rows = hf.to_hf_rows(tensor.array, self.source.config.head_dim)
                tensor = StoredTensor.from_array(rows, tensor.dtype)
            yield tensor
            self.source.release(name)


def _begin_and_end_ids(source: Checkpoint) -> tuple[int, int]:
    """The tokenizer's; where there is none that fits, 1 and 2, which all released models have."""
    try:
        tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    except CheckpointError:
        return 1, 2
    return tokenizer.bos_id, tokenizer.eos_id
