"""This package beside what else runs these models on a processor: `python bench/compare_rivals.py` (`make bench`).

Each rival runs in an environment of its own (`bench/rivals/environments.py` makes them), in a worker process that takes
turns with ours: a repeat of one, the same repeat of the other, on the same weights at the same bits and with as many
threads. So a slow moment of the machine hits both; a ratio is the median over repeats of two neighbours.

What is measured stands in results/rivals.json after each column, and a column that stands there is not measured again
(--again does) unless other work kept the machine busy meanwhile. results/rivals.md and .png are written from that file.
The settings that each rival runs with, the fastest we know, stand in its worker. Ours is the whole engine, not a model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

from make_checkpoint import CHECKPOINTS, SHAPES, make_checkpoint

from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.gguf_writer import convert_to_gguf
from maestrale.checkpoint.writer import atomic_file

RIVALS_FOLDER = Path(__file__).parent / "rivals"
sys.path.insert(0, str(RIVALS_FOLDER))

from report import KINDS, OURS, QUIET, START, TOKENS, write_report  # noqa: E402 (it lies in the folder just named)

RESULTS = Path(__file__).parent / "results"
BITS = ("int4", "int8", "bf16")
STEPS = {"S": 64, "D": 16, "M": 16}  # of decoding one sequence, in one measurement; half as many of several
SEQUENCES, PROMPT = 16, 2048
BUSY = {"others": float("inf")}  # what has not been measured
SLOW = 20.0  # seconds: of what starts so slowly, two repeats suffice


@dataclass(frozen=True)
class Rival:
    """source: what its model is made of, or is: our own checkpoint, its Hugging Face or its GGUF copy.
    asis: the bits at which it loads the source itself. without: bits or shape → why it cannot run them."""

    source: str
    asis: tuple[str, ...] = ()
    without: dict[str, str] = field(default_factory=dict)


RIVALS = {
    OURS: Rival("native", asis=("bf16",)),
    "llama.cpp": Rival("gguf", asis=("bf16",)),
    "transformers": Rival("hf", asis=("bf16",), without=dict.fromkeys(("int4", "int8"), "no such kernels for a CPU")),
    "OpenVINO": Rival("hf"),
    "vLLM": Rival("hf", asis=("bf16",), without=dict.fromkeys(("int4", "int8"), "run in bf16 only here")),
    "ONNX Runtime": Rival("hf", without={"int8": "its builder writes none", "bf16": "none for a CPU"}),
    "CTranslate2": Rival("hf", without={"int4": "none for a CPU"}),
}


class Worker:
    """A side's process, ended with the block. loaded: its answer. seconds: from its start to that answer."""

    def __init__(self, name: str, model: Path, weights: str, chosen: argparse.Namespace, sequences: int, length: int):
        start = time.perf_counter()
        self.name = name
        environ = os.environ | {"OMP_NUM_THREADS": str(chosen.threads), "PYTHONWARNINGS": "ignore"}
        self.log = chosen.models / f"{script(name).stem}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [interpreter(name, chosen), str(script(name))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
            )
        self.questions, self.answers = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
        request = {"model": str(model), "weights": weights, "threads": chosen.threads}
        try:
            self.loaded = self.ask("load", **request, sequences=sequences, length=length)
        except SideEnded:
            self.close()
            raise
        self.seconds = time.perf_counter() - start

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        try:
            print(json.dumps({"do": do, **what}), file=self.questions, flush=True)
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise SideEnded(f"{self.name} ended with {status} at {do}: {self._last_line()}")
        return json.loads(line)

    def measure(self, kind: str, shape: str, turn: int) -> float:
        """Seconds of a pre-fill, or of a decode step."""
        what, size = kind.split()
        if what == "prefill":
            return self.ask("prefill", tokens=int(size), seed=turn)["seconds"]
        return self.ask("decode", sequences=int(size), steps=STEPS[shape] // (1 if size == "1" else 2))["seconds"]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.questions.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


class SideEnded(Exception):
    """A worker ended before it had answered."""


def script(name: str) -> Path:
    return RIVALS_FOLDER / f"{name.lower().replace('.', '_').replace(' ', '')}_worker.py"


def environment(name: str) -> str:
    """The name of its folder, and of its file of requirements."""
    return name.lower().replace(".", "-").replace(" ", "")


def interpreter(name: str, chosen: argparse.Namespace) -> str:
    """The Python of the side's environment; ours runs in this one."""
    if name == OURS:
        return sys.executable
    return chosen.python.get(name) or str(chosen.environments / environment(name) / "bin" / "python")


def prepare(name: str, shape: str, bits: str, chosen: argparse.Namespace) -> Path:
    """The model that the side loads, made where it is missing, whole or not at all."""
    rival = RIVALS[name]
    source = prepare_source(rival.source, shape, chosen)
    if bits in rival.asis:
        return source
    target = chosen.models / f"{shape}-{script(name).stem.removesuffix('_worker')}-{bits}"
    if not target.exists():
        say(f"{shape} {bits}: making {target}")
        partial = target.with_name(target.name + ".partial")
        command = [interpreter(name, chosen), str(script(name)), "prepare", source, partial, bits]
        with partial.with_name("prepare.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        partial.rename(target)
    return target


def prepare_source(layout: str, shape: str, chosen: argparse.Namespace) -> Path:
    native = chosen.checkpoints / shape
    if not native.exists():
        say(f"{shape}: writing {native}")
        make_checkpoint(SHAPES[shape], native)
    if layout == "native":
        return native
    copies = {"hf": f"{shape}-hf", "gguf": f"{shape}-bf16.gguf"}
    places = [folder / copies[layout] for folder in (chosen.checkpoints, chosen.models)]
    for place in places:
        if place.exists():
            return place
    say(f"{shape}: writing {places[1]}")
    if layout == "hf":
        convert(native, places[1], to="hf")
    else:
        convert_to_gguf(native, places[1], "bf16")
    return places[1]


class Book:
    """What has been measured, kept after each column: key → both sides' seconds and what goes with them."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = entry | {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            Path(temporary).write_text(json.dumps(self.entries, indent=1, sort_keys=True) + "\n")


def commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def compare(rival: str, shape: str, bits: str, kinds: list[str], chosen: argparse.Namespace, book: Book) -> None:
    """One rival beside ours, on one model."""
    key = f"{shape} {bits} {rival}"
    if reason := RIVALS[rival].without.get(bits) or RIVALS[rival].without.get(shape):
        book.keep(key, {"without": reason})
        return
    missing = [kind for kind in kinds if chosen.again or book.entries.get(f"{key} {kind}", BUSY)["others"] > QUIET]
    if not missing:
        return
    book.entries.pop(key, None)  # why it failed the last time
    try:
        models = {name: prepare(name, shape, bits, chosen) for name in (OURS, rival)}
        if START in missing:
            book.keep(f"{key} {START}", compare_start(key, models, bits, chosen))
        steady = [kind for kind in missing if kind != START]
        if steady:
            compare_steady(key, models, shape, bits, steady, chosen, book)
    except (SideEnded, subprocess.CalledProcessError) as error:
        say(f"{key}: {error}")
        book.keep(key, {"without": str(error)})


def compare_steady(
    key: str, models: dict[str, Path], shape: str, bits: str, kinds: list[str], chosen: argparse.Namespace, book: Book
) -> None:
    """Pre-fill and decoding: both are loaded once, and take turns at each kind."""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Worker(name, model, bits, chosen, SEQUENCES, PROMPT + 64))
            for name, model in models.items()
        ]
        for kind in kinds:
            taken: list[list[float]] = [[], []]
            began, before = time.perf_counter(), busy_seconds(sides)
            for turn in range(chosen.repeats + 1):
                for side in (0, 1) if turn % 2 else (1, 0):
                    taken[side].append(sides[side].measure(kind, shape, turn))
            ours, theirs = (values[1:] for values in taken)  # the first warmed up
            others = max(0.0, busy_seconds(sides) - before)
            facts = {name: sides[1].loaded[name] for name in ("version", "settings")}
            facts["others"] = others / (time.perf_counter() - began)
            book.keep(f"{key} {kind}", {"ours": ours, "theirs": theirs, **facts})
            say(
                f"{key} {kind}: {TOKENS[kind] / median(ours):.1f} and {TOKENS[kind] / median(theirs):.1f} tokens/s, "
                f"ratios {', '.join(f'{b / a:.2f}' for a, b in zip(ours, theirs, strict=True))}; "
                f"others kept {facts['others']:.2f} cores busy"
            )


def compare_start(key: str, models: dict[str, Path], bits: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """From process start to the first token after five, and the most memory when 512 tokens have been read."""
    found: dict[str, dict[str, list[float]]] = {name: {"first_token": [], "load": [], "peak": []} for name in models}
    turn, repeats = 0, chosen.repeats
    began, before = time.perf_counter(), busy_seconds([])
    worked = 0.0
    while turn <= repeats:  # the first warms the file cache
        for name, model in models.items():
            start = time.perf_counter()
            with Worker(name, model, bits, chosen, 1, 1024) as worker:
                worker.ask("prefill", tokens=5, seed=turn)
                seconds = time.perf_counter() - start
                if turn == 0:
                    found[name]["peak"].append(worker.ask("prefill", tokens=512, seed=turn)["peak"])
                worked -= busy_seconds([worker]) - busy_seconds([])
            if seconds > SLOW:
                repeats = 2
            if turn:
                for what, value in (("first_token", seconds), ("load", worker.seconds)):
                    found[name][what].append(value)
        turn += 1
    ours, theirs = found.values()
    facts = {name: worker.loaded[name] for name in ("version", "settings")}
    facts["others"] = max(0.0, busy_seconds([]) - before - worked) / (time.perf_counter() - began)
    say(
        f"{key} start: {median(ours['first_token']):.2f} and {median(theirs['first_token']):.2f} s; "
        f"others kept {facts['others']:.2f} cores busy"
    )
    return {"ours": ours["first_token"], "theirs": theirs["first_token"], "both": found, **facts}


def busy_seconds(workers: list[Worker]) -> float:
    """Of all cores since the machine started, without what the workers took: the others' work."""
    ticks = sum(int(Path("/proc/stat").read_text().split("\n")[0].split()[field]) for field in (1, 2, 3, 6, 7, 8))
    for worker in workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks -= int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def machine(threads: int) -> dict[str, Any]:
    """The processor and its limits, measured now."""
    from limits import measure_limits

    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = model[0].split(":")[1].strip() if model else platform.processor()
    return {"processor": name, "threads": threads, **measure_limits(threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in RIVALS if name != OURS]
    parser.add_argument("--models", dest="shapes", nargs="+", choices=("S", "D", "M"), default=["S", "D", "M"])
    parser.add_argument("--weights", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--rivals", nargs="+", choices=names, default=names)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, START), default=[*KINDS, START])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--again", action="store_true", help="measure what has been measured already, too")
    parser.add_argument("--prepare", action="store_true", help="make the models, and measure nothing")
    parser.add_argument("--report", action="store_true", help="write the table and the picture, and measure nothing")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where they are, or are to be made")
    parser.add_argument("--converted", dest="models", type=Path, default=CHECKPOINTS / "rivals", help="their copies")
    parser.add_argument("--environments", type=Path, default=RIVALS_FOLDER / ".envs")
    parser.add_argument("--python", nargs="*", default=[], metavar="RIVAL=PATH", help="a rival's Python elsewhere")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    chosen.python = dict(pair.split("=", 1) for pair in chosen.python)
    chosen.models.mkdir(parents=True, exist_ok=True)
    book = Book(chosen.results / "rivals.json")
    if not chosen.report and not chosen.prepare and ("machine" not in book.entries or chosen.again):
        book.keep("machine", machine(chosen.threads))
    for shape in [] if chosen.report else chosen.shapes:
        for bits in chosen.weights:
            for rival in chosen.rivals:
                if not Path(interpreter(rival, chosen)).exists():
                    say(f"{rival}: no environment; run  python bench/rivals/environments.py {rival!r}")
                elif chosen.prepare:
                    if bits not in RIVALS[rival].without and shape not in RIVALS[rival].without:
                        prepare(OURS, shape, bits, chosen)
                        prepare(rival, shape, bits, chosen)
                else:
                    compare(rival, shape, bits, chosen.kinds, chosen, book)
    if not chosen.prepare:
        write_report(book.entries, chosen.results)


if __name__ == "__main__":
    main()
