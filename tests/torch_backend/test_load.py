"""Loading: which memory it takes, and that nothing is copied that need not be."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import DENSE, MIXTURE, TIED, hf_model, make_folder, native_weights, write_native

from maestrale.checkpoint.hf import hf_name
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.plan import tensor_plan
from maestrale.torch_backend.load import load_model

CPU = torch.device("cpu")


def mapped(path):
    """The address ranges at which this process has `path` mapped."""
    with open("/proc/self/maps") as lines:
        ranges = [line.split()[0].split("-") for line in lines if str(path) in line]
    return [range(int(start, 16), int(end, 16)) for start, end in ranges]


def lies_in(tensor, ranges):
    return any(tensor.data_ptr() in addresses for addresses in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_weights_are_used_where_the_file_is_mapped(tmp_path, dtype):
    folder = make_folder(tmp_path, DENSE, dtype=dtype)
    with open_checkpoint(folder) as checkpoint:
        model = load_model(checkpoint, dtype, CPU)
    ranges = mapped(folder / "consolidated.safetensors")
    assert all(lies_in(p, ranges) for p in model.parameters())
    with open_checkpoint(folder) as checkpoint:
        other = torch.float32 if dtype != torch.float32 else torch.bfloat16
        model = load_model(checkpoint, other, CPU)
    assert not any(lies_in(p, mapped(folder / "consolidated.safetensors")) for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_hf_weights_only_the_permuted_ones_are_copied(tmp_path):
    hf_model(DENSE).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        model = load_model(checkpoint, torch.float32, CPU)
    ranges = mapped(tmp_path / "model.safetensors")
    copied = {name for name, p in model.named_parameters() if not lies_in(p, ranges)}
    assert copied == {f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk")}


@pytest.mark.parametrize("config", [DENSE, MIXTURE, TIED])
@pytest.mark.parametrize("layout", ["native", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_its_value_and_place(tmp_path, config, layout, dtype):
    theirs = hf_model(config)
    weights = native_weights(theirs, config)
    if layout == "hf":
        theirs.save_pretrained(tmp_path)
    else:
        write_native(tmp_path, config, weights)
    seen = []
    with open_checkpoint(tmp_path) as checkpoint:
        model = load_model(checkpoint, dtype, CPU, lambda *progress: seen.append(progress))
    state = model.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight.to(dtype), atol=0, rtol=0)
    if config.tied_embeddings:
        assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    count = len(tensor_plan(config))
    assert seen == [(i, count) for i in range(1, count + 1)]


FIRST_TOKEN = """
import sys
from maestrale import LLM, SamplingParams
LLM(sys.argv[1], backend="torch", max_len=64).generate([[1, 5, 9]], SamplingParams(max_tokens=2))
print("torch" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_no_first_token_waits_for_torchs_compiler(tmp_path):
    """Importing it takes as long as importing torch, and an initial value drawn for a meta tensor imports it."""
    command = [sys.executable, "-c", FIRST_TOKEN, str(make_folder(tmp_path / "tiny", DENSE))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True False\n"


MEASURE = """
import sys, torch
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.torch_backend.load import load_model

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def sizes(parameters):
    return sum(p.numel() * p.element_size() for p in parameters) // 1024

def load(folder):
    with open_checkpoint(folder) as checkpoint:
        return load_model(checkpoint, getattr(torch, sys.argv[3]), torch.device("cpu"))

def read(model):
    for p in model.parameters():
        p.sum().item()

read(load(sys.argv[1]))  # what torch itself takes at its first steps is not counted
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = kib("VmRSS")
model = load(sys.argv[2])
loaded = kib("VmHWM") - before
read(model)
print(loaded, kib("VmHWM") - before, sizes(model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 300 MB of bf16 in both layouts, written without a model of it in memory twice."""
    shape = {"dim": 1024, "hidden_dim": 3584, "n_heads": 16, "n_kv_heads": 4, "head_dim": 64, "vocab_size": 8192}
    config = replace(DENSE, **shape, n_layers=9, sliding_window=(None,) * 9)
    root, make = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    native = {
        name: torch.randint(0, 1 << 14, t.shape, generator=make, dtype=torch.int16).view(torch.bfloat16)
        for name, t in tensor_plan(config).items()
    }
    write_native(root / "native", config, native)
    (root / "hf").mkdir()
    save_file({hf_name(name): weight for name, weight in native.items()}, root / "hf" / "model.safetensors")
    (root / "hf" / "config.json").write_text(json.dumps(config.to_hf()))
    make_folder(root / "tiny", DENSE)
    return root


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs to reset the peak of memory")
@pytest.mark.parametrize(("layout", "dtype"), [("native", "bfloat16"), ("hf", "bfloat16"), ("native", "float32")])
def test_the_peak_of_memory_is_the_weights_own_size(large, layout, dtype):
    command = [sys.executable, "-c", MEASURE, str(large / "tiny"), str(large / layout), dtype]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded, used, size = (int(number) / 1024 for number in answer.split())
    assert size > 250 * (2 if dtype == "float32" else 1)
    assert used < 1.1 * size
    if (layout, dtype) == ("native", "bfloat16"):
        assert loaded < 0.1 * size  # mapped, not read
