"""Run by torchrun: `ranks.py CASES OUT`. Each case is a folder, a mesh and what to ask; rank 0 writes what came out.

One start for many cases: starting processes costs more than running tiny models.
"""

import functools
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from maestrale.batch import CacheLayout
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.engine.engine import Engine
from maestrale.mesh import Mesh, shards
from maestrale.native_backend import stage as native_stage
from maestrale.parallel.link import Link, world
from maestrale.parallel.runner import open_ranks
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend import stage as torch_stage

PAGE, MAX_LEN, MAX_CHUNK = 4, 64, 16


def layout_for(windows):
    rings = tuple(math.ceil((MAX_LEN if w is None else min(MAX_LEN, w + MAX_CHUNK - 1)) / PAGE) for w in windows)
    return CacheLayout(PAGE, MAX_LEN, MAX_CHUNK, windows, rings, tuple(8 * ring for ring in rings))


def answer(case):
    """What a case's prompts give, on rank 0; None on the others."""
    mesh = Mesh(*case["mesh"])
    link = Link(mesh, timeout=60)
    with open_checkpoint(case["folder"]) as checkpoint:
        config = checkpoint.config
        shard, dtype = shards(config, mesh)[link.rank], case["dtype"]

        def stage(layout):
            if case["backend"] == "native":
                cache = {"F32": "f32", "BF16": "bf16"}[dtype]
                return native_stage.open_stage(checkpoint, shard, layout, cache, case["weights"], 1, lambda *_: None)
            return torch_stage.open_stage(checkpoint, shard, layout, dtype, "cpu", link.sum_stage, lambda *_: None)

        try:
            runner = open_ranks(shard, link, 0, lambda _: layout_for(config.windows), stage)
        except SystemExit:
            return None
    engine = Engine(runner, config.vocab_size, None, 8)
    requests = [
        engine.submit(prompt, SamplingParams(ignore_eos=True, **case["params"]), keep_logits=True)
        for prompt in case["prompts"]
    ]
    while engine.has_work:
        engine.step()
    runner.close()
    return [
        {"tokens": request.completions[0].token_ids, "logits": [row.tolist() for row in request.logits]}
        for request in requests
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    initialize, (rank, size, _), answers = dist.init_process_group, world(), []
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # A second group in one job needs a store of its own: a file, since a port that is free may not stay so.
        store = dist.FileStore(f"{sys.argv[2]}.{number}", size)
        dist.init_process_group = functools.partial(initialize, store=store, rank=rank, world_size=size)
        answers.append(answer(case))
    if answers[0] is not None:
        Path(sys.argv[2]).write_text(json.dumps(answers))
