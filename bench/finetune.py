"""Fine-tuning beside transformers + peft, step by step in turns: `python bench/finetune.py --steps 10`.

The same random checkpoint of shape S, the same batches (two documents of 512 tokens), bf16 with fp32 state, AdamW, one
thread. LoRA: rank 16 on all linear layers of the blocks. Each side is a process of its own; a step of one, then a step
of the other. Prints medians with their spread and the peak of resident memory; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    from maestrale.torch_backend.train.step import learn, new_optimizer

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
    with open_checkpoint(folder / "native") as checkpoint:
        model = prepare(checkpoint, settings, 0).train()
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
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).train()
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
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--work",
            side,
            "--folder",
            str(folder),
            "--method",
            method,
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0
        while self._read() != "ready":
            pass

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended early")
        return line.strip()

    def step(self, number: int, counts: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        seconds, loss, self.peak = json.loads(self._read())
        self.losses.append(loss)
        if counts:
            self.seconds.append(seconds)


def compare(folder: Path, method: str, steps: int) -> dict[str, object]:
    sides = {name: Side(name, folder, method) for name in ("ours", "theirs")}
    for number in range(steps + 2):
        for side in sides.values():
            side.step(number, counts=number >= 2)
    result: dict[str, object] = {"method": method}
    for name, side in sides.items():
        side.process.stdin.close()
        side.process.wait()
        speeds = [BATCH * LENGTH / seconds for seconds in side.seconds]
        result |= {f"{name}_tokens_per_s": statistics.median(speeds), f"{name}_peak_bytes": side.peak}
        low, high = min(speeds), max(speeds)
        print(
            f"{method:5} {name:7} {statistics.median(speeds):8.1f} tokens/s ({low:.1f} to {high:.1f}), "
            f"peak {side.peak / 2**20:,.0f} MiB, loss {side.losses[0]:.4f} to {side.losses[-1]:.4f}"
        )
    ratios = [b / a for a, b in zip(sides["ours"].seconds, sides["theirs"].seconds, strict=True)]
    result["speed_ratio"] = statistics.median(ratios)
    print(
        f"{method:5} faster by {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, step by step)"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--work", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work, chosen.folder, chosen.method)
        return
    from make_checkpoint import SHAPES, make_checkpoint

    from maestrale.checkpoint.convert import convert

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(SHAPES["S"], folder / "native")
        convert(folder / "native", folder / "hf", to="hf")
        print(json.dumps([compare(folder, method, chosen.steps) for method in chosen.methods]))


if __name__ == "__main__":
    main()
