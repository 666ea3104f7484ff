"""Replicas of one model over a Ray cluster: each a `maestrale serve` of its own, one process or one torchrun group.

    pip install 'maestrale[torch,serve,ray]'
    serve run deploy.ray_serve:app model=/models/my-model replicas=1-4

Requests that begin alike go to the same replica, whose cache then holds their beginning; where it is busy, to the next.
A request whose replica dies goes to another one, unless part of its answer has been streamed: then the stream ends with
an error event. Needs Ray's packages and the command `maestrale`; the model's folder must lie on every node.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

BEGINNING = 256  # characters of a prompt that say where it goes
AT_ONCE = 64  # requests that a replica takes; more wait, or go to another
TRIES = 5  # replicas that a request may lose
LEFT_OUT = {"connection", "content-length", "date", "host", "keep-alive", "transfer-encoding"}  # of headers: hop by hop
log = logging.getLogger("ray.serve")


class Gone(Exception):
    """The server behind a replica has ended, or is about to."""


class Nearest(RequestRouter):
    """Replicas in an order that depends on a request's beginning alone: rendezvous hashing, so that one that comes or
    goes moves only its own share."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        beginning = str(pending_request.args[0]) if pending_request and pending_request.args else ""

        def weight(replica: RunningReplica) -> bytes:
            return hashlib.blake2b(f"{beginning}/{replica.replica_id.unique_id}".encode(), digest_size=8).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=weight)]


@serve.deployment(
    max_ongoing_requests=AT_ONCE,
    request_router_config=RequestRouterConfig(request_router_class=Nearest),
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=40,  # longer than the server's --drain
)
class Replica:
    """A server behind a port of this host that nobody outside sees."""

    def __init__(self, command: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        # A server that streams says at least every ten seconds that it lives; how long an answer takes it says itself.
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False)
        self.ready = False

    async def check_health(self) -> None:
        """Ray starts another replica where this fails; a model that is still loading is well."""
        if (code := self.server.poll()) is not None:
            raise Gone(f"the server has ended with code {code}")
        if self.ready:
            (await self.client.get("/health", timeout=8)).raise_for_status()

    async def forward(
        self, beginning: str, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> AsyncIterator[Any]:
        """(status, headers), then the answer's body piece by piece. Gone where the server is, or where it turns new
        requests away since it is ending. beginning: for the router."""
        await self._until_ready()
        try:
            request = self.client.build_request(method, path, headers=headers, content=body)
            answer = await self.client.send(request, stream=True)
            try:
                if answer.status_code >= 500 and _is_ending(await answer.aread()):
                    raise Gone("the server is shutting down")
                yield answer.status_code, {k: v for k, v in answer.headers.items() if k not in LEFT_OUT}
                async for piece in answer.aiter_raw() if not answer.is_stream_consumed else _once(answer.content):
                    if b'"engine_stopped"' in piece:
                        raise Gone("the model has stopped")
                    yield piece
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            raise Gone(f"{type(error).__name__}: {error}") from None

    async def _until_ready(self) -> None:
        while not self.ready:
            if (code := self.server.poll()) is not None:
                raise Gone(f"the server has ended with code {code}")
            try:
                self.ready = (await self.client.get("/ready", timeout=5)).status_code == 200
            except httpx.TransportError:
                await asyncio.sleep(0.1)

    def __del__(self) -> None:
        self.server.terminate()
        self.server.wait()


@serve.deployment(max_ongoing_requests=10_000)
class Front:
    """What clients reach: it hands a request to a replica, and to another one where that was lost."""

    def __init__(self, replicas: DeploymentHandle):
        self.replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name not in LEFT_OUT}
        problem: Exception = Gone("no replica")
        for _ in range(TRIES):
            pieces = aiter(self.replicas.forward.remote(beginning(body), request.method, path, headers, body))
            try:
                status, found = await anext(pieces)
                if found.get("content-type", "").startswith("text/event-stream"):
                    first = await anext(pieces)
                    return StreamingResponse(_go_on(first, pieces), status, found)
                return Response(b"".join([piece async for piece in pieces]), status, found)
            except (RayError, Gone) as error:
                problem = error
                reason = str(error).rpartition("\n")[2] or type(error).__name__
                log.warning("a request goes to another replica: %s", reason)
        return JSONResponse(_error(f"{TRIES} replicas were lost: {type(problem).__name__}"), 503, {"retry-after": "5"})


async def _go_on(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream whose beginning the client has: it cannot be begun anew, so a loss is told as the server tells it."""
    yield first
    try:
        async for piece in rest:
            yield piece
    except (RayError, Gone):
        yield f"data: {json.dumps(_error('the replica was lost'))}\n\ndata: [DONE]\n\n".encode()


def beginning(body: bytes) -> str:
    """What a prompt begins with. Of a chat what stands up to the user's first message, so that its later turns
    go where the first went, and so do chats that share a long system prompt."""
    try:
        fields = json.loads(body)
        said: Any = fields.get("messages") or fields.get("prompt") or fields.get("input") or ""
        if "messages" in fields:
            roles = [message.get("role") for message in said]
            said = said[: roles.index("user") + 1] if "user" in roles else said
    except (ValueError, AttributeError, TypeError):
        return ""  # the server will say what is wrong with it
    return json.dumps(said)[:BEGINNING]


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "replica_lost"}}


def _is_ending(content: bytes) -> bool:
    return b'"shutting_down"' in content or b'"engine_stopped"' in content


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _end_with_parent() -> None:
    """In the child: SIGTERM when the replica's process ends, however that ends (prctl's PR_SET_PDEATHSIG is 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` and a Serve config file name. arguments: `model`, a folder on every node; `replicas`, "2" or
    "1-4", as the load asks; `ranks`, processes of a replica, which torchrun starts; `cpus` and `gpus` of a replica;
    `options`, further ones of `maestrale serve`, as in a shell."""
    fewest, _, most = arguments.get("replicas", "1").partition("-")
    ranks = int(arguments.get("ranks", "1"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    python = arguments.get("python", sys.executable)
    command = [python, *launcher, "-m", "maestrale", "serve", arguments["model"]]
    replica, front = cast(Any, Replica), cast(Any, Front)  # the decorator has made deployments of both
    replica = replica.options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=int(fewest), max_replicas=int(most or fewest), target_ongoing_requests=AT_ONCE // 4
        ),
        ray_actor_options={
            "num_cpus": float(arguments.get("cpus", "1")),
            "num_gpus": float(arguments.get("gpus", "0")),
            "runtime_env": {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
        },
    )
    return front.options(num_replicas=1).bind(replica.bind([*command, *shlex.split(arguments.get("options", ""))]))
