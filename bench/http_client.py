"""A plain HTTP client on asyncio streams that can hang up at any moment, and a server process to ask."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A server that runs. log: the file it writes to. exit_code: when it has ended."""

    port: int
    pid: int
    log: Path
    exit_code: int | None = None


@contextmanager
def serving(*args: object) -> Iterator[Server]:
    """`maestrale serve ARGS` on a free port, ended with the block. RuntimeError with its log if it does not."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            command = [sys.executable, "-m", "maestrale", "serve", *map(str, args), "--port", "0"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            while not (found := re.search(r"serving .* on http://[\d.]+:(\d+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.05)
            server = Server(int(found[1]), process.pid, log)
            yield server
        finally:
            process.terminate()
            code = process.wait(60)
        server.exit_code = code


@dataclass
class Reply:
    """status: 0 where the connection broke. times: when each event came, in seconds from the request.
    content: what came after the head, as it came: `body` is what it says."""

    status: int = 0
    times: list[float] = field(default_factory=list)
    content: bytes = b""
    chunked: bool = False
    whole: bool = False

    @property
    def body(self) -> bytes:
        if not self.chunked:
            return self.content
        pieces, rest = [], self.content
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size or b"0", 16)  # nothing where the connection broke
            pieces.append(rest[:length])
            rest = rest[length + 2 :]
        return b"".join(pieces)


async def ask(
    port: int, path: str, body: dict[str, Any] | None, hang_up_after: int | None = None, raw: bytes | None = None
) -> Reply:
    """One request on a connection of its own. hang_up_after: leave when so many pieces of the answer have come."""
    reply, began = Reply(), time.perf_counter()
    content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        method = "GET" if body is None and raw is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        if hang_up_after == 0:
            return reply
        answer = await reader.readuntil(b"\r\n\r\n")
        reply.status = int(answer.split()[1])
        reply.chunked = b"transfer-encoding: chunked" in answer.lower()
        pieces = []
        while piece := await reader.read(1 << 16):
            pieces.append(piece)
            reply.times += [time.perf_counter() - began] * piece.count(b"data: {")
            if hang_up_after is not None and len(reply.times) >= hang_up_after:
                return reply
        reply.content = b"".join(pieces)
        reply.whole = not reply.chunked or reply.content.endswith(b"0\r\n\r\n")
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return reply
