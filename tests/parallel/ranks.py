"""Run by torchrun: `ranks.py CASES OUT`. Each case is a folder, a mesh and what to ask; rank 0 writes what came out.
Where a case has an adapter, every other prompt goes through it, from the first on.

One start for many cases: starting processes costs more than running tiny models.
"""

import json
import math
import sys
from pathlib import Path

import torch

from maestrale.batch import CacheLayout
from maestrale.checkpoint.adapter import open_adapter
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.engine.engine import Engine
from maestrale.mesh import Mesh, shards
from maestrale.native_backend import stage as native_stage
from maestrale.parallel.link import Link
from maestrale.parallel.runner import open_ranks
from maestrale.plan import tensor_plan
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend import stage as torch_stage

PAGE, MAX_LEN, MAX_CHUNK = 4, 64, 16


def layout_for(windows):
    rings = tuple(math.ceil((MAX_LEN if w is None else min(MAX_LEN, w + MAX_CHUNK - 1)) / PAGE) for w in windows)
    return CacheLayout(PAGE, MAX_LEN, MAX_CHUNK, windows, rings, tuple(8 * ring for ring in rings))


def silent(done, total):
    pass


def answer(case):
    """What a case's prompts give, on rank 0; None on the others."""
    mesh = Mesh(*case["mesh"])
    link = Link(mesh, timeout=60)
    with open_checkpoint(case["folder"]) as checkpoint:
        config = checkpoint.config
        adapters = [open_adapter(case["adapter"], config)] if case["adapter"] else []
        sizes = {name: plan.size for name, plan in tensor_plan(config).items()}
        shard, dtype = shards(config, mesh, sizes)[link.rank], case["dtype"]

        def stage(layout):
            if case["backend"] == "native":
                cache = {"F32": "f32", "BF16": "bf16"}[dtype]
                return native_stage.open_stage(checkpoint, shard, layout, cache, case["weights"], 1, silent)
            return torch_stage.open_stage(checkpoint, shard, layout, dtype, "cpu", link.sum_stage, silent, adapters)

        try:
            runner = open_ranks(shard, link, 0, 1 << 30, lambda _: layout_for(config.windows), stage)
        except SystemExit:
            return None
    engine = Engine(runner, config.vocab_size, None, 8, ["a"] * len(adapters))
    params = SamplingParams(ignore_eos=True, experts=True, **case["params"])
    requests = [
        engine.submit(prompt, params, keep_logits=True, adapter="a" if adapters and i % 2 == 0 else None)
        for i, prompt in enumerate(case["prompts"])
    ]
    while engine.has_work:
        engine.step()
    runner.close()
    return [
        {
            "tokens": request.completions[0].token_ids,
            "logits": [row.tolist() for row in request.logits],
            "experts": request.completions[0].experts,
        }
        for request in requests
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = [answer(case) for case in json.loads(Path(sys.argv[1]).read_text())]
    if answers[0] is not None:
        Path(sys.argv[2]).write_text(json.dumps(answers))
