"""`maestrale inspect`: what a model folder holds and what it takes to run it, from its headers alone."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.declare import Option
from maestrale.config import DEFAULT_CONTEXT, ModelConfig
from maestrale.errors import CheckpointError, UsageError
from maestrale.values import MAX_SIZE

if TYPE_CHECKING:
    from maestrale.checkpoint.reader import Checkpoint

_LAYOUTS = {
    "packed": "packed (params.json, packed.safetensors)",
    "mistral": "native (params.json)",
    "hf": "Hugging Face (config.json)",
    "gguf": "GGUF",
}


def inspect(
    path: opt.Model = None,
    length: Annotated[
        int | None,
        Option(help=f"Tokens of a sequence; without it the model's context, or {DEFAULT_CONTEXT}."),
    ] = None,
    batch: Annotated[int, Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, Option(help="To run in: float32, bfloat16, float16 or auto (as stored).")] = "auto",
    cache: opt.Cache = "auto",
    devices: Annotated[
        str | None,
        Option(help="Which divisions fit these: 2x24GB, or 8x80GB."),
    ] = None,
    device_bandwidth: Annotated[float, Option(help="With --devices: of a device's memory, GB/s.")] = 1000.0,
    link: Annotated[float, Option(help="With --devices: between two devices, GB/s.")] = 25.0,
    check_tensors: Annotated[
        bool, Option("--check-tensors", help="Read all weights; name those with NaN or Inf and leave with 3.")
    ] = False,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    as_json: opt.Json = False,
) -> None:
    """Show a model's architecture, parameters, memory and tokenizer.

    Only headers are read.
    """
    from maestrale.checkpoint.dtypes import byte_count, read_dtype
    from maestrale.checkpoint.reader import check_finite, open_checkpoint
    from maestrale.cli.splits import read_devices, splits
    from maestrale.launch import model_folder

    planned = None if devices is None else read_devices(devices, device_bandwidth, link)
    for name, value in (("length", length), ("batch", batch)):
        if value is not None and not 0 < value <= MAX_SIZE:
            raise UsageError(f"--{name} {value}: expected a whole number from 1 to {MAX_SIZE}")
    with open_checkpoint(model_folder(path), ignore_unexpected) as checkpoint:
        facts = describe(checkpoint, length, batch, read_dtype(dtype, checkpoint.dtype), cache)
        if planned is not None:
            element_bytes = byte_count(facts["weights"]["dtype"], (1,))
            facts["splits"] = splits(checkpoint.config, planned, facts["cache"]["length"], batch, element_bytes)
        if check_tensors:
            facts["bad_tensors"] = check_finite(checkpoint)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(_rows(facts), sys.stdout.isatty())
    if bad := facts.get("bad_tensors"):
        raise CheckpointError(f"{facts['path']}: NaN or Inf in the weights: {', '.join(bad)}")


def describe(checkpoint: Checkpoint, length: int | None, batch: int, dtype: str, cache: str = "auto") -> dict[str, Any]:
    """What `--json` prints. Sizes in bytes, lengths in tokens; weights.bits: stored for a weight, on average.

    cache.longest_context: the most tokens of each of `batch` sequences that fit memory.cache_budget; null where any
    length does, which windows in all layers make possible.
    """
    from maestrale.checkpoint.dtypes import byte_count
    from maestrale.choices import cache_element, kernels_here, longest_context
    from maestrale.memory import available_memory, cache_budget
    from maestrale.plan import cache_bytes, count_parameters

    config = checkpoint.config
    stored = checkpoint.stored_bits()
    element_bytes = byte_count(dtype, (1,))
    total, active = count_parameters(config)
    weight_bytes, memory = total * element_bytes, available_memory()
    budget = cache_budget(memory, weight_bytes)
    length = length or config.max_position_embeddings or DEFAULT_CONTEXT
    unwindowed = replace(config, sliding_window=(None,) * config.n_layers)
    kept = cache_element(config, dtype, cache)
    longest = longest_context(config, MAX_SIZE, batch, kept, budget)
    return {
        "path": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "files": {path.name: path.stat().st_size for path in _weight_files(checkpoint.folder)},
        "config": asdict(config),
        "parameters": {"total": total, "active": active},
        "tokenizer": _tokenizer(checkpoint.folder, config),
        "weights": {
            "stored": {kind: bits // 8 for kind, bits in stored.items()},
            "bits": round(stored.total() / total, 3),
            "dtype": dtype,
            "bytes": weight_bytes,
        },
        "cache": {
            "length": length,
            "batch": batch,
            "bytes": batch * cache_bytes(config, length, kept),
            "bytes_without_windows": batch * cache_bytes(unwindowed, length, kept),
            "longest_context": None if longest == MAX_SIZE else longest,
        },
        "kernels": kernels_here(),
        "memory": {"available": memory, "cache_budget": budget, "fits": weight_bytes <= memory and length <= longest},
    }


def _weight_files(folder: Path) -> list[Path]:
    from maestrale.checkpoint.folder import find_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opening the checkpoint has warned already
        return list(find_weights(folder)[1])


def _tokenizer(folder: Path, config: ModelConfig) -> dict[str, Any]:
    from maestrale.text.tokenizer import load_tokenizer

    try:
        return {"kind": load_tokenizer(folder, config.vocab_size).kind}
    except CheckpointError as error:
        return {"kind": None, "error": str(error)}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of each line; a label alone begins a group."""
    config, files, cache, memory = facts["config"], facts["files"], facts["cache"], facts["memory"]
    total, active = facts["parameters"]["total"], facts["parameters"]["active"]
    names = list(files)
    weights = facts["weights"]
    rows = [
        ("Model", facts["path"]),
        ("layout", _LAYOUTS[facts["layout"]]),
        ("files", f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}, {_size(sum(files.values()))}"),
        ("tokenizer", facts["tokenizer"]["kind"] or f"none: {facts['tokenizer']['error']}"),
        ("parameters", f"{total:,}" if active == total else f"{total:,}, of which a token uses {active:,}"),
        ("Architecture", ""),
    ]
    for name, value in config.items():
        if name == "sliding_window":
            value = _windows(value)
        elif name == "moe" and value is not None:
            value = f"{value['num_experts']} experts, {value['num_experts_per_tok']} for each token"
        elif value is not None and not isinstance(value, bool):
            value = f"{value:,.12g}"  # 1,000,000 and 1e-05
        rows.append((name, {None: "none", False: "no", True: "yes"}.get(value, value)))
    sequences = "" if cache["batch"] == 1 else f" for each of {cache['batch']:,} sequences"
    longest = "any" if cache["longest_context"] is None else f"{cache['longest_context']:,} tokens"
    rows += [
        ("Memory", ""),
        ("weights, stored", ", ".join(f"{_size(size)} of {kind}" for kind, size in weights["stored"].items())),
        ("bits a weight", f"{weights['bits']:g}"),
        (f"weights, as {weights['dtype']}", _size(weights["bytes"])),
        ("cache", f"{_size(cache['bytes'])} at {cache['length']:,} tokens{sequences}"),
        ("without windows", _size(cache["bytes_without_windows"])),
        ("memory here", f"{_size(memory['available'])}, of which {_size(memory['cache_budget'])} for the cache"),
        ("kernels here", facts["kernels"]),
        ("fits here", "yes" if memory["fits"] else "no"),
        ("longest that fits", longest),
    ]
    if "splits" in facts:
        rows += [("Divisions", "")]
        rows += [(_division(split), _cost(split)) for split in facts["splits"]] or [
            ("none", "the model cannot be divided so")
        ]
    if "bad_tensors" in facts:
        bad = facts["bad_tensors"]
        rows += [("Tensors", ""), ("with NaN or Inf", ", ".join(bad) or "none")]
    return rows


def _division(split: dict[str, Any]) -> str:
    experts = f", {split['expert']} groups of experts" if split["expert"] > 1 else ""
    stages, shards = split["pipeline"], split["tensor"]
    return f"{stages} stage{'s' * (stages > 1)} x {shards} shard{'s' * (shards > 1)}{experts}"


def _cost(split: dict[str, Any]) -> str:
    held = f"{_size(split['weight_bytes'])} of weights and {_size(split['cache_bytes'])} of cache on a rank"
    if not split["fits"]:
        return f"does not fit: {held}"
    return f"{held}; {split['seconds_per_token'] * 1e3:.3g} ms a step, {split['tokens_per_second']:,.0f} tokens/s"


_size = opt.readable_bytes


def _windows(pattern: list[int | None]) -> str:
    """[4096] * 32 → "4,096 in all layers"; of a mixed pattern, each run of layers."""
    if set(pattern) == {None}:
        return "none"
    if len(set(pattern)) == 1:
        return f"{pattern[0]:,} in all layers"
    runs = [(window, len(list(run))) for window, run in groupby(pattern)]
    return "by layer: " + ", ".join(
        f"{count} x {'none' if window is None else f'{window:,}'}" for window, count in runs
    )


def _show(rows: list[tuple[str, str]], terminal: bool) -> None:
    """On a terminal a table with bold groups; elsewhere aligned columns, one fact a line."""
    if not terminal:
        width = max(len(label) for label, _ in rows) + 2
        for label, value in rows:
            print(f"{label:{width}}{value}".rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        head = label[0].isupper()
        table.add_row(Text(label, "bold") if head else Text(f"  {label}"), Text(value, "bold" if head else ""))
    Console().print(table)
