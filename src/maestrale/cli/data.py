"""`maestrale data check`: what is in a file of training data, and what is wrong with it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import DataError, UsageError

if TYPE_CHECKING:
    from maestrale.config import ModelConfig

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # as other formats say it
_LORA_SHARE = 0.01  # of the weights, about what rank 16 on all layers adds


def data(
    action: Annotated[str, Argument(help="What to do.", metavar="check")],
    file: Annotated[Path, Argument(help="A .jsonl file, or .parquet with the parquet extra.")],
    model: Annotated[Path | None, Option(help="Count tokens as this model does; else as the bundled one.")] = None,
    task: Annotated[str, Option(help="What the data is for.", metavar="lm|dpo|classify")] = "lm",
    seq_len: Annotated[int, Option(help="Longest sample in training, in tokens.")] = 2048,
    fix: Annotated[Path | None, Option(help="Write a mended copy here: bad lines mended or left out.")] = None,
    force: Annotated[bool, Option("--force", help="Replace what FIX names.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Check training data.

    Shows every bad line with its cause, tokens, samples over the length, time and memory.

    Lines are {"messages": [...], "tools": [...]} or {"text": ...}; for dpo {"prompt", "chosen", "rejected"}; for
    classify {"text", "label"}. Leaves with 3 where a line cannot be used.
    """
    from maestrale.checkpoint.reader import open_checkpoint
    from maestrale.launch import model_folder
    from maestrale.text.samples import TASKS, read_samples
    from maestrale.text.tokenizer import load_tokenizer

    if action != "check":
        raise UsageError(f"data {action}: expected check")
    if task not in TASKS:
        raise UsageError(f"--task {task}: expected one of {', '.join(TASKS)}")
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: expected at least 2")
    with open_checkpoint(model_folder(model)) as checkpoint:
        config, folder = checkpoint.config, checkpoint.folder
    tokenizer = load_tokenizer(folder, config.vocab_size)
    samples, faults = read_samples(file, tokenizer, task)
    facts = _facts(samples, task, seq_len) | {"file": str(file), "bad_lines": len(faults)}
    if samples:
        facts |= _estimate(config, facts["tokens"], seq_len)
    if fix is not None:
        facts |= _fix(file, fix, task, tokenizer, force)
    if as_json:
        print(json.dumps(facts | {"faults": [vars(fault) for fault in faults]}, ensure_ascii=False))
    else:
        for fault in faults:
            print(f"{file}:{fault.line}: {fault.cause}")
        print(_told(facts))
    if faults and fix is None:
        raise DataError(
            f"{file}: {len(faults)} of {len(faults) + len(samples)} lines cannot be used; --fix FILE mends a copy"
        )
    if not samples and fix is None:
        raise DataError(f"{file}: holds no sample")


def mend(value: Mapping[str, Any]) -> dict[str, Any]:
    """A line as it should have been: other formats' names for the parts of a chat, weights only where they can be,
    nothing after the assistant's last answer."""
    mended = dict(value)
    said = mended.pop("conversations", None)
    if isinstance(said, list) and "messages" not in mended:
        mended["messages"] = said
    messages = mended.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        mended["messages"] = messages = [_mend_message(message) for message in messages]
        while messages and messages[-1].get("role") != "assistant":
            messages.pop()
    return mended


def _mend_message(message: Mapping[str, Any]) -> dict[str, Any]:
    mended = dict(message)
    for other, name in (("from", "role"), ("value", "content")):
        if other in mended and name not in mended:
            mended[name] = mended.pop(other)
    if isinstance(mended.get("role"), str):
        mended["role"] = _ROLES.get(mended["role"].lower(), mended["role"].lower())
    weight = mended.get("weight")
    if weight is not None and (mended.get("role") != "assistant" or type(weight) not in (int, float)):
        del mended["weight"]
    return mended


def _fix(file: Path, target: Path, task: str, tokenizer: Any, force: bool) -> dict[str, Any]:
    """Writes the mended copy; lines kept as they were, mended, and left out."""
    from maestrale.checkpoint.writer import atomic_file
    from maestrale.errors import RequestError
    from maestrale.text.samples import READERS, Row, read_rows

    if target.suffix != ".jsonl" or target.resolve() == file.resolve():
        raise UsageError(f"--fix {target}: expected another file, one that ends in .jsonl")
    kept = mended = dropped = 0
    with atomic_file(target, force) as partial, open(partial, "w", encoding="utf-8") as out:
        for row in read_rows(file):
            for value in [row.value] if row.cause else [row.value, mend(row.value)]:
                try:
                    if not row.cause:
                        READERS[task](Row(row.line, value), tokenizer)
                        break
                except RequestError:
                    continue
            else:
                dropped += 1
                continue
            kept, mended = kept + (value is row.value), mended + (value is not row.value)
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
    return {"fixed": str(target), "kept": kept, "mended": mended, "left_out": dropped}


@dataclass(frozen=True)
class _Size:
    line: int
    tokens: int
    learnt: int


def _facts(samples: list[Any], task: str, seq_len: int) -> dict[str, Any]:
    sizes = [_size(sample, task) for sample in samples]
    tokens = sorted(size.tokens for size in sizes)
    over = [size.line for size in sizes if size.tokens > seq_len]
    return {
        "samples": len(samples),
        "tokens": sum(tokens),
        "learnt_tokens": sum(size.learnt for size in sizes),
        "median_tokens": tokens[len(tokens) // 2] if tokens else 0,
        "longest_tokens": tokens[-1] if tokens else 0,
        "seq_len": seq_len,
        "over_length": len(over),
        "over_length_lines": over,
    }


def _size(sample: Any, task: str) -> _Size:
    if task == "dpo":
        both = (sample.chosen, sample.rejected)
        return _Size(sample.line, max(len(s.ids) for s in both), sum(int((s.weights > 0).sum()) for s in both))
    learnt = int((sample.weights > 0).sum()) if task == "lm" else 1
    return _Size(sample.line, len(sample.ids), learnt)


def _estimate(config: ModelConfig, tokens: int, seq_len: int) -> dict[str, Any]:
    """Seconds of an epoch and bytes, with an adapter and with all weights.

    A token takes 2 operations a weight forward, and backward 2 more towards the input and 2 towards each weight that
    learns. Speed: a float32 matrix product here and now. Bytes: bfloat16 weights, or 16 a weight that learns (weight,
    gradient, two moments in float32), and what one sequence of seq_len keeps for its gradient.
    """
    import numpy as np

    from maestrale.plan import count_parameters

    total, active = count_parameters(config)
    square = np.ones((768, 768), np.float32)
    best = 1.0
    for _ in range(3):
        start = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - start)
    speed = 2 * 768**3 / best
    kept = seq_len * config.n_layers * 4 * (8 * config.dim + 4 * config.hidden_dim)
    return {
        "seconds_lora": round(4 * active * tokens / speed, 1),
        "seconds_full": round(6 * active * tokens / speed, 1),
        "bytes_lora": int(total * (2 + 16 * _LORA_SHARE)) + kept,
        "bytes_full": 16 * total + kept,
    }


def _told(facts: Mapping[str, Any]) -> str:
    lines = [
        f"{facts['file']}: {facts['samples']:,} samples, {facts['bad_lines']:,} bad lines; {facts['tokens']:,} tokens, "
        f"{facts['learnt_tokens']:,} learnt; median {facts['median_tokens']:,}, longest {facts['longest_tokens']:,}"
    ]
    if facts["over_length"]:
        some = ", ".join(map(str, facts["over_length_lines"][:10])) + (" …" if facts["over_length"] > 10 else "")
        lines.append(f"over the length of {facts['seq_len']:,} tokens: {facts['over_length']:,} (lines {some})")
    if "bytes_lora" in facts:
        costs = [
            f"{_duration(facts[f'seconds_{name}'])} and {opt.readable_bytes(facts[f'bytes_{name}'])} with {what}"
            for name, what in (("lora", "an adapter"), ("full", "all weights"))
        ]
        lines.append(f"an epoch takes about {', '.join(costs)}")
    if "fixed" in facts:
        counts = f"{facts['kept']} lines kept, {facts['mended']} mended, {facts['left_out']} left out"
        lines.append(f"{facts['fixed']}: {counts}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
