"""Faults 60 to 62: clients that leave, and those that dawdle."""

import socket
import struct
import time

import psutil
import pytest
from live import HEAD, LONG, eventually, open_request


@pytest.mark.alone
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_gives_its_pages_back_within_a_second(bytes_server, stream, reset):
    before = bytes_server.metric("maestrale_requests_total", outcome="cancelled")
    connection = open_request(bytes_server, "/v1/completions", LONG | {"stream": stream})
    eventually(lambda: bytes_server.pages_used() > 2, 20)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert eventually(lambda: bytes_server.pages_used() == 0, 5) < 1
    assert bytes_server.metric("maestrale_requests_total", outcome="cancelled") == before + 1
    assert bytes_server.complete("Once").status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_client_that_leaves_amid_its_body_is_no_fault_of_the_server(start, path):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f'POST {path} HTTP/1.1\r\n{HEAD}100\r\n\r\n{{"prompt": "On'.encode())
    eventually(lambda: server.metric("maestrale_http_responses_total", route=path, status="499") == 1, 5)
    assert server.metric("maestrale_http_responses_total", route=path, status="500") == 0
    assert not [line for line in server.log if "Traceback" in line]


@pytest.mark.alone
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


def test_two_hundred_cancellations_and_then_an_answer(bytes_server):
    storm = [open_request(bytes_server, "/v1/completions", LONG | {"stream": True}) for _ in range(200)]
    for connection in storm:
        connection.close()
    began = time.monotonic()
    assert bytes_server.complete("Once").status == 200
    assert time.monotonic() - began < 5
    eventually(lambda: bytes_server.pages_used() == 0, 5)


# 61, 62: who is slow


@pytest.mark.alone
def test_an_answer_that_nobody_reads_is_dropped(bytes_server):
    body = LONG | {"stream": True, "n": 8, "logprobs": 20}  # some 40 MB, more than any socket takes
    connection = open_request(bytes_server, "/v1/completions", body, receive_buffer=4096)
    eventually(lambda: bytes_server.metric("maestrale_requests_total", outcome="slow reader") == 1, 120)
    eventually(lambda: bytes_server.pages_used() == 0, 1)
    assert bytes_server.complete("Once").status == 200
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
    eventually(lambda: server.pages_used() == 0, 5)  # after the step that is under way
    many = {"input": ["x" * 1000] * 1000}
    assert server.post("/v1/embeddings", many).error["type"] == "timeout_error"
    assert server.complete("Once").status == 200
