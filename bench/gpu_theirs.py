"""transformers on the GPU: its compiled decode over a static cache, its fastest setting."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_inputs import mixed
from gpu_parts import Bench


def theirs(bench: Bench) -> None:
    """The shapes of 7B: all rows are as long as the longest, and only tokens that were asked for count."""
    import transformers

    config, count = bench.dense, 4 if bench.tiny else 96
    shape = transformers.MistralConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, intermediate_size=config.hidden_dim,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        vocab_size=config.vocab_size, sliding_window=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = transformers.MistralForCausalLM(shape)
    model = model.to(bench.dtype).to_empty(device=bench.device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    with bench.device:  # its table is no parameter, so it is made anew where memory is
        model.model.rotary_emb = type(model.model.rotary_emb)(shape)
    for size in bench.sizes[:2]:
        torch.compiler.reset()  # or a second size would be compiled for any
        prompts, counts = mixed(size, bench.context, count)
        ids = torch.randint(3, config.vocab_size, (size, max(prompts)), device=bench.device)

        def run(tokens: int, ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0, cache_implementation="static",
            )  # fmt: skip

        whole, first = (bench.seconds(partial(run, n), 2) for n in (max(counts), 1))
        rate = (sum(counts) - size) / (whole - first)
        bench.report.add(f"transformers, {size} at once", rate, "tokens/s")
        if ours := bench.report.value("7B", f"7B: engine, {size} at once"):
            least = {1: 1.5, 64: 4.0}.get(size)
            bench.report.add(f"our engine beside it, {size} at once", ours / rate, "times", least=least)
