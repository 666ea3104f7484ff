"""Fine-tuning beside transformers + peft, step by step in turns: `python bench/finetune.py --steps 10`.

The same random checkpoint of shape S, the same batches (two documents of 512 tokens), bf16 with fp32 state, AdamW, one
thread. LoRA: rank 16 on all linear layers of the blocks. Each side is a process of its own; a step of one, then a step
of the other. Writes and prints medians with their spread, the peak of resident memory and the losses.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, RANK, LR = 2, 512, 16, 1e-4


def batches(step: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(step).integers(3, 32000, (BATCH, LENGTH)).tolist()


def ours(folder: Path, method: str) -> Callable[[int], float]:
    import numpy as np

    from maestrale.checkpoint.reader import open_checkpoint
    from maestrale.text.samples import Sample
    from maestrale.torch_backend.train.finetune import prepare
    from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
    from maestrale.torch_backend.train.objective import Language
    from maestrale.torch_backend.train.packing import pack_samples
    from maestrale.torch_backend.train.step import keep_less, learn, new_optimizer

    settings = FinetuneSettings(
        model=str(folder),
        train="",
        out="",
        method=method,
        rank=RANK,
        targets=("attention", "ffn"),
        seq_len=LENGTH,
        batch_size=BATCH,
        micro_batch=BATCH,
        lr=LR,
    )
    with open_checkpoint(folder) as checkpoint:
        model = prepare(checkpoint, settings, 0).train()
    keep_less(model, settings)
    optimizer = new_optimizer(model, settings)

    def step(number: int) -> float:
        weights = np.append(0, np.ones(LENGTH - 1)).astype(np.float32)
        samples = [Sample(0, np.array(ids, np.int32), weights, True) for ids in batches(number)]
        packed, _ = pack_samples(samples, LENGTH)
        return learn(model, optimizer, Language(packed), np.arange(BATCH), settings).loss

    return step


def theirs(folder: Path, method: str) -> Callable[[int], float]:
    import peft
    import torch
    import transformers

    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    model.config.use_cache = False
    if method == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=names))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(number: int) -> float:
        ids = torch.tensor(batches(number))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(side: str, folder: Path, method: str) -> None:
    """A side's process: a number comes in, that step is done, (seconds, loss, peak of memory) go out."""
    step = {"ours": ours, "theirs": theirs}[side](folder, method)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = step(int(line))
        print(json.dumps([time.perf_counter() - start, loss, peak_memory()]), flush=True)


def peak_memory() -> int:
    """Bytes of this program. Not getrusage's: that begins with the peak of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


class Side:
    def __init__(self, side: str, folder: Path, method: str):
        command = [sys.executable, "-W", "ignore", __file__, "--work", side, str(folder), method]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0
        while self._read() != "ready":
            pass

    def _read(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit("a side ended early")
        return line.strip()

    def step(self, number: int, counts: bool) -> None:
        print(number, file=self.process.stdin, flush=True)
        seconds, loss, self.peak = json.loads(self._read())
        self.losses.append(loss)
        if counts:
            self.seconds.append(seconds)

    def summary(self) -> dict[str, Any]:
        """Ends the process."""
        self.process.communicate()
        speeds = [BATCH * LENGTH / seconds for seconds in self.seconds]
        return {
            "tokens_per_second": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "peak_bytes": self.peak,
            "losses": self.losses,
        }


def compare(folders: dict[str, Path], method: str, steps: int) -> dict[str, Any]:
    sides = {name: Side(name, folder, method) for name, folder in folders.items()}
    for number in range(steps + 2):
        for side in sides.values():
            side.step(number, counts=number >= 2)
    ours, theirs = (side.seconds for side in sides.values())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    result: dict[str, Any] = {name: side.summary() for name, side in sides.items()}
    return result | {"ratio": statistics.median(ratios), "ratio_lowest": min(ratios), "ratio_highest": max(ratios)}


def table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [
        "# Fine-tuning beside transformers and peft",
        "",
        f"{machine['processor']}, one thread; torch {machine['torch']}, transformers {machine['transformers']}, peft "
        f"{machine['peft']}; {found['date']}; load average {machine['load']:.1f} at the start.",
        f"S (125 M parameters), {BATCH} sequences of {LENGTH} tokens a step, bf16 with fp32 state, AdamW; LoRA of "
        f"rank {RANK} on all linear layers of the blocks. Medians of {found['steps']} steps taken in turns, after two "
        "that do not count. Ratio: above 1, Maestrale is faster. Peak: of resident memory.",
        "",
        "| method | Maestrale tokens/s | transformers tokens/s | ratio (spread) | peak, Maestrale | transformers "
        "| last loss: ours, theirs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, row in found["methods"].items():
        ours, theirs = row["ours"], row["theirs"]
        lines.append(
            f"| {method} | {ours['tokens_per_second']:,.0f} | {theirs['tokens_per_second']:,.0f} | {row['ratio']:.2f} "
            f"({row['ratio_lowest']:.2f} … {row['ratio_highest']:.2f}) | {ours['peak_bytes'] / 2**20:,.0f} MiB | "
            f"{theirs['peak_bytes'] / 2**20:,.0f} MiB | {ours['losses'][-1]:.3f}, {theirs['losses'][-1]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--checkpoints", type=Path, help="where S and S-hf are, or are to be made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        side, folder, method = chosen.work
        work(side, Path(folder), method)
        return
    # Not further up: the other side's process must not hold what it does not need.
    from compare_transformers import CHECKPOINTS, machine_facts, prepare

    both = prepare("S", chosen.checkpoints or CHECKPOINTS).values()
    folders = dict(zip(("ours", "theirs"), both, strict=True))
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "steps": chosen.steps,
        "machine": machine_facts() | {"peft": importlib.metadata.version("peft")},
        "methods": {method: compare(folders, method, chosen.steps) for method in chosen.methods},
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "finetune-vs-peft.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.results / "finetune-vs-peft.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
