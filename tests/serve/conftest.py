"""The servers that the tests ask: one with the bundled model for all, others with tiny models and tight limits."""

import pytest
from live import BYTES, Live
from tiny import make_folder, write_tekken


@pytest.fixture(scope="session")
def stories():
    """The bundled model in float32. Left idle by every test."""
    server = Live("--dtype", "float32", "--max-body", 2_000_000)
    yield server
    server.close()


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory):
    """A tiny random model of bytes with a v7 tokenizer; its context holds 2048 tokens."""
    folder = make_folder(tmp_path_factory.mktemp("serve") / "bytes", BYTES)
    write_tekken(folder)
    return folder


@pytest.fixture
def start(bytes_folder):
    """Live, on the tiny model; ended with the test."""
    started = []

    def live(*args: object, **options) -> Live:
        started.append(Live(bytes_folder, *args, **options))
        return started[-1]

    yield live
    for server in started:
        server.close()
