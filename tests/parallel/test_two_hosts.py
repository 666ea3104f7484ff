"""Two hosts, as two network namespaces joined by a cable of their own: a model over both, and the cable cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import psutil
import pytest
from parallel.start import PLAIN, gone, torchrun
from serve.live import BYTES, eventually
from tiny import make_folder, write_tekken

from maestrale import LLM, SamplingParams

TIMEOUT = 8  # seconds that a rank may stay silent
CABLE, OUTSIDE = "10.213.7.", "10.213.8."  # between the hosts; from host 1 to here, where the client is


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the program ip"
    name = f"mae{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return None


WHY_NOT = why_not()
pytestmark = [pytest.mark.alone, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@pytest.fixture
def hosts():
    """Names of two namespaces: `eth0` between them, and `eth1` from the first to here."""
    names = [f"mae{os.getpid()}h{i}" for i in (1, 2)]
    here = f"mae{os.getpid()}"
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        ip("link", "add", here, "type", "veth", "peer", "name", "eth1", "netns", names[0])
        for i, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"{CABLE}{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", names[0], "address", "add", f"{OUTSIDE}1/24", "dev", "eth1")
        ip("-n", names[0], "link", "set", "eth1", "up")
        ip("address", "add", f"{OUTSIDE}2/24", "dev", here)
        ip("link", "set", here, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def folder(tmp_path):
    made = make_folder(tmp_path / "bytes", replace(BYTES, max_position_embeddings=40_000))
    write_tekken(made)
    return made


class Agents:
    """torchrun on both hosts, with what they write."""

    def __init__(self, hosts, *command: object):
        self.lines: list[str] = []
        self.processes = [self._start(name, i, command) for i, name in enumerate(hosts, start=1)]
        self.readers = [threading.Thread(target=self._read, args=(process,)) for process in self.processes]
        for reader in self.readers:
            reader.start()

    def _start(self, name: str, number: int, command: tuple[object, ...]) -> subprocess.Popen[str]:
        options = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{CABLE}1:29400", "--rdzv-id", "x")
        options += ("--rdzv-conf", f"is_host={int(number == 1)}", "--local-addr", f"{CABLE}{number}")
        return subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, *torchrun(1, *options), *map(str, command)],
            env=os.environ | PLAIN | {"GLOO_SOCKET_IFNAME": "eth0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.lines.append(line)  # line by line, as they come

    def says(self, words: str) -> bool:
        assert all(process.poll() is None for process in self.processes), "".join(self.lines)
        return any(words in line for line in self.lines)

    def ranks(self) -> list[psutil.Process]:
        return [child for process in self.processes for child in psutil.Process(process.pid).children(recursive=True)]

    def close(self) -> None:
        for process in self.processes:
            ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for one in (process, *ranks):
                one.kill()
            process.wait()
        for reader in self.readers:
            reader.join()


def serve(hosts, folder):
    agents = Agents(
        hosts,
        *("-m", "maestrale", "serve", folder, "--num-pipeline-ranks", 2, "--dtype", "float32"),
        *("--host", f"{OUTSIDE}1", "--port", 8000, "--distributed-timeout", TIMEOUT),
    )
    try:
        eventually(lambda: agents.says("serving bytes on"), 120)
    except AssertionError:
        agents.close()
        raise
    return agents


def ask(**fields: object):
    body = {"prompt": "Once", "temperature": 0} | fields
    request = urllib.request.Request(
        f"http://{OUTSIDE}1:8000/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)


def test_a_client_outside_is_served_by_a_model_over_two_hosts(hosts, folder):
    agents = serve(hosts, folder)
    try:
        with ask(max_tokens=16) as answer:
            text = json.loads(answer.read())["choices"][0]["text"]
        params = SamplingParams(max_tokens=16, temperature=0)
        assert text == LLM(folder, dtype="float32", max_len=64).generate("Once", params)[0].text
        with ask(max_tokens=16, stream=True) as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        ranks = agents.ranks()
        assert len(ranks) == 2
        agents.processes[0].send_signal(signal.SIGTERM)
        agents.processes[0].wait(60)
        agents.processes[1].wait(60)
        assert psutil.wait_procs(ranks, timeout=10)[1] == []
    finally:
        agents.close()


def test_a_cable_cut_in_mid_stream_ends_the_stream_with_an_error_and_all_ranks(hosts, folder):
    agents = serve(hosts, folder)
    try:
        ranks = agents.ranks()
        with ask(max_tokens=39_000, ignore_eos=True, stream=True) as answer:
            assert answer.readline().startswith(b"data: ")
            ip("-n", hosts[1], "link", "set", "eth0", "down")
            begun = time.monotonic()
            rest = answer.read()
        assert b'"engine_stopped"' in rest
        assert time.monotonic() - begun < 4 * TIMEOUT
        eventually(lambda: all(gone(rank) for rank in ranks), 150)
        assert any("rank 1 does not answer" in line for line in agents.lines), "".join(agents.lines)
    finally:
        agents.close()
