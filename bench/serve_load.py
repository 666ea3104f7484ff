"""The server under load beside the offline engine: tokens per second of both, interleaved, and what clients wait for.

python bench/serve_load.py MODEL --clients 16 --tokens 128. Then the same clients again, while prompts of 2,000 tokens
keep arriving: the time between two tokens must not suffer. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

from http_client import Reply, Server, ask, serving

from maestrale import LLM, SamplingParams

TEXT = "/v1/completions"


def prompts_for(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *(rng.randrange(300, vocab_size) for _ in range(length - 1))] for _ in range(count)]


async def load(server: Server, prompts: list[list[int]], tokens: int) -> tuple[float, list[Reply]]:
    """All prompts at once, streamed: tokens per second over all, and the replies."""
    began = time.perf_counter()
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    replies = await asyncio.gather(*(ask(server.port, TEXT, {"prompt": ids} | body) for ids in prompts))
    if any(reply.status != 200 or b'"error"' in reply.content for reply in replies):
        raise RuntimeError(f"a request failed: {replies[0].content[:300]!r}")
    return len(prompts) * tokens / (time.perf_counter() - began), list(replies)


async def disturbed(server: Server, prompts: list[list[int]], long: list[list[int]], tokens: int) -> list[Reply]:
    """`load`, while one long prompt after the other arrives."""
    running = asyncio.create_task(load(server, prompts, tokens))
    for ids in long:
        if running.done():
            break
        await ask(server.port, TEXT, {"prompt": ids, "max_tokens": 1})
    return (await running)[1]


def waits(replies: list[Reply]) -> dict[str, float]:
    """Milliseconds: to the first token, and between two, at the median and the 99th percentile."""
    first = sorted(reply.times[0] for reply in replies)
    between = sorted(b - a for reply in replies for a, b in zip(reply.times, reply.times[1:], strict=False))
    named = {"first": first, "between": between}
    return {
        f"{name}_{p}": round(1000 * values[min(len(values) - 1, int(p[1:]) * len(values) // 100)], 2)
        for name, values in named.items()
        for p in ("p50", "p99")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="stories")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    llm = LLM(args.model, dtype=args.dtype, backend=args.backend, prefix_cache=False)
    params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    offline, online, replies, vocab = [], [], [], llm.config.vocab_size
    with serving(args.model, "--backend", args.backend, "--dtype", args.dtype) as server:
        for round_ in range(args.rounds + 1):  # the first one warms up
            prompts = prompts_for(vocab, args.clients, args.prompt, round_)
            began = time.perf_counter()
            found = llm.generate(prompts, params)
            offline.append(sum(len(completion.token_ids) for completion in found) / (time.perf_counter() - began))
            speed, replies = asyncio.run(load(server, prompts, args.tokens))
            online.append(speed)
            print(f"round {round_}: offline {offline[-1]:.0f} tokens/s, served {online[-1]:.0f} tokens/s", flush=True)
        quiet = waits(replies)
        length = min(2000, llm.max_len - 1)
        long = prompts_for(vocab, 1000, length, 99)
        busy = waits(
            asyncio.run(disturbed(server, prompts_for(vocab, args.clients, args.prompt, 77), long, args.tokens))
        )
    result: dict[str, Any] = {
        "model": str(args.model),
        "clients": args.clients,
        "offline_tokens_per_second": round(statistics.median(offline[1:]), 1),
        "served_tokens_per_second": round(statistics.median(online[1:]), 1),
        "share": round(statistics.median(b / a for a, b in zip(offline[1:], online[1:], strict=True)), 3),
        "waits_ms": quiet,
        f"waits_ms_beside_prompts_of_{length}": busy,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
