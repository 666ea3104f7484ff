"""The servers that the tests ask: one with the bundled model for all, others with tiny models and tight limits."""

import pytest
from browser import Page, start_chromium
from live import BYTES, Live, eventually
from tiny import make_folder, write_tekken


@pytest.fixture(scope="session")
def stories():
    """The bundled model in float32. Left idle by every test."""
    server = Live("stories", "--dtype", "float32", "--max-body", 2_000_000)
    yield server
    server.close()


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory):
    """A tiny random model of bytes with a v7 tokenizer; its context holds 2048 tokens."""
    folder = make_folder(tmp_path_factory.mktemp("serve") / "bytes", BYTES)
    write_tekken(folder)
    return folder


@pytest.fixture(scope="session")
def bytes_server(bytes_folder):
    """One server with the tiny model for those who need no settings of their own. Left idle by every test."""
    server = Live(bytes_folder)
    yield server
    server.close()


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


@pytest.fixture(scope="session")
def moe_server():
    """The bundled mixture, on the slower backend: its replies can be stopped."""
    live = Live("stories-moe", "--dtype", "float32", "--backend", "torch")
    yield live
    live.close()


@pytest.fixture(scope="session")
def driver():
    chrome = start_chromium()
    yield chrome
    chrome.quit()


@pytest.fixture
def page(driver, moe_server):
    driver.get_log("browser")
    one = Page(driver, moe_server)
    one.fresh(temperature=0, max_tokens=24)
    yield one
    assert one.complaints() == []
    eventually(lambda: moe_server.metric("maestrale_engine_running") == 0, 10)


@pytest.fixture
def chat_page(driver, start):
    """With a tiny model that has a chat form; what it says is noise."""
    one = Page(driver, start())
    driver.get_log("browser")
    one.fresh(temperature=0, max_tokens=12)
    yield one
    assert one.complaints() == []
