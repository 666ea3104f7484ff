"""Every division of a model over ranks gives what one process and transformers give: real processes, by torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.backends import open_engine, run
from parallel.start import PLAIN, torchrun
from tiny import DENSE, MIXED, hf_logits, hf_model, native_weights, write_native

from maestrale.checkpoint.adapter import Adapter, Delta, linear_layers, save_adapter
from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.config import MoeConfig
from maestrale.native_backend import kernels
from maestrale.sampling.params import SamplingParams

PROMPTS = [[1, 5, 9, 13, 17, 21, 25, 29, 33], [1, 40], [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59]]
MODELS = {
    "one_kv_head": replace(MIXED, n_layers=4, sliding_window=(None, 5, 5, None), n_kv_heads=1),
    "two_kv_heads": replace(DENSE, n_layers=5, sliding_window=(7,) * 5),
    "four_kv_heads": replace(DENSE, n_layers=4, sliding_window=(None,) * 4, n_kv_heads=4, tied_embeddings=True),
    "mixture": replace(DENSE, n_layers=4, sliding_window=(6,) * 4, moe=MoeConfig(4, 2), vocab_size=67),
}
MESHES = {
    2: [(2, 1, 1), (1, 2, 2), (1, 2, 1)],
    3: [(3, 1, 1)],
    4: [(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (1, 4, 2), (1, 4, 4)],
}
PACKED = {"one_kv_head": "int8", "mixture": "int4"}  # folders that are quantized besides
ADAPTED = ("two_kv_heads", "mixture")
NATIVE = [("one_kv_head", "int8"), ("two_kv_heads", "f32"), ("two_kv_heads", "int4"), ("four_kv_heads", "bf16")]
NATIVE += [("mixture", weights) for weights in ("bf16", "int8", "int4")]
ASKED = {"greedy": {"temperature": 0, "max_tokens": 8}, "seeded": {"temperature": 1, "seed": 3, "max_tokens": 8}}


@dataclass(frozen=True)
class Case:
    """weights: what linear layers get on the native backend; on torch, what the folder is packed in, or nothing."""

    model: str
    mesh: tuple[int, int, int]
    dtype: str = "F32"
    asked: str = "greedy"
    backend: str = "torch"
    weights: str = ""
    adapter: bool = False  # whether every other prompt goes through one, from the first on

    def __str__(self):
        kind = (self.model, *self.mesh, self.dtype, self.asked, self.backend, self.weights)
        return "-".join(map(str, kind)) + "adapter" * self.adapter

    @property
    def folder(self):
        return self.model + (f"-{self.weights}" if self.backend == "torch" and self.weights else "")


def cases(size):
    """For `size` ranks: every model over every mesh that divides it, greedy and drawn; packed where it is; one in
    bfloat16; and stages of every format on the native backend. Experts are divided where there are any."""
    for mesh in MESHES[size]:
        models = [name for name, config in MODELS.items() if mesh[2] == 1 or config.moe]
        for name in models:
            yield Case(name, mesh)
            yield Case(name, mesh, asked="seeded")
            if name in ADAPTED:
                yield Case(name, mesh, adapter=True)
            if name in PACKED:
                yield Case(name, mesh, weights=PACKED[name])
        yield Case(models[1 % len(models)], mesh, "BF16")
    if kernels.missing() is None:
        for name, weights in NATIVE:
            yield Case(name, (size, 1, 1), "F32" if weights == "f32" else "BF16", "greedy", "native", weights)
        yield Case("mixture", (size, 1, 1), "BF16", "seeded", "native", "int4")


def random_adapter(config):
    draw = np.random.default_rng(5)

    def matrix(*shape):
        return 0.3 * draw.standard_normal(shape, np.float32)

    layers = linear_layers(config).items()
    return Adapter({name: Delta(matrix(3, columns), matrix(rows, 3), 1.5) for name, (rows, columns) in layers}, "")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    made = {}
    for name, config in MODELS.items():
        model, folder = hf_model(config, seed=7), tmp_path_factory.mktemp(name)
        write_native(folder, config, native_weights(model, config))
        made[name] = (model, folder)
        if name in PACKED:
            packed = tmp_path_factory.mktemp("packed") / name
            quantize(folder, packed, Recipe(PACKED[name]), round_to_nearest)
            made[f"{name}-{PACKED[name]}"] = (model, packed)
        if name in ADAPTED:
            adapter = tmp_path_factory.mktemp("adapter") / name
            save_adapter(adapter, random_adapter(config), config, "native", "")
            merged = tmp_path_factory.mktemp("merged") / name
            convert(folder, merged, "native", adapter=adapter)
            made[f"{name}-adapter"], made[f"{name}-merged"] = (None, adapter), (None, merged)
    return made


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """From (size, case) to what came out; one torchrun for each number of ranks."""
    found = {}
    for size in MESHES:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        asked = [
            asdict(case)
            | {"folder": str(models[case.folder][1]), "params": ASKED[case.asked], "prompts": PROMPTS}
            | {"adapter": str(models[f"{case.model}-adapter"][1]) if case.adapter else None}
            for case in cases(size)
        ]
        (folder / "cases.json").write_text(json.dumps(asked))
        run_ranks(size, Path(__file__).parent / "ranks.py", folder / "cases.json", folder / "out.json")
        found |= dict(
            zip(((size, case) for case in cases(size)), json.loads((folder / "out.json").read_text()), strict=True)
        )
    return found


def run_ranks(size, *command):
    done = subprocess.run(
        [sys.executable, *torchrun(size), *map(str, command)],
        env=os.environ | PLAIN,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


ALL = [pytest.param(size, case, id=f"{size}-{case}") for size in MESHES for case in cases(size)]
# Adapters are compared with a model that they are merged into, and weights of fewer bits give logits of their own: both
# are held against one process alone.
TRANSFORMERS = [one for one in ALL if not one.values[1].adapter and one.values[1].weights in ("", "f32")]
# In bfloat16 torch's sums round differently over ranks and in other batches: a near tie may fall the other way.
ONE_PROCESS = [one for one in ALL if one.values[1].dtype == "F32" or one.values[1].backend == "native"]


def errors(folder, model, prompt, tokens, dtype):
    """|logits of one process - transformers' in float32|, of a prompt and what followed."""
    engine = open_engine(folder, "torch", dtype=dtype)
    request = engine.submit(prompt + tokens[:-1], SamplingParams(max_tokens=0), keep_logits=True)
    run(engine)
    return np.abs(np.stack(request.logits) - hf_logits(model, prompt + tokens[:-1]).numpy())


def alone(case, folder):
    """What one process gives: requests that have ended, their logits kept."""
    engine = open_engine(folder, case.backend, dtype=case.dtype, weights=case.weights or None)
    requests = [
        engine.submit(prompt, SamplingParams(ignore_eos=True, experts=True, **ASKED[case.asked]), keep_logits=True)
        for prompt in PROMPTS
    ]
    run(engine)
    return requests


@pytest.mark.parametrize(("size", "case"), TRANSFORMERS)
def test_ranks_give_what_transformers_gives(size, case, models, answers):
    model, folder = models[case.model]
    for prompt, answer in zip(PROMPTS, answers[size, case], strict=True):
        ids = prompt + answer["tokens"]
        error = np.abs(np.array(answer["logits"], np.float32) - hf_logits(model, ids[:-1]).numpy())
        if case.dtype == "F32":
            assert error.max() < 1e-4
        else:  # sums over ranks round once more
            assert error.mean() < 1.5 * errors(folder, model, prompt, answer["tokens"], case.dtype).mean()


@pytest.mark.parametrize(("size", "case"), ONE_PROCESS)
def test_ranks_give_the_tokens_of_one_process(size, case, models, answers):
    wanted = alone(case, models[case.folder][1])
    if case.adapter:
        adapted = alone(case, models[f"{case.model}-merged"][1])
        assert np.abs(adapted[0].logits[0] - wanted[0].logits[0]).max() > 0.1  # it counts
        wanted[::2] = adapted[::2]
    for answer, request in zip(answers[size, case], wanted, strict=True):
        assert answer["tokens"] == request.completions[0].token_ids
        assert answer["experts"] == request.completions[0].experts
        assert (answer["experts"] is None) == (MODELS[case.model].moe is None)
        if case.backend == "native":
            assert np.array_equal(np.array(answer["logits"], np.float32), np.stack(request.logits))  # to the last bit
        else:
            assert np.allclose(answer["logits"], np.stack(request.logits), rtol=0, atol=1e-4)
