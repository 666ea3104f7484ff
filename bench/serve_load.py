"""The server under load: beside the offline engine, beside long prompts, and beside other servers.

    python bench/serve_load.py MODEL --clients 16 --tokens 128
    python bench/serve_load.py MODEL --beside 'llama.cpp=bin/python -m llama_cpp.server --model S.gguf --port {port}'

In turns, round after round: the offline engine on a batch, the server with as many clients, and each server of
`--beside`, which must speak OpenAI's /v1/completions. Then our clients again, while prompts of 2,000 tokens keep
arriving. The clients run on the same cores; `client_cores` says how much of them they take. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_rivals import RESULTS, Book
from http_client import Reply, ask, serving

from maestrale import LLM, SamplingParams

TEXT = "/v1/completions"
WORDS = ["the", "old", "king", "had", "three", "sons", "and", "went", "far", "behind", "mountains", "with", "a", "fox"]
SHARE, STRETCH = 0.9, 3.0  # of the offline engine's speed; the 99th percentile between two tokens over the median


@dataclass
class Load:
    """What clients saw. seconds: from the first request to the last token. client_cores: CPU time of the clients in
    each of them. tokens: of all replies."""

    seconds: float
    client_cores: float
    tokens: int
    replies: list[Reply]


def prompts_for(count: int, words: int, seed: int) -> list[str]:
    """Texts that begin differently, so that none finds another's pages."""
    rng = random.Random(seed)
    return [f"{seed} {i} " + " ".join(rng.choices(WORDS, k=words)) for i in range(count)]


async def load(port: int, clients: int, prompts: Sequence[str], tokens: int) -> Load:
    """So many clients ask for one prompt after the other, streamed. RuntimeError where a request fails."""
    model = json.loads((await ask(port, "/v1/models", None)).body)["data"][0]["id"]
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    began, cpu = time.perf_counter(), time.process_time()
    waiting, replies = iter(prompts), []

    async def client() -> None:
        for prompt in waiting:
            reply = await ask(port, TEXT, {"prompt": prompt} | body)
            if reply.status != 200 or b'"length"' not in reply.content:  # else it has another number of tokens
                raise RuntimeError(f"a request failed: {reply.content[:300]!r}")
            replies.append(reply)

    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return Load(seconds, (time.process_time() - cpu) / seconds, len(replies) * tokens, replies)


async def disturbed(port: int, clients: int, prompts: Sequence[str], long: Sequence[list[int]], tokens: int) -> Load:
    """`load`, while one long prompt after the other arrives."""
    running = asyncio.create_task(load(port, clients, prompts, tokens))
    for ids in long:
        if running.done():
            break
        await ask(port, TEXT, {"prompt": ids, "max_tokens": 1})
    return await running


def waits(replies: Sequence[Reply]) -> dict[str, float]:
    """Milliseconds: to the first token, and between two, at the median and the 99th percentile."""
    first = sorted(reply.times[0] for reply in replies)
    between = sorted(b - a for reply in replies for a, b in zip(reply.times, reply.times[1:], strict=False))
    named = {"first": first, "between": between}
    return {
        f"{name}_{p}": round(1000 * values[min(len(values) - 1, int(p[1:]) * len(values) // 100)], 2)
        for name, values in named.items()
        for p in ("p50", "p99")
    }


@contextmanager
def beside(command: str) -> Iterator[int]:
    """The port of another server: one of its own, or that of one that runs, where its address is given. RuntimeError
    where it does not answer within ten minutes."""
    if command.startswith("http://127.0.0.1:"):
        yield int(command.rpartition(":")[2])
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("/dev/null", "w") as nowhere:
        process = subprocess.Popen(shlex.split(command.format(port=port)), stdout=nowhere, stderr=nowhere)
    try:
        for _ in range(600):
            try:
                if asyncio.run(ask(port, "/v1/models", None)).status == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None:
                raise RuntimeError(f"it ended with code {process.returncode}: {command}")
            time.sleep(1)
        else:
            raise RuntimeError(f"it does not answer: {command}")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def summary(loads: Sequence[Load]) -> dict[str, Any]:
    """Medians over rounds; waits over all their requests."""
    return {
        "requests_per_second": round(statistics.median(len(load.replies) / load.seconds for load in loads), 3),
        "tokens_per_second": round(statistics.median(load.tokens / load.seconds for load in loads), 1),
        "client_cores": round(statistics.median(load.client_cores for load in loads), 3),
        "waits_ms": waits([reply for load in loads for reply in load.replies]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="stories")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=1, help="requests of a client in a round")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=50, help="words of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="{port} is filled in; or NAME=http://127.0.0.1:PORT, of one that runs",
    )
    parser.add_argument("--no-offline", action="store_true", help="only servers")
    parser.add_argument("--no-long", action="store_true", help="without the run beside prompts of 2,000 tokens")
    parser.add_argument("--keep", action="store_true", help="the result in results/serving.json too")
    parser.add_argument("options", nargs="*", help="for maestrale serve, after --")
    args = parser.parse_args()
    others = dict(word.split("=", 1) for word in args.beside)
    offline: list[float] = []
    loads: dict[str, list[Load]] = {name: [] for name in ("maestrale", *others)}
    with ExitStack() as stack:
        llm = None if args.no_offline else LLM(args.model, prefix_cache=False)
        ours = stack.enter_context(serving(args.model, *args.options, "--max-len", 4096)).port
        ports = {"maestrale": ours} | {name: stack.enter_context(beside(command)) for name, command in others.items()}
        for round_ in range(args.rounds + 1):  # the first one warms up
            prompts = prompts_for(args.clients * args.each, args.prompt, round_)
            if llm is not None:
                params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
                began = time.perf_counter()
                found = llm.generate(prompts, params)
                offline.append(sum(len(one.token_ids) for one in found) / (time.perf_counter() - began))
                print(f"round {round_}: offline {offline[-1]:.0f} tokens/s", flush=True)
            for name, port in ports.items():
                one = asyncio.run(load(port, args.clients, prompts, args.tokens))
                loads[name].append(one)
                print(f"round {round_}: {name} {one.tokens / one.seconds:.0f} tokens/s", flush=True)
        rng = random.Random(99)
        long = [[1, *(rng.randrange(300, 32000) for _ in range(1999))] for _ in range(1000)]
        prompts = prompts_for(args.clients, args.prompt, 77)
        busy = [] if args.no_long else [asyncio.run(disturbed(ours, args.clients, prompts, long, args.tokens))]
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "clients": args.clients,
        "tokens": args.tokens,
        "servers": {name: summary(found[1:]) for name, found in loads.items()},
    }
    checks = {}
    if busy:
        result["beside_prompts_of_2000"] = summary(busy)
        between = result["beside_prompts_of_2000"]["waits_ms"]
        checks[f"p99 between tokens within {STRETCH:g} medians"] = (
            between["between_p99"] <= STRETCH * between["between_p50"]
        )
    if offline:
        shares = [one.tokens / one.seconds / speed for one, speed in zip(loads["maestrale"], offline, strict=True)][1:]
        result |= {"offline_tokens_per_second": round(statistics.median(offline[1:]), 1)}
        result |= {"share_of_offline": round(statistics.median(shares), 3)}
        result |= {"shares": [round(share, 3) for share in sorted(shares)]}
        checks[f"{SHARE:.0%} of the offline engine"] = statistics.median(shares) >= SHARE
    for name in others:
        mine, theirs = result["servers"]["maestrale"], result["servers"][name]
        checks[f"more requests/s than {name}"] = mine["requests_per_second"] > theirs["requests_per_second"]
        checks[f"first token sooner than {name} (p99)"] = (
            mine["waits_ms"]["first_p99"] < theirs["waits_ms"]["first_p99"]
        )
    if args.keep:
        name = f"load {Path(args.model).name} beside {', '.join(others) or 'the offline engine'}"
        Book(RESULTS / "serving.json").keep(name, result | {"checks": checks})
    print(json.dumps(result | {"checks": checks}))


if __name__ == "__main__":
    main()
