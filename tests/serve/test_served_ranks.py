"""Faults 68 and 69, of a model that is served from two ranks: whichever fails or hangs, no process is left."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from live import ENVIRONMENT, LONG, Live, eventually, open_request, read_all, read_events

PATIENCE = 10  # seconds after which a rank that is silent counts as hanging


@pytest.fixture
def ranks(bytes_folder):
    """The server, and its second rank's process. Without torchrun, whose agent would end the one with the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    options = ["--num-pipeline-ranks", "2", "--distributed-timeout", str(PATIENCE), "--max-len", "2048"]
    second = subprocess.Popen(
        [sys.executable, "-m", "maestrale", "serve", str(bytes_folder), *options],
        env=ENVIRONMENT | job | {"RANK": "1", "LOCAL_RANK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = None
    try:
        server = Live(bytes_folder, *options, env=job | {"RANK": "0", "LOCAL_RANK": "0"})
        yield server, second
    finally:
        if server is not None:
            server.close()
        second.kill()
        second.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_server_with_its_name(ranks, how):
    server, second = ranks
    stream = open_request(server, "/v1/completions", LONG | {"stream": True})
    eventually(lambda: server.metric("maestrale_generated_tokens_total") > 5, 60)
    began = time.monotonic()
    os.kill(second.pid, how)
    assert read_events(read_all(stream))[-1]["error"]["code"] == "engine_stopped"
    stream.close()
    assert server.wait() == 6
    assert time.monotonic() - began < 3 * PATIENCE
    assert any("rank 1" in line for line in server.log)
    assert not any("Traceback" in line for line in server.log)


def test_sigkill_of_the_server_ends_the_other_ranks(ranks):
    server, second = ranks
    assert server.complete("Once").status == 200
    server.process.kill()
    assert second.wait(60) == 6


def test_sigterm_of_the_server_ends_the_other_ranks(ranks):
    server, second = ranks
    assert server.complete("Once").status == 200
    assert server.stop() == 0
    assert second.wait(60) == 0
