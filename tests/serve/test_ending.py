"""Faults 67 to 70: a server that is told to end, and one whose port is taken."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from live import ENVIRONMENT, LONG, eventually, open_request, read_all, read_events


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


@pytest.mark.alone
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


def test_a_second_server_on_the_port_is_refused_before_the_model_is_read(start):
    server = start()
    command = [sys.executable, "-m", "maestrale", "serve", "/no/such/model", "--port", str(server.port)]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"127.0.0.1:{server.port}" in found.stderr
    stray = ENVIRONMENT | {"RANK": "1"}  # no launcher says how many there are: a single process
    assert subprocess.run(command, capture_output=True, env=stray, timeout=60).returncode == 2
    command[-1] = "0"
    assert subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60).returncode == 3
