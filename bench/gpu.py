"""One GPU against its own limits and against transformers: `python bench/gpu.py`.

    python bench/gpu.py [--only checks,7B,packed,windows,theirs,8x7B,bundled,serving] [--quick] [--results FILE]
    TRITON_INTERPRET=1 python bench/gpu.py --tiny --device cpu

Random weights of Mistral 7B and Mixtral 8x7B are made on the device (16 and 94 GB: one after the other). Each kernel is
checked against the reference on fresh random inputs; the ceilings (bytes copied and read a second, operations of a bf16
product) are measured in every run; each figure stands beside the limit that follows from them and its goal, and
transformers with a compiled static cache in the same file. Parts may be run one by one: the file keeps the latest of
each, losses too. A part that breaks off does not end the others, but the exit code is 1 then, and where a check fails.

--quick: one and 64 sequences only. --tiny: small models, which with --device cpu and TRITON_INTERPRET=1 show that the
script runs; those figures mean nothing, and are kept only where --results says where.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import triton
from gpu_parts import Bench
from gpu_report import Report

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def parts_of(bench: Bench) -> dict[str, Callable[[], None]]:
    """In an order in which nothing outlives its part, and what is most wanted comes first."""
    goals = {1: 0.90, 64: 0.75, 256: 0.75}, {1: 0.80, 64: 0.65}
    return {
        "checks": bench.checks,
        "7B": lambda: bench.family("7B", bench.dense, goals[0], bench.sizes),
        "packed": bench.packed,
        "windows": bench.windows,
        "8x7B": lambda: bench.family("8x7B", bench.mixture, goals[1], bench.sizes[:2]),
        "bundled": bench.bundled,
        "theirs": lambda: import_module("gpu_theirs").theirs(bench),  # what these two need may be missing
        "serving": lambda: import_module("gpu_serving").serving_load(bench),
    }


def what_is_missing(device: torch.device) -> str | None:
    """What Triton would stumble over minutes later."""
    if device.type != "cuda":
        needs = os.environ.get("TRITON_INTERPRET") != "1"
        return "on the CPU only Triton's interpreter runs: set TRITON_INTERPRET=1, and --tiny" if needs else None
    if not torch.cuda.is_available():
        return "no CUDA device; TRITON_INTERPRET=1 and --device cpu --tiny run the script itself"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "no C compiler: Triton builds its launcher with one; install gcc or set CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h: Triton builds its launcher against it; install Python's headers"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="some parts, with commas; all where it is left out")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if problem := what_is_missing(device):
        parser.error(problem)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    facts = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "quick": arguments.quick}
    report = Report(facts, arguments.results or (None if arguments.tiny else RESULTS))
    bench = Bench(device, arguments.quick, arguments.tiny, report)
    parts = parts_of(bench)
    wanted = arguments.only.split(",") if arguments.only else list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    print(facts, flush=True)
    good = run(report, "ceilings", bench.ceilings)
    for part in parts:
        if part in wanted:
            good &= run(report, part, parts[part])
            bench.clear()
    return 0 if good else 1


def run(report: Report, part: str, work: Callable[[], None]) -> bool:
    """Whether it came to its end, and no check failed."""
    report.begin(part)
    start, error = time.perf_counter(), None
    try:
        with torch.no_grad():  # not inference_mode: what transformers compiles would have to be compiled for it
            work()
    except Exception as problem:  # a device out of memory, another library's error: the next part may do better
        traceback.print_exc()
        error = f"{type(problem).__name__}: {str(problem)[:300]}"
    report.end(part, time.perf_counter() - start, error)
    return error is None and (part != "checks" or all(row["met"] for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
