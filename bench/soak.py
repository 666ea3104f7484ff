"""Many mixed requests, some of them bad, some of whose clients hang up: nothing is lost, nothing is kept.

python bench/soak.py [MODEL] --requests 10000 --clients 64. The last line is JSON; exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from http_client import Server, ask, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HANG_UPS = 0.2


def request(rng: random.Random) -> tuple[str, dict[str, Any] | None, bytes | None, int]:
    """Route, body, raw body, and the status to expect."""
    words = " ".join(rng.choices(["fox", "king", "sea", "tale", "hen"], k=rng.choice([3, 20, 200])))
    common = {"max_tokens": rng.choice([1, 8, 40]), "temperature": rng.choice([0, 0.8]), "stream": rng.random() < 0.5}
    talk = {"messages": [{"role": "user", "content": words}]}
    kinds: list[tuple[str, dict[str, Any] | None, bytes | None, int]] = [
        (CHAT, talk | common, None, 200),
        (TEXT, {"prompt": words} | common, None, 200),
        (TEXT, {"prompt": [words, "A"], "n": 2, "logprobs": 3, "echo": True} | common, None, 200),
        (CHAT, talk | common | {"logprobs": True, "top_logprobs": 5, "stop": ["the", "."]}, None, 200),
        ("/v1/embeddings", {"input": words}, None, 200),
        ("/tokenize", {"prompt": words}, None, 200),
        ("/v1/models", None, None, 200),
        (CHAT, {"messages": []}, None, 400),
        (TEXT, {"prompt": words, "temperature": 9}, None, 400),
        (TEXT, {"prompt": [5] * 5000}, None, 400),
        (TEXT, None, b"{", 400),
    ]
    return rng.choices(kinds, weights=[8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1])[0]


async def soak(server: Server, requests: int, clients: int, seed: int) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    memory: dict[int, int] = {}
    numbers = iter(range(1, requests + 1))

    async def client() -> None:
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            path, body, raw, expected = request(rng)
            leaves = rng.randrange(4) if rng.random() < HANG_UPS else None
            reply = await ask(server.port, path, body, leaves, raw)
            while leaves is None and reply.status == 429:
                outcomes["told to wait"] += 1
                await asyncio.sleep(0.2)
                reply = await ask(server.port, path, body, None, raw)
            if reply.status >= 500 or b'"server_error"' in reply.content:
                outcomes["server errors"] += 1
            elif leaves is not None:
                outcomes["hung up"] += 1
            elif reply.status == expected and reply.whole:
                outcomes[f"answered {expected}"] += 1
            else:
                outcomes["lost"] += 1
                print("lost:", path, body, reply.status, reply.content[-200:], file=sys.stderr)
            if number % (requests // 10) == 0:
                memory[number] = resident(server.pid)

    await asyncio.gather(*(client() for _ in range(clients)))
    for _ in range(100):
        await asyncio.sleep(0.1)
        used = await pages_used(server.port)
        if used == 0:
            break
    first, last = memory[requests // 10], memory[requests]
    return {
        "requests": requests,
        "clients": clients,
        "outcomes": dict(outcomes),
        "pages_left": used,
        "memory_mib": {str(number): round(memory[number] / 2**20, 1) for number in sorted(memory)},
        "growth_percent": round(100 * (last - first) / first, 2),
    }


def resident(pid: int) -> int:
    """Bytes of main memory of a process, without the pages of files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


async def pages_used(port: int) -> float:
    text = (await ask(port, "/metrics", None)).content.decode()
    found = {
        line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("maestrale_cache")
    }
    return found["maestrale_cache_pages"] - found["maestrale_cache_pages_free"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="stories")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    with serving(args.model, "--backend", args.backend) as server:
        result = asyncio.run(soak(server, args.requests, args.clients, args.seed))
    wrong = result["outcomes"].get("lost", 0) + result["outcomes"].get("server errors", 0) + result["pages_left"]
    print(json.dumps(result))
    sys.exit(1 if wrong or result["growth_percent"] > 1 else 0)


if __name__ == "__main__":
    main()
