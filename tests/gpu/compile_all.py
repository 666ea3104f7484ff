"""Compiles every kernel for an H200 (sm_90), without one, at the shapes of Mistral 7B and Mixtral 8x7B and of a small
model; prints one line of JSON for each: name, registers, bytes spilled, bytes of shared memory.

A process of its own: here Triton's compiler must be on and its interpreter off. Launches are caught, and what they
would have compiled is compiled; tensors are on the meta device, so shapes cost nothing.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
TYPES |= {torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv"}
TYPES |= {torch.float64: "*fp64", torch.bool: "*i1"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
done = set()


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "stack": found["STACK"]}


def instead_of_a_launch(self, *args, grid, warmup, **kwargs):
    options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "maxnreg", "launch_pdl") if key in kwargs}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    key = str((self.__name__, signature, constants, attributes, options))
    if key in done:
        return
    done.add(key)
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(
        json.dumps(
            {"kernel": self.__name__, "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
            | resources(compiled.asm["cubin"])
            | {"what": label}
        ),
        flush=True,
    )


JITFunction.run = instead_of_a_launch
label = ""


def main() -> None:
    from maestrale.batch import CacheLayout
    from maestrale.config import ModelConfig, MoeConfig
    from maestrale.torch_backend.cache import PagedCache
    from maestrale.torch_backend.model import Transformer
    from maestrale.torch_backend.triton.few import FEW, gated_product, product, turned_product
    from maestrale.torch_backend.triton.model import FusedTransformer, Step
    from maestrale.torch_backend.triton.packed import PackedLinear, to_fp8
    from maestrale.torch_backend.triton.packed_experts import PackedStack
    from maestrale.torch_backend.triton.tiles import Tiles, n_splits, tile_queries

    global label
    meta = torch.device("meta")
    torch.set_default_device(meta)
    large = (4096, 1, 128, 14336, 32, 8, 32000, 1e-5, 1e6)
    configs = {
        "7B": (ModelConfig(*large, (None,)), torch.bfloat16),
        "7B W": (ModelConfig(*large, (4096,)), torch.float16),
        "7B, fp8 cache": (ModelConfig(*large, (None,)), torch.bfloat16),
        "8x7B": (ModelConfig(*large, (None,), moe=MoeConfig(8, 2)), torch.bfloat16),
        "7B, fp32": (ModelConfig(*large, (None,)), torch.float32),
        "small": (ModelConfig(96, 1, 24, 160, 6, 2, 512, 1e-5, 1e4, (40,), moe=MoeConfig(4, 2)), torch.float32),
    }
    for name, (config, dtype) in configs.items():
        model = Transformer(config).to(dtype).requires_grad_(False)
        layout = CacheLayout(16, 4096, 2048, config.windows, (256,), (1024,))
        cache = PagedCache(config, layout, dtype, meta, None, fp8="fp8 cache" in name)
        fused = FusedTransformer(model)
        for tokens, decode in ((1, True), (4, True), (64, True), (2048, False)):
            label, whole = (
                f"{name}, {tokens} {'decodes' if decode else 'of a chunk'}",
                torch.empty(tokens, dtype=torch.int32),
            )
            queries = tile_queries(config.n_heads, config.n_kv_heads)
            n, none = tokens if decode else -(-tokens // queries), torch.empty(0, 3, dtype=torch.int32)
            every = torch.empty(n, 3, dtype=torch.int32)
            tiles = Tiles(*((none, every) if decode else (every, none)), queries, n_splits(n, config.n_kv_heads))
            fused.logits(Step(whole, whole, whole, [torch.empty(tokens, 256, dtype=torch.int32)], tiles, None), cache)
    label = "packed"
    words, scales, x = (
        torch.empty(256, 512, 16, dtype=torch.int32),
        torch.empty(256, 128, 16).half(),
        torch.empty(64, 4096),
    )
    layers = [
        PackedLinear("int4", (4096, 4096), 32, words, scales, None, torch.bfloat16),
        PackedLinear("int4", (4096, 4096), 32, words, scales, scales.float(), torch.bfloat16),
        PackedLinear("int8", (4096, 4096), 0, torch.empty(256, 1024, 16, dtype=torch.int32), x[0], None, torch.float32),
        to_fp8(torch.empty(4096, 4096)),
    ]
    for layer in layers:
        for rows in (1, 64, 65):
            layer(x.bfloat16()[:1].expand(rows, -1).contiguous())
        for rows in (1, FEW):
            label = f"{rows} rows, {layer.format}"
            x_TD, pool = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(1024, 8, 128, dtype=torch.bfloat16)
            ints, turns = torch.empty(rows, dtype=torch.int32), torch.empty(rows, 64)
            product(x_TD, layer, x_TD[0], 1e-5, x_TD)
            gated_product(x_TD, layer, x_TD[0], 1e-5)
            turned_product(x_TD, layer, x_TD[0], 1e-5, pool, pool, turns, turns, ints, ints, ints[:, None], 16)
        stack, counts = PackedStack([layer] * 16), torch.empty(8, dtype=torch.int32)
        for pairs in (2, 128, 2048):
            label = f"packed experts, {layer.format}, {pairs} pairs"
            every = torch.empty(pairs, dtype=torch.int32)
            rows = max(16, triton.next_power_of_2(pairs // 4))
            h = stack.up(torch.empty(pairs // 2, 4096, dtype=torch.bfloat16), every, counts, rows)
            PackedStack([layer] * 8).down(h, every.float(), counts, rows)


if __name__ == "__main__":
    main()
