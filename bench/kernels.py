"""The native backend's linear kernels beside what the processor can do at most, and beside torch's bf16 linear.

    python bench/kernels.py [--threads 2] [--rows 1,4,16,512] [--formats int4,int8,bf16] [--clock wall|cpu]

For each format and number of rows: weights [4096, 4096] in rotation over 1 GB (no cache holds them), on 2 MB pages,
interleaved with torch on bf16 weights likewise and with a plain read of the same memory. GB/s count the weight's
bytes, scales included; TOP/s count 2 operations for each weight and row. `--clock cpu` takes the CPU time of a single
thread: for machines that others use too. The last line is JSON.
"""

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from maestrale.checkpoint.packed import part_layout
from maestrale.errors import UsageError
from maestrale.native_backend import kernels

N = K = 4096
GROUP = 32
BYTES = 1 << 30
DTYPES = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8, "F16": np.float16, "I32": np.int32}


def memory(size: int) -> np.ndarray:
    """Bytes on 2 MB pages where the system has them, written once."""
    page = 2 << 20
    area = mmap.mmap(-1, size + page)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    start = -whole.ctypes.data % page
    whole = whole[start : start + size]
    some = np.random.default_rng(0).integers(0, 64, page, np.uint8)  # no bit pattern of NaN in any format
    for at in range(0, size, page):
        whole[at : at + page] = some[: size - at]
    return whole


def weights(format: str, area: np.ndarray) -> tuple[list, int]:
    """As many weights as the area holds, and the bytes that a product with one reads."""
    layout = part_layout(format, (N, K), GROUP if format == "int4" else 0)
    parts = {
        name: np.full(shape, 1 / 64, DTYPES[dtype]) if name != "data" else None
        for name, (dtype, shape) in layout.items()
    }
    dtype, shape = layout["data"]
    size = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
    made = []
    for at in range(0, len(area) - size + 1, size):
        found = [parts.get(name) for name in ("scales", "sums", "offsets")]
        own = [None if part is None else part.copy() for part in found]
        made.append(kernels.native.Weight(format, N, K, GROUP if format == "int4" else 0, area[at : at + size], *own))
    return made, size + sum(part.nbytes for part in parts.values() if part is not None)


class Clock:
    """Times of interleaved calls: `best` and `median` seconds of each."""

    def __init__(self, now: Callable[[], float], seconds: float):
        self.now, self.seconds = now, seconds

    def __call__(self, *calls: Callable[[int], object]) -> list[tuple[float, float]]:
        times: list[list[float]] = [[] for _ in calls]
        end, turn = time.perf_counter() + self.seconds * len(calls), 0
        while time.perf_counter() < end or turn < 5:
            for call, taken in zip(calls, times, strict=True):
                start = self.now()
                call(turn)
                taken.append(self.now() - start)
            turn += 1
        return [(min(taken[1:]), statistics.median(taken[1:])) for taken in times]


def torch_linear(area: np.ndarray, threads: int) -> Callable[[np.ndarray], Callable[[int], object]] | None:
    """A function of (x, turn) → None: torch's bf16 linear on weights of the same memory; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    all_weights = torch.from_numpy(area).view(torch.bfloat16).view(-1, N, K)

    def call(x: np.ndarray) -> Callable[[int], object]:
        x_bf16 = torch.from_numpy(x).bfloat16()
        return lambda turn: torch.nn.functional.linear(x_bf16, all_weights[turn % len(all_weights)])

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,4,8,16,512")
    parser.add_argument("--formats", default="int4,int8,bf16")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of what is interleaved")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu: expected --threads 1, for it is one thread's time")
    try:
        isa = kernels.choose_isa()
    except UsageError as error:
        parser.error(str(error))
    native, pool = kernels.native, kernels.native.Pool(options.threads)
    clock = Clock(time.thread_time if options.clock == "cpu" else time.perf_counter, options.seconds)
    area = memory(BYTES)
    torch_call = torch_linear(area, options.threads)

    slices = BYTES // (8 << 20)

    def read(turn: int) -> None:
        at = turn % slices * (8 << 20)
        native.read_limit(pool, isa, area[at : at + (8 << 20)])

    def multiply(format: str, turn: int) -> None:
        native.multiply_limit(pool, isa, format, 100_000)

    def linear(made: list, x: np.ndarray, y: np.ndarray, turn: int) -> None:
        native.linear(pool, isa, made[turn % len(made)], x, y)

    results = []
    for format in options.formats.split(","):
        done = native.multiply_limit(pool, isa, format, 100_000)
        ((peak_time, _),) = clock(partial(multiply, format))
        peak = done / peak_time / 1e12
        made, bytes_read = weights(format, area)
        for rows in map(int, options.rows.split(",")):
            x, y = np.random.default_rng(0).standard_normal((rows, K), np.float32), np.empty((rows, N), np.float32)

            calls: list[Callable[[int], object]] = [partial(linear, made, x, y), read]
            if torch_call:
                calls.append(torch_call(x))
            (best, median), (read_best, _), *others = clock(*calls)
            found = {
                "format": format,
                "rows": rows,
                "isa": isa,
                "GB/s": bytes_read / best / 1e9,
                "GB/s median": bytes_read / median / 1e9,
                "GB/s limit": (8 << 20) / read_best / 1e9,
                "TOP/s": 2 * rows * N * K / best / 1e12,
                "TOP/s limit": peak,
                "times torch bf16": others[0][0] / best if others else None,
            }
            results.append(found)
            print(
                f"{format:5} {rows:4} rows  {found['GB/s']:6.1f} of {found['GB/s limit']:.1f} GB/s"
                f"  {found['TOP/s']:6.3f} of {peak:.3f} TOP/s"
                + (f"  {found['times torch bf16']:.2f} x torch bf16" if others else ""),
                flush=True,
            )
    print(json.dumps({"threads": options.threads, "clock": options.clock, "results": results}))


if __name__ == "__main__":
    main()
