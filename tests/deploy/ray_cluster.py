"""Run by a Python that has Ray: `ray_cluster.py FOLDER PYTHON`. Two nodes, two replicas of `deploy/ray_serve.py`, one
of which is killed under load. Prints a line of JSON with what the clients saw. PYTHON runs maestrale."""

import asyncio
import json
import socket
import sys
from pathlib import Path

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[2]))
from deploy import ray_serve

NAMES = ("Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal")
PROMPTS = [f"{name} went into the wood, and there " * 8 for name in NAMES]  # longer than what says where they go
LENGTH = 1200  # tokens: enough for some seconds


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


async def whole(client: httpx.AsyncClient, prompt: str, tokens: int) -> dict:
    fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=fields)
    return {"status": answer.status_code, **answer.json()}


async def streamed(client: httpx.AsyncClient, prompt: str, tokens: int) -> tuple[str, str]:
    """The text that came, and how it ended: "done", or an error's code."""
    fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    text, end = "", "cut off"
    async with client.stream("POST", "/v1/completions", json=fields) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return text, "done" if end == "cut off" else end
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    end = event["error"]["code"]
                else:
                    text += event["choices"][0]["text"]
    return text, end


def servers(folder: str) -> list[psutil.Process]:
    """The processes that the replicas have started."""
    lines = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [process for process, line in lines if folder in line and "serve" in line and "maestrale" in line]


async def found_tokens(folder: str) -> float:
    """Of all prompts so far, how many lay in the cache of the replica that they came to."""
    total = 0.0
    for server in servers(folder):
        line = server.cmdline()
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{line[line.index('--port') + 1]}/metrics")
        name = "maestrale_prefix_tokens_found_total "
        total += sum(float(entry.split()[-1]) for entry in answer.text.splitlines() if entry.startswith(name))
    return total


async def load(url: str, folder: str) -> dict:
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        alone = [await whole(client, prompt, LENGTH) for prompt in PROMPTS]
        found = await found_tokens(folder)
        for prompt in PROMPTS:
            await whole(client, prompt + "saw", 1)
        found = await found_tokens(folder) - found
        wholes = [asyncio.create_task(whole(client, prompt, LENGTH)) for prompt in PROMPTS]
        streams = [asyncio.create_task(streamed(client, prompt, LENGTH)) for prompt in PROMPTS]
        before = servers(folder)
        await asyncio.sleep(1)
        open_at_kill = sum(not task.done() for task in (*wholes, *streams))
        before[0].parent().kill()
        ended = [(await task) for task in wholes]
        texts = [(await task) for task in streams]
        for _ in range(600):  # Ray brings another one
            if len(servers(folder)) == 2:
                break
            await asyncio.sleep(0.1)
        return {
            "replicas": len(before),
            "replicas_after": len(servers(folder)),
            "open_at_kill": open_at_kill,
            "found": found,
            "length": sum(len(prompt.encode()) for prompt in PROMPTS),
            "alone": [answer["choices"][0]["text"] for answer in alone],
            "whole": [(answer["status"], answer.get("choices", [{"text": ""}])[0]["text"]) for answer in ended],
            "streamed": texts,
        }


def main(folder: str, python: str) -> None:
    assert all(len(prompt) > ray_serve.BEGINNING for prompt in PROMPTS)
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **small})
    cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = "--dtype float32 --max-len 2048 --name tiny --threads 1"
        arguments = {"model": folder, "python": python, "replicas": "2", "cpus": "2", "options": options}
        serve.run(ray_serve.app(arguments))
        print(json.dumps(asyncio.run(load(f"http://127.0.0.1:{port}", folder))))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
