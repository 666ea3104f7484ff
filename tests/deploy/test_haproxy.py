"""`deploy/haproxy.cfg`: who knocks is answered, though one of two servers dies."""

import contextlib
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from parallel.start import free_port
from serve.live import BYTES, Live, eventually
from tiny import make_folder, write_tekken

HAPROXY = shutil.which("haproxy")
CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")


@pytest.fixture
def behind(tmp_path):
    """(address, the two servers behind it)"""
    folder = make_folder(tmp_path / "bytes", BYTES)
    write_tekken(folder)
    with contextlib.ExitStack() as ended:
        servers = [ended.enter_context(contextlib.closing(Live(folder))) for _ in range(2)]
        port, text = free_port(), CONFIG.read_text()
        places = {":80\n": f"127.0.0.1:{port}\n", "maxconn 10000": "maxconn 100"}  # as few files as a test may open
        places |= {f"10.0.0.{i}:8000": f"127.0.0.1:{server.port}" for i, server in enumerate(servers, start=1)}
        for place, here in places.items():
            assert text.count(place) == 1
            text = text.replace(place, here)
        config = tmp_path / "haproxy.cfg"
        config.write_text(text)
        proxy = subprocess.Popen([HAPROXY, "-db", "-f", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ended.callback(proxy.wait)
        ended.callback(proxy.terminate)
        yield f"http://127.0.0.1:{port}", servers


def ask(address: str, key: str) -> int:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    body = b'{"prompt": "Once", "max_tokens": 4, "temperature": 0}'
    request = urllib.request.Request(f"{address}/v1/completions", body, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        answer.read()
        return answer.status


def answered(server: Live) -> float:
    return server.metric("maestrale_prefix_tokens_asked_total")


def test_a_key_stays_with_a_server_and_finds_another_one_when_that_is_gone(behind):
    address, servers = behind
    eventually(lambda: both_answer(address), 20)
    before = [answered(server) for server in servers]
    for _ in range(6):
        assert ask(address, "a") == 200
    news = [answered(server) - old for server, old in zip(servers, before, strict=True)]
    assert min(news) == 0 < max(news)
    mine = servers[news.index(max(news))]
    mine.process.kill()
    for _ in range(3):
        assert ask(address, "a") == 200


def both_answer(address: str) -> bool:
    with contextlib.suppress(OSError):
        return all(ask(address, f"key {i}") == 200 for i in range(8))
    return False
