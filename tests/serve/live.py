"""A server in a process of its own, on loopback, and the plainest of clients for it."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

from tiny import DENSE

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
BYTES = replace(DENSE, vocab_size=288, max_position_embeddings=2048)  # a model of bytes, with a long context
HEAD = "host: localhost\r\ncontent-type: application/json\r\ncontent-length: "
LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
ADDRESS = re.compile(r"serving .* on http://([\d.]+|\[[\da-f:]+\]):(\d+)")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)

    @property
    def error(self):
        assert self.status >= 400, self
        found = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        assert self.headers["x-request-id"].startswith("req_")
        return found

    @property
    def events(self):
        """The objects of a stream, its end checked."""
        assert self.headers["content-type"].startswith("text/event-stream")
        return read_events(self.content)


def read_events(content: bytes) -> list[dict]:
    lines = [line for line in content.decode().split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Live:
    """`maestrale serve ARGS` on a free port. log: what it has written."""

    def __init__(self, *args: object, program=("-m", "maestrale"), env=None):
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", *map(str, args), "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | (env or {}),
        )
        self.log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(120)
        found = [match for line in self.log if (match := ADDRESS.search(line))]
        if not found:
            self.close()  # or it would run on, and a later test would be blamed
            raise AssertionError("\n".join(["the server does not start", *self.log]))
        self.greeting, self.port = found[0].string, int(found[0][2])

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if ADDRESS.search(line):
                self._ready.set()
        self._ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout=60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body=None, headers=None, timeout=60) -> Answer:
        """body: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with contextlib.closing(self.connect(timeout)) as connection:
            connection.request(method, path, content, {"content-type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            return Answer(
                response.status,
                {k.lower(): ", ".join(response.headers.get_all(k, [])) for k in response.headers},
                response.read(),
            )

    def post(self, path: str, body, headers=None, timeout=60) -> Answer:
        return self.ask("POST", path, body, headers, timeout)

    def get(self, path: str, headers=None) -> Answer:
        return self.ask("GET", path, None, headers)

    def complete(self, prompt, **fields) -> Answer:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8} | fields)

    def chat(self, *said: str, **fields) -> Answer:
        messages = [{"role": "user", "content": text} for text in said]
        return self.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8} | fields)

    def metric(self, name: str, **labels: str) -> float:
        wanted = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
        for line in self.get("/metrics").content.decode().splitlines():
            if line.startswith(f"{name}{wanted} "):
                return float(line.split()[-1])
        return 0.0

    def pages_used(self) -> float:
        return self.metric("maestrale_cache_pages") - self.metric("maestrale_cache_pages_free")

    def stop(self) -> int:
        """Asks it to end; gives its exit code."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        self.process.stderr.close()


def eventually(condition, seconds: float) -> float:
    """Waits for `condition` to hold; gives the seconds it took. Fails where it takes longer than `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


def open_request(server: Live, path: str, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """Sends a request and leaves the answer in the socket."""
    raw = json.dumps(body).encode()
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(f"POST {path} HTTP/1.1\r\n{HEAD}{len(raw)}\r\n\r\n".encode() + raw)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of a chunked answer, its chunks' sizes left out."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        more = connection.recv(1 << 16)
        if not more:
            break
        data += more
    _, _, rest = data.partition(b"\r\n\r\n")
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        content, rest = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return content
