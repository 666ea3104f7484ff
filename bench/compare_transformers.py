"""This package beside transformers, in bfloat16 on the CPU: `python bench/compare_transformers.py --all`.

Each model runs in two worker processes, one for each side, that take turns: a repeat of one, the same repeat of the
other. So a slow moment of the machine hits both, and each side's peak memory is its own. Both read the same weights;
transformers gets a converted copy. Its settings are the fastest we know: inference_mode, DynamicCache, sdpa without a
mask (all sequences are of one length), logits of the last position only, and on a mixture the faster of its experts
implementations. Decoding is timed over a loop of forward calls, and over `generate` itself; the faster one counts.

Our side is the whole engine (scheduling, sampling, detokenizing); theirs is the model and an argmax.
The results, losses too, go to bench/results/BACKEND-vs-transformers.json and .md, model by model: one that is not
measured this time stays as it is there. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

from make_checkpoint import CHECKPOINTS, SHAPES, make_checkpoint

from maestrale.checkpoint.convert import convert
from maestrale.cli.bench import CONTEXT, Stand, prompt
from maestrale.cli.limits import prefill_operations, step_bytes
from maestrale.memory import peak_memory

sys.path.append(str(Path(__file__).parent / "rivals"))

from limits import measure_limits

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, DECODE_TOKENS, BATCHES = 512, 32, (1, 8, 16)
OURS, THEIRS = "maestrale", "transformers"
KINDS = ["prefill", *(f"decode {size}" for size in BATCHES)]
THEIR_START = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.inference_mode():
    print(model.generate(torch.tensor([[1, 851, 349, 264, 1369]]), max_new_tokens=1, do_sample=False, pad_token_id=0))
"""


class TheirStand:
    """transformers on the test stand: the measurements of `maestrale.cli.bench.Stand`."""

    def __init__(self, folder: Path):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.cache = torch, transformers.DynamicCache
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.vocab_size = self.model.config.vocab_size
        self.best: dict[str, str] = {}

    def measure(self, kind: str) -> dict[str, Any]:
        """Seconds of a pre-fill or of a decode step, in the way that was fastest when this kind was first measured."""
        ways = self._ways(kind)
        if kind not in self.best:
            trials = {}
            for name, way in ways.items():
                way()
                trials[way()] = name
            self.best[kind] = trials[min(trials)]
        return {"seconds": ways[self.best[kind]](), "way": self.best[kind]}

    def _ways(self, kind: str) -> dict[str, Callable[[], float]]:
        if kind == "prefill":
            runs = {"forward": self.prefill}
        else:
            size = int(kind.split()[-1])
            runs = {"forward": lambda: self.loop(size), "generate": lambda: self.generate(size)}
        if not hasattr(self.model.config, "num_local_experts"):
            return runs
        experts = ("eager", "grouped_mm")  # batched_mm copies the weights of each token's experts: 47 GB at pre-fill
        return {f"{name}, {way}": self._with_experts(way, run) for way in experts for name, run in runs.items()}

    def _with_experts(self, way: str, run: Callable[[], float]) -> Callable[[], float]:
        def switched() -> float:
            self.model.set_experts_implementation(way)
            return run()

        return switched

    def prefill(self) -> float:
        torch = self.torch
        ids = torch.tensor([prompt(self.vocab_size, PROMPT_TOKENS, 0)])
        with torch.inference_mode():
            start = time.perf_counter()
            self.model(ids, past_key_values=self.cache(), use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - start

    def loop(self, size: int) -> float:
        """Seconds of a decode step, by calls of forward."""
        torch, cache = self.torch, self.cache()
        ids = self._prompts(size)
        with torch.inference_mode():
            ids = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            start = time.perf_counter()
            for _ in range(DECODE_TOKENS):
                ids = self.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1)
            return (time.perf_counter() - start) / DECODE_TOKENS

    def generate(self, size: int) -> float:
        """Seconds of a decode step of `generate`, from the first new token to the last."""
        times: list[float] = []

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return self.torch.zeros(ids.shape[0], dtype=self.torch.bool)

        ids = self._prompts(size)
        with self.torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=DECODE_TOKENS + 1,
                min_new_tokens=DECODE_TOKENS + 1,
                do_sample=False,
                stopping_criteria=[note],
                pad_token_id=0,
            )
        return (times[-1] - times[0]) / (len(times) - 1)

    def _prompts(self, size: int) -> Any:
        return self.torch.tensor([prompt(self.vocab_size, CONTEXT, seed) for seed in range(size)])


def work(side: str, folder: Path, backend: str) -> None:
    """A worker: reads a kind of measurement a line, answers with JSON a line."""
    if side == OURS:
        stand = Stand(folder, PROMPT_TOKENS, DECODE_TOKENS, BATCHES, backend=backend)

        def measure(kind: str) -> dict[str, Any]:
            if kind == "prefill":
                return {"seconds": stand.prefill()}
            found = stand.decode(int(kind.split()[-1]))
            return {"seconds": found.seconds, "engine": found.outside}
    else:
        theirs = TheirStand(folder)

        measure = theirs.measure

    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(line.strip()) | {"peak": peak_memory()}), flush=True)


class Worker:
    def __init__(self, side: str, folder: Path, backend: str):
        self.command = [sys.executable, __file__, "--worker", side, str(folder), "--backend", backend]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.questions, self.answers = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
        self._answer()

    def measure(self, kind: str) -> dict[str, Any]:
        print(kind, file=self.questions, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}: {' '.join(self.command)}")
        return json.loads(line)

    def close(self) -> None:
        self.questions.close()
        self.process.wait()


def compare(shape: str, folders: dict[str, Path], repeats: int, backend: str) -> dict[str, Any]:
    """The machine's limits are the best of all moments: what else it does slows them too."""
    import torch

    limits: dict[str, float] = {}
    say(f"{shape}: loading both")
    workers = {side: Worker(side, folder, backend) for side, folder in folders.items()}
    taken: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {OURS: [], THEIRS: []} for kind in KINDS}
    for kind in KINDS:  # warms up, and lets transformers choose its fastest way
        for worker in workers.values():
            worker.measure(kind)
    for repeat in range(repeats):
        for kind in KINDS:
            now: dict[str, Any] = measure_limits(torch.get_num_threads())
            rates = {"read_bytes_per_second": now["read_bytes_per_second"]}
            rates["matmul_operations_per_second"] = now["operations_per_second"]["bf16"]
            limits = {name: max(rate, limits.get(name, 0.0)) for name, rate in rates.items()}
            for side in (OURS, THEIRS) if repeat % 2 == 0 else (THEIRS, OURS):
                taken[kind][side].append(workers[side].measure(kind))
            so_far = {side: median(found["seconds"] for found in taken[kind][side]) for side in workers}
            ratio = so_far[THEIRS] / so_far[OURS]
            say(f"{shape}: repeat {repeat + 1} of {repeats}: {kind}: ratio of medians so far {ratio:.2f}")
    peaks = {side: workers[side].measure("prefill")["peak"] for side in workers}
    for worker in workers.values():
        worker.close()
    rows = {kind: summary(shape, kind, sides, limits) for kind, sides in taken.items()}
    return {"speed": rows, "peak_memory_bytes": peaks, "limits": limits}


def summary(shape: str, kind: str, sides: dict[str, list[dict[str, Any]]], limits: dict[str, float]) -> dict[str, Any]:
    """Tokens a second of both, the ratio (above 1: ours is faster), and our share of the machine's limit.

    ratio: the median over repeats of the two neighbours' ratio, so that a slow moment cancels out.
    """
    config = SHAPES[shape]
    tokens = PROMPT_TOKENS if kind == "prefill" else int(kind.split()[-1])
    seconds = {side: [found["seconds"] for found in values] for side, values in sides.items()}
    if kind == "prefill":
        least = prefill_operations(config, tokens) / limits["matmul_operations_per_second"]
    else:
        read = step_bytes(config, tokens, CONTEXT + DECODE_TOKENS // 2, 2)
        least = read / limits["read_bytes_per_second"]
    ratios = sorted(b / a for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True))
    row: dict[str, Any] = {"ratio": median(ratios), "ratio_lowest": ratios[0], "ratio_highest": ratios[-1]}
    row["limit_tokens_per_second"] = tokens / least
    for side, values in seconds.items():
        row[side] = {"tokens_per_second": tokens / median(values), "share_of_limit": least / median(values)}
        row[side] |= {"lowest": tokens / max(values), "highest": tokens / min(values)}
    row[THEIRS]["way"] = sides[THEIRS][0]["way"]
    if kind != "prefill":
        row[OURS]["engine_ms_per_step"] = 1e3 * median(found["engine"] for found in sides[OURS])
    return row


def start_up(folders: dict[str, Path], repeats: int, backend: str) -> dict[str, Any]:
    """Seconds from the shell to the first token of S, process start and exit included; theirs reads no tokenizer."""
    text = "This is a test"
    command = [sys.executable, "-m", "maestrale", "generate", str(folders[OURS]), "-p", text, "--max-tokens", "1"]
    command += ["--backend", backend]
    commands = {OURS: command, THEIRS: [sys.executable, "-c", THEIR_START, str(folders[THEIRS])]}
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for repeat in range(repeats + 1):
        for side, words in commands.items():
            start = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            seconds[side].append(time.perf_counter() - start)
        say(f"start-up {repeat} of {repeats}")
    rows = {
        side: {"seconds": median(values[1:]), "lowest": min(values[1:]), "highest": max(values[1:])}
        for side, values in seconds.items()
    }
    ratio = median(b / a for a, b in zip(seconds[OURS][1:], seconds[THEIRS][1:], strict=True))
    return {**rows, "ratio": ratio}


def prepare(shape: str, where: Path) -> dict[str, Path]:
    """The checkpoint and its Hugging Face copy, made where they are missing."""
    folders = {OURS: where / shape, THEIRS: where / f"{shape}-hf"}
    if not folders[OURS].exists():
        say(f"{shape}: writing {folders[OURS]}")
        make_checkpoint(SHAPES[shape], folders[OURS])
    if not folders[THEIRS].exists():
        say(f"{shape}: converting to {folders[THEIRS]}")
        convert(folders[OURS], folders[THEIRS], to="hf")
    return folders


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# The {found['backend']} backend beside transformers",
        "",
        "Medians of repeats taken in turns, in bfloat16. Limits, the best of all moments of the run: the processor's "
        "multiplications for pre-fill, reading memory for decoding. Beyond 100%: memory was faster than whenever it "
        "was looked at.",
        f"S: 125 M parameters. D: 2.0 G, the layers of Mistral 7B. M: 2.4 G, 2 of 8 experts a token. Pre-fill: one "
        f"prompt of {PROMPT_TOKENS} tokens. Decode: {DECODE_TOKENS} steps after {CONTEXT} tokens. Ratio: above 1, "
        "Maestrale is faster.",
        "",
        *(circumstances(shape, results) for shape, results in in_order(found)),
        "",
        "| model | | Maestrale tokens/s | transformers tokens/s | ratio (spread) | share of the limit: ours, theirs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, results in in_order(found):
        for kind, row in results["speed"].items():
            speeds = " | ".join(f"{row[side]['tokens_per_second']:,.1f}" for side in (OURS, THEIRS))
            both = ", ".join(f"{row[side]['share_of_limit']:.0%}" for side in (OURS, THEIRS))
            spread = f"{row['ratio']:.2f} ({row['ratio_lowest']:.2f} … {row['ratio_highest']:.2f})"
            lines.append(f"| {shape} | {kind} | {speeds} | {spread} | {both} |")
    lines += [
        "",
        "| model | peak memory, Maestrale | transformers | engine, ms a step at 1, 8, 16 |",
        "|---|---:|---:|---:|",
    ]
    for shape, results in in_order(found):
        peaks = " | ".join(f"{results['peak_memory_bytes'][side] / 2**30:.2f} GiB" for side in (OURS, THEIRS))
        engine = [row[OURS]["engine_ms_per_step"] for kind, row in results["speed"].items() if kind != "prefill"]
        lines.append(f"| {shape} | {peaks} | {', '.join(f'{ms:.2f}' for ms in engine)} |")
    if start := found.get("start_up"):
        lines += ["", "From the shell to the first token of S: " + ", ".join(
            f"{side} {start[side]['seconds']:.1f} s ({start[side]['lowest']:.1f} … {start[side]['highest']:.1f})"
            for side in (OURS, THEIRS)
        ) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def in_order(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(shape, found["models"][shape]) for shape in SHAPES if shape in found["models"]]


def circumstances(shape: str, results: dict[str, Any]) -> str:
    """Where, when and beside what a model was measured."""
    machine, limits = results["machine"], results["limits"]
    return (
        f"- {shape}: {machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {results['date']}; {results['repeats']} repeats; load average "
        f"{machine['load']:.1f} at the start, {machine['load_after']:.1f} at the end; "
        f"{limits['matmul_operations_per_second'] / 1e9:,.0f} G operations/s, "
        f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s."
    )


def machine_facts() -> dict[str, Any]:
    import torch
    import transformers

    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
    }


def write(kept: Path, found: dict[str, Any]) -> None:
    kept.write_text(json.dumps(found, indent=1) + "\n")
    kept.with_suffix(".md").write_text(table(found))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="S, D and M, and the start-up")
    parser.add_argument("--models", nargs="+", choices=("S", "D", "M"), default=[])
    parser.add_argument("--start-up", action="store_true", help="the time from the shell to the first token of S")
    parser.add_argument("--backend", choices=("native", "torch"), default="native")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where they are, or are to be made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker[0], Path(chosen.worker[1]), chosen.backend)
        return
    shapes = ["S", "D", "M"] if chosen.all else chosen.models
    if not shapes and not chosen.start_up:
        parser.error("give --all, --models or --start-up")
    chosen.results.mkdir(parents=True, exist_ok=True)
    kept = chosen.results / f"{chosen.backend}-vs-transformers.json"
    found = json.loads(kept.read_text()) if kept.exists() else {"backend": chosen.backend, "models": {}}
    for shape in shapes:
        folders = prepare(shape, chosen.checkpoints)
        machine = machine_facts()
        measured = compare(shape, folders, chosen.repeats, chosen.backend)
        machine["load_after"] = os.getloadavg()[0]
        measured |= {"machine": machine, "repeats": chosen.repeats, "date": time.strftime("%Y-%m-%d")}
        found["models"][shape] = measured
        write(kept, found)
    if chosen.all or chosen.start_up:
        found["start_up"] = start_up(prepare("S", chosen.checkpoints), chosen.repeats, chosen.backend)
        write(kept, found)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
