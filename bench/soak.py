"""Many mixed requests, some of them bad, some of whose clients hang up: nothing is lost, nothing is kept.

    python bench/soak.py [MODEL] --requests 10000 --clients 64 --backend native

Plain and streamed, chats, texts, several answers at once, stop strings, logprobs, JSON schemas (some hundred different
ones), calls of tools that must parse, embeddings, and bad ones of four kinds. Then a storm of 200 clients that leave at
once, after which an answer must come within 5 s; then SIGTERM. MODEL must have tools; without it a small one with
random weights is made. The last line is JSON; exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import make_checkpoint
from compare_rivals import RESULTS, Book
from http_client import Reply, Server, ask, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HANG_UPS = 0.2
MOST_GROWTH = 1.0  # per cent of memory, from a tenth of the requests to the last
REST = 12.0  # seconds after each tenth: requests under way are no growth, nor what goes back within ten seconds
STORM, PATIENCE = 200, 5.0  # clients that leave at once, and the seconds until an answer must come after that
# A cache that a tenth of the requests fills: pages that are taken for the first time are no leak, but memory.
CACHE = ("--max-len", "1024", "--max-sequences", "32")
WORDS = ["fox", "king", "sea", "tale", "hen"]


def schema(rng: random.Random) -> dict[str, Any]:
    """One of some hundred: each must be compiled, and none is kept for ever."""
    age = {"type": "integer", "minimum": rng.randrange(10), "maximum": 20 + rng.randrange(20)}
    return {
        "type": "object",
        "properties": {"name": {"enum": WORDS[: rng.randrange(1, 5)]}, "age": age},
        "required": ["name", "age"],
        "additionalProperties": False,
    }


def request(rng: random.Random) -> tuple[str, dict[str, Any] | None, bytes | None, int]:
    """Route, body, raw body, and the status to expect."""
    words = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 200])))
    common = {"max_tokens": rng.choice([1, 8, 40]), "temperature": rng.choice([0, 0.8]), "stream": rng.random() < 0.5}
    talk = {"messages": [{"role": "user", "content": words}]}
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema(rng)}}
    tool = {"type": "function", "function": {"name": "note", "parameters": schema(rng)}}
    whole = common | {"max_tokens": 120}  # so that a call or an object comes to its end
    kinds: list[tuple[str, dict[str, Any] | None, bytes | None, int]] = [
        (CHAT, talk | common, None, 200),
        (TEXT, {"prompt": words} | common, None, 200),
        (TEXT, {"prompt": [words, "A"], "n": 2, "logprobs": 3, "echo": True} | common, None, 200),
        (CHAT, talk | common | {"logprobs": True, "top_logprobs": 5, "stop": ["the", "."]}, None, 200),
        (CHAT, talk | whole | {"response_format": form}, None, 200),
        (CHAT, talk | whole | {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}, None, 200),
        ("/v1/embeddings", {"input": words}, None, 200),
        ("/tokenize", {"prompt": words}, None, 200),
        ("/v1/models", None, None, 200),
        (CHAT, {"messages": []}, None, 400),
        (TEXT, {"prompt": words, "temperature": 9}, None, 400),
        (TEXT, {"prompt": [5] * 5000}, None, 400),
        (TEXT, None, b"{", 400),
    ]
    return rng.choices(kinds, weights=[8, 8, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1])[0]


def in_form(body: Mapping[str, Any] | None, reply: Reply) -> bool:
    """Whether the object or the call that was asked for has come, and parses."""
    if body is None or not (body.get("tools") or body.get("response_format")):
        return True
    parts = [answer.get("message") or answer.get("delta", {}) for answer in _choices(body, reply)]
    said = [part.get("content") or "" for part in parts]
    calls = [call["function"]["arguments"] for part in parts for call in part.get("tool_calls") or ()]
    try:
        return json.loads("".join(calls or said)).keys() == {"name", "age"}
    except ValueError:
        return False


def _choices(body: Mapping[str, Any], reply: Reply) -> list[dict[str, Any]]:
    if not body["stream"]:
        return list(json.loads(reply.body)["choices"])
    events = [line.removeprefix(b"data: ") for line in reply.body.split(b"\n\n") if line.startswith(b"data: {")]
    return [choice for event in events for choice in json.loads(event)["choices"]]


async def soak(server: Server, requests: int, clients: int, seed: int) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()

    async def client(numbers: Iterator[int]) -> None:
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            path, body, raw, expected = request(rng)
            leaves = rng.randrange(4) if rng.random() < HANG_UPS else None
            reply = await ask(server.port, path, body, leaves, raw)
            while leaves is None and reply.status == 429:
                outcomes["told to wait"] += 1
                await asyncio.sleep(0.2)
                reply = await ask(server.port, path, body, None, raw)
            if reply.status >= 500 or b'"server_error"' in reply.body:
                outcomes["server errors"] += 1
            elif leaves is not None:
                outcomes["hung up"] += 1
            elif reply.status == expected and reply.whole and (expected != 200 or in_form(body, reply)):
                outcomes[f"answered {expected}"] += 1
            else:
                outcomes["lost"] += 1
                print("lost:", path, str(body)[:200], reply.status, reply.body[-200:], file=sys.stderr)

    seconds, memory = 0.0, dict[int, int]()
    for done, mark in pairwise(requests * tenth // 10 for tenth in range(11)):
        began, numbers = time.perf_counter(), iter(range(done + 1, mark + 1))
        await asyncio.gather(*(client(numbers) for _ in range(clients)))
        seconds += time.perf_counter() - began
        await asyncio.sleep(REST)
        memory[mark] = resident(server.pid)
        print(f"{mark} requests: {memory[mark] / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    after_storm = await storm(server)
    begin, *_, end = memory.values()
    return {
        "requests": requests,
        "clients": clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes),
        "memory_mib": {str(number): round(taken / 2**20, 1) for number, taken in memory.items()},
        "growth_percent": round(100 * (end - begin) / begin, 2),
        "answer_after_storm_seconds": round(after_storm, 2),
        "pages_left": await pages_left(server.port),
    }


async def storm(server: Server) -> float:
    """Seconds until an answer comes, once all have left."""
    body = {"prompt": "Once", "max_tokens": 2000, "stream": True}
    await asyncio.gather(*(ask(server.port, TEXT, body, hang_up_after=0) for _ in range(STORM)))
    began = time.perf_counter()
    while (await ask(server.port, TEXT, {"prompt": "Once", "max_tokens": 4})).status != 200:
        await asyncio.sleep(0.02)
    return time.perf_counter() - began


def checks(result: Mapping[str, Any], exit_code: int | None) -> dict[str, bool]:
    return {
        "none lost": not result["outcomes"].get("lost"),
        "no 5xx": not result["outcomes"].get("server errors"),
        "every page back": result["pages_left"] == 0,
        f"memory grew by less than {MOST_GROWTH:g}%": result["growth_percent"] < MOST_GROWTH,
        f"an answer within {PATIENCE:g} s of the storm": result["answer_after_storm_seconds"] < PATIENCE,
        "SIGTERM ended it": exit_code == 0,
    }


def resident(pid: int) -> int:
    """Bytes of main memory of a process, without the pages of files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


async def pages_left(port: int) -> float:
    """Pages of the cache that somebody holds, ten seconds after the last request at most."""
    for _ in range(100):
        text = (await ask(port, "/metrics", None)).body.decode()
        lines = [line.split() for line in text.splitlines() if line.startswith("maestrale_cache")]
        found = {name: float(value) for name, value in lines}
        used = found["maestrale_cache_pages"] - found["maestrale_cache_pages_free"]
        if used == 0:
            break
        await asyncio.sleep(0.1)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=10_000, help="10 or more")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--options", default="", help="for maestrale serve: --options='--header-timeout 60'")
    parser.add_argument("--keep", action="store_true", help="the result in results/serving.json too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "T"
        if args.model is None:
            make_checkpoint.make_checkpoint(make_checkpoint.SHAPES["T"], model)
        with serving(model, "--backend", args.backend, *CACHE, *shlex.split(args.options)) as server:
            result = asyncio.run(soak(server, args.requests, args.clients, args.seed))
    result = {"model": Path(args.model or "T").name, "backend": args.backend} | result
    result["checks"] = checks(result, server.exit_code)
    if args.keep:
        Book(RESULTS / "serving.json").keep("soak", result)
    print(json.dumps(result))
    sys.exit(0 if all(result["checks"].values()) else 1)


if __name__ == "__main__":
    main()
