"""`maestrale serve` on the GPU under load: 200 requests of 512 tokens in and 128 out, at several numbers of clients."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_parts import Bench
from http_client import ask, serving
from make_checkpoint import make_checkpoint
from serve_load import load, waits

READY = 480  # seconds: to read 14.5 GB and open


def serving_load(bench: Bench) -> None:
    """A folder of 7B's shapes is made first (14.5 GB of disk); tiny serves the bundled model."""
    requests, given, asked = (4, 8, 2) if bench.tiny else (200, 512, 128)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "7B"
        if bench.tiny:
            model = Path("stories")
        else:
            make_checkpoint(bench.dense, model)
        vocab_size = 4096 if bench.tiny else bench.dense.vocab_size
        started = time.perf_counter()
        options = ("--device", bench.device, "--backend", "torch", "--max-sequences", 128, "--max-len", 1024)
        os.environ["MAESTRALE_KERNELS"] = "triton"  # for the server, which is a process of its own
        with serving(model, *options) as server:
            asyncio.run(_ready(server.port))
            bench.report.add("from the start to ready", time.perf_counter() - started, "s")
            for clients in (2,) if bench.tiny else (8, 32, 128):
                for measured in (False, True):  # the first one captures each size's graph
                    draw = np.random.default_rng([clients, measured])
                    prompts = draw.integers(300, vocab_size, (requests, given)).tolist()
                    found = asyncio.run(load(server.port, clients, prompts, asked))
                wait, name = waits(found.replies), f"{clients} clients"
                bench.report.add(f"{name}: requests", requests / found.seconds, "/s")
                bench.report.add(f"{name}: tokens", found.tokens / found.seconds, "tokens/s")
                bench.report.add(f"{name}: first token, 99th percentile", wait["first_p99"], "ms")
                bench.report.add(f"{name}: between tokens, 99th percentile", wait["between_p99"], "ms")


async def _ready(port: int) -> None:
    for _ in range(2 * READY):
        if (await ask(port, "/ready", None)).status == 200:
            return
        await asyncio.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {READY} s")
