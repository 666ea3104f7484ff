"""Faults 60 to 71: clients that leave, dawdle or crowd in; a model that fails; a server that is told to end."""

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from live import ENVIRONMENT, Live, eventually, read_events
from safetensors.torch import load_file, save_file
from tiny import write_tekken

from maestrale import LLM, SamplingParams

HEAD = "host: localhost\r\ncontent-type: application/json\r\ncontent-length: "
LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


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


@pytest.fixture(scope="module")
def server(bytes_folder):
    """One server for those who need no settings of their own. Left idle by every test."""
    live = Live(bytes_folder)
    yield live
    live.close()


# 60: who leaves


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_gives_its_pages_back_within_a_second(server, stream, reset):
    before = server.metric("maestrale_requests_total", outcome="cancelled")
    connection = open_request(server, "/v1/completions", LONG | {"stream": stream})
    eventually(lambda: server.pages_used() > 2, 20)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert eventually(lambda: server.pages_used() == 0, 5) < 1
    assert server.metric("maestrale_requests_total", outcome="cancelled") == before + 1
    assert server.complete("Once").status == 200


def test_who_leaves_the_queue_is_forgotten(start):
    server = start("--max-sequences", 1)
    first = open_request(server, "/v1/completions", LONG)
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    second = open_request(server, "/v1/completions", LONG)
    eventually(lambda: server.metric("maestrale_queued_requests") == 1, 20)
    second.close()
    eventually(lambda: server.metric("maestrale_queued_requests") == 0, 1)
    assert server.metric("maestrale_engine_running") == 1
    first.close()
    eventually(lambda: server.pages_used() == 0, 1)


def test_two_hundred_cancellations_and_then_an_answer(server):
    storm = [open_request(server, "/v1/completions", LONG | {"stream": True}) for _ in range(200)]
    for connection in storm:
        connection.close()
    began = time.monotonic()
    assert server.complete("Once").status == 200
    assert time.monotonic() - began < 5
    eventually(lambda: server.pages_used() == 0, 5)


# 61, 62: who is slow


def test_an_answer_that_nobody_reads_is_dropped(server):
    body = LONG | {"stream": True, "n": 8, "logprobs": 20}  # some 40 MB, more than any socket takes
    connection = open_request(server, "/v1/completions", body, receive_buffer=4096)
    eventually(lambda: server.metric("maestrale_requests_total", outcome="slow reader") == 1, 120)
    eventually(lambda: server.pages_used() == 0, 1)
    assert server.complete("Once").status == 200
    connection.close()


def test_an_answer_that_is_left_lying_is_given_up(start):
    server = start("--write-timeout", 1)
    body = LONG | {"n": 8, "logprobs": 20}  # whole, and as large as the one above
    connection = open_request(server, "/v1/completions", body, receive_buffer=4096)
    ours = connection.getsockname()
    eventually(lambda: server.metric("maestrale_requests_total", outcome="done") == 1, 120)
    process = psutil.Process(server.process.pid)
    eventually(lambda: all(peer.raddr != ours for peer in process.net_connections("tcp")), 10)
    assert server.complete("Once").status == 200
    connection.close()


def test_a_head_that_dawdles_is_closed_at_its_deadline(start):
    server = start("--header-timeout", 1)
    for opening in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea"):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        began = time.monotonic()
        for byte in opening:
            connection.send(bytes([byte]))
        data = b""
        while more := connection.recv(4096):
            data += more
        assert 0.9 < time.monotonic() - began < 5
        assert b"408 Request Timeout" in data
        assert b"did not arrive within 1 s" in data
        connection.close()


def test_a_body_that_dawdles_is_a_408(start):
    server = start("--body-timeout", 1)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{HEAD}99\r\n\r\n{{".encode())
    assert b"408 Request Timeout" in connection.recv(4096)
    connection.close()


def test_a_request_that_takes_too_long_is_cancelled(start):
    server = start("--backend", "torch", "--request-timeout", 0.5, "--max-sequences", 2)  # 2000 tokens take longer
    answer = server.post("/v1/completions", LONG | {"n": 2})
    assert (answer.status, answer.error["type"]) == (408, "timeout_error")
    assert answer.headers["x-should-retry"] == "false"
    events = server.post("/v1/completions", LONG | {"n": 2, "stream": True}).events
    assert len(events) > 2
    assert events[-1]["error"]["type"] == "timeout_error"
    assert server.pages_used() == 0


def test_silence_is_broken_by_pings(bytes_folder, start):
    """One sequence at a time: the second stream is silent until the first is done."""
    server = start("--max-sequences", 1, "--ping", 0.05)
    first = open_request(server, "/v1/completions", LONG)
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    second = open_request(server, "/v1/completions", LONG | {"stream": True, "max_tokens": 2})
    content = read_all(second)
    assert content.startswith(b": ping\n\n")
    assert read_events(content)
    first.close()
    second.close()


def test_a_streams_events_keep_their_distance_and_lose_nothing(start):
    fields = {"max_tokens": 600, "ignore_eos": True, "logprobs": 1}
    texts, counts = [], []
    for interval in (0, 0.2):
        server = start("--stream-interval", interval)
        began = time.monotonic()
        events = [event["choices"][0] for event in server.complete("Once", stream=True, **fields).events]
        most = (time.monotonic() - began) / interval + 2 if interval else 600
        assert 1 < len(events) <= most
        counts.append(len(events))
        texts.append("".join(event["text"] for event in events))
        assert sum(len(event["logprobs"]["tokens"]) for event in events) == 600
        assert [event["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert texts[0] == texts[1] == server.complete("Once", **fields).json["choices"][0]["text"]
    assert counts[0] > 2 * counts[1]


# 63: a crowd


def test_a_full_queue_answers_429_with_retry_after(start):
    server = start("--max-sequences", 1, "--max-queue", 2)
    running = open_request(server, "/v1/completions", LONG)
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    waiting = [open_request(server, "/v1/completions", LONG) for _ in range(2)]
    eventually(lambda: server.metric("maestrale_queued_requests") == 2, 20)
    for answer in (server.complete("Once"), server.complete("Once", stream=True), server.chat("Hello")):
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"
    assert server.get("/ready").status == 200
    for connection in (running, *waiting):
        connection.close()
    eventually(lambda: server.pages_used() == 0, 5)
    assert server.complete("Once").status == 200


# 64: too few pages

SMALL = """
import sys
from maestrale import launch
launch.cache_budget = lambda available, weights: {budget}
from maestrale.cli import main
main()
"""


def test_where_pages_run_out_texts_are_the_same(start, bytes_folder):
    """Room for one and a half sequences of 512 tokens: eight of 300 preempt each other all the time."""
    program = ("-c", SMALL.format(budget=int(1.5 * 512 * 2 * 2 * 2 * 8 * 4)))
    server = start("--max-len", 512, program=program)
    prompts = [f"{i} bottles of beer on the wall" for i in range(8)]
    alone = LLM(bytes_folder).generate(prompts, SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))
    answer = server.complete(prompts, max_tokens=300, ignore_eos=True)
    assert [choice["text"] for choice in answer.json["choices"]] == [completion.text for completion in alone]
    assert server.metric("maestrale_preemptions_total") > 0
    assert server.pages_used() == 0


# 65, 66: a model that fails

FAILING = """
from maestrale.torch_backend import runner
from maestrale.errors import MemoryLimitError
whole = runner.TorchRunner.step  # the server is told to take this backend
def step(self, batch):
    if (batch.token_ids == 32 + ord("#")).any():
        short = (batch.token_ids == 32 + ord("!")).any()
        raise MemoryLimitError("out of memory: 99 GiB") if short else ValueError("broken")
    return whole(self, batch)
runner.TorchRunner.step = step
from maestrale.cli import main
main()
"""


@pytest.mark.parametrize(("prompt", "code"), [("one #", None), ("one #!", "out_of_memory")])
def test_a_step_that_breaks_off_fails_its_request_and_the_server_goes_on(start, prompt, code):
    server = start("--backend", "torch", program=("-c", FAILING))
    answer = server.complete(prompt)
    assert (answer.status, answer.error["type"], answer.error["code"]) == (500, "server_error", code)
    events = server.complete(prompt, stream=True).events
    assert [event["error"]["type"] for event in events] == ["server_error"]
    assert server.complete("one").status == 200
    assert server.pages_used() == 0
    assert any("ValueError: broken" in line or "99 GiB" in line for line in server.log)


@pytest.fixture(scope="module")
def nan_folder(bytes_folder, tmp_path_factory):
    """The tiny model, but whoever reads a "~" gets NaN."""
    folder = tmp_path_factory.mktemp("nan") / "nan"
    folder.mkdir()
    (folder / "params.json").write_bytes((bytes_folder / "params.json").read_bytes())
    write_tekken(folder)
    weights = load_file(bytes_folder / "consolidated.safetensors")
    weights["tok_embeddings.weight"][32 + ord("~")] = torch.nan
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def test_logits_that_are_nan_fail_their_request_alone(nan_folder, start):
    server = Live(nan_folder)
    try:
        beside = open_request(server, "/v1/completions", LONG | {"stream": True, "max_tokens": 500})
        answer = server.complete("a ~")
        assert (answer.status, answer.error["code"]) == (500, "model_error")
        assert "nan" in answer.error["message"]
        (event,) = server.complete("a ~", stream=True).events
        assert event["error"]["code"] == "model_error"
        assert server.metric("maestrale_requests_total", outcome="error") == 2
        assert read_events(read_all(beside))[-1]["choices"][0]["finish_reason"] == "length"
        beside.close()
    finally:
        server.close()


# 67, 68: the end


def test_sigterm_lets_open_streams_finish(start):
    server = start()
    streams = [open_request(server, "/v1/completions", LONG | {"stream": True, "max_tokens": 300}) for _ in range(10)]
    eventually(lambda: server.metric("maestrale_engine_running") == 10, 20)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: server.get("/ready").status == 503, 5)
    assert server.get("/health").status == 200
    late = server.complete("Once")
    assert (late.status, late.error["code"]) == (503, "shutting_down")
    for stream in streams:
        assert read_events(read_all(stream))[-1]["choices"][0]["finish_reason"] == "length"
        stream.close()
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.log)


def test_sigterm_ends_streams_with_an_error_at_the_deadline(start):
    server = start("--drain", 0.3)
    streams = [open_request(server, "/v1/completions", LONG | {"stream": True, "n": 4}) for _ in range(10)]
    eventually(lambda: server.metric("maestrale_engine_running") == 10, 20)
    children = psutil.Process(server.process.pid).children(recursive=True)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        assert read_events(read_all(stream))[-1]["error"]["code"] == "shutting_down"
        stream.close()
    assert time.monotonic() - began < 8
    assert server.wait() == 0
    assert not any(child.is_running() for child in children)
    assert not any("Traceback" in line for line in server.log)


def test_a_second_signal_ends_the_server_now(start):
    server = start()
    connection = open_request(server, "/v1/completions", LONG | {"n": 16})
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert server.process.poll() is None
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 130
    assert time.monotonic() - began < 2
    connection.close()


def test_sigkill_leaves_no_process(start):
    server = start()
    assert server.complete("Once").status == 200
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.wait()
    eventually(lambda: not any(child.is_running() for child in children), 5)


# 70, 71: the surroundings


def test_a_second_server_on_the_port_is_refused_before_the_model_is_read(start):
    server = start()
    command = [sys.executable, "-m", "maestrale", "serve", "/no/such/model", "--port", str(server.port)]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"127.0.0.1:{server.port}" in found.stderr
    command[-1] = "0"
    assert subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60).returncode == 3


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_end(bytes_folder):
    reader, writer = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "maestrale", "serve", str(bytes_folder), "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=ENVIRONMENT,
    )
    try:
        writer.close()
        greeting = ""
        while "serving" not in greeting or not greeting.endswith("\n"):
            greeting += reader.recv(4096).decode()
        reader.close()
        server = object.__new__(Live)
        server.port = int(greeting.split("127.0.0.1:")[1].split(",")[0].split()[0])
        for _ in range(3):
            assert server.complete("Once").status == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_newline_from_a_client_does_not_begin_a_line_of_the_log(server):
    before = len(server.log)
    assert server.get("/%0aserving%20evil%1b%5b31m").status == 404
    eventually(lambda: len(server.log) > before, 5)
    (line,) = server.log[before:]
    assert "\\nserving evil\\u001b[31m" in line


def test_the_log_as_json_is_an_object_a_line(start):
    server = start("--log-json")
    server.get("/%0a")
    server.complete("Once", model="x\ny")
    assert server.stop() == 0
    records = [json.loads(line) for line in server.log]
    assert all(record.keys() >= {"time", "level", "message"} for record in records)
    assert "serving" in records[0]["message"]


def test_many_threads_are_served_at_once_with_their_own_texts(server, bytes_folder):
    """Greedy text over HTTP is LLM.generate's, whatever runs beside it."""
    prompts = [f"{'ab' * (i % 7)} number {i}" for i in range(24)]
    alone = LLM(bytes_folder).generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        if i % 2:
            found[i] = server.complete(prompts[i], max_tokens=40).json["choices"][0]["text"]
        else:
            events = server.complete(prompts[i], max_tokens=40, stream=True).events
            found[i] = "".join(event["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == [completion.text for completion in alone]
