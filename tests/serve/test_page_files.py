"""The files of the chat page, how they are served, and the fields that the page asks for."""

import re
from pathlib import Path

import pytest
from browser import BEGINNING, Page

import maestrale

PAGE = Path(maestrale.__file__).parent / "serve" / "page"


def test_the_page_runs_nothing_but_its_own_files_and_asks_no_other_host():
    for path in PAGE.iterdir():
        text = path.read_text()
        foreign = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
        assert set(foreign) <= {"http://www.w3.org"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
        assert not re.search(r"\son[a-z]+=|\sstyle=|<script>|javascript:", text), path


def test_files_are_served_with_a_strict_policy(moe_server):
    for path in ("/", *(f"/page/{file.name}" for file in PAGE.iterdir())):
        answer = moe_server.get(path)
        assert answer.status == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert moe_server.get("/page/main.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nothing.js", "/page/..%2fpage.py", "/page/%2e%2e", "/page/main.js/x"]
)
def test_no_other_file_is_served(moe_server, path):
    assert moe_server.get(path).status == 404


def test_a_server_with_keys_shows_the_page_to_those_who_have_one(start):
    server = start("--api-key", "secret-key-1")
    assert server.get("/").status == 401
    assert "Basic" in server.get("/").headers["www-authenticate"]
    basic = {"authorization": "Basic OnNlY3JldC1rZXktMQ=="}  # no name, the key as password
    assert server.get("/", basic).status == 200
    assert server.get("/page/main.js", basic).status == 200


def test_the_browsers_own_question_for_a_key_lets_the_page_ask(driver, start):
    server = start("--api-key", "secret-key-1")
    one = Page(driver, server)
    driver.get_log("browser")
    driver.get(f"http://me:secret-key-1@127.0.0.1:{server.port}/")
    one.until(lambda: one.one("#model").text not in ("", "…"))
    one.run("document.getElementById('say').value = 'hello'; document.getElementById('composer').requestSubmit()")
    one.until(lambda: one.all(".assistant .actions button"))
    assert one.complaints() == []


# The model view's fields


def test_experts_and_the_cache_are_told_only_where_they_are_asked_for(moe_server):
    plain, seen = (moe_server.complete(BEGINNING, logprobs=1, **more).json for more in ({}, {"model_view": True}))
    assert "cache" not in plain
    assert "experts" not in plain["choices"][0]
    told = seen["choices"][0]
    assert told["text"] == plain["choices"][0]["text"]
    assert [len(token) for token in told["experts"]] == [4] * 8
    assert all(
        len(set(layer)) == 2 and 0 <= min(layer) <= max(layer) < 8 for token in told["experts"] for layer in token
    )
    assert seen["cache"]["tokens"] == seen["usage"]["total_tokens"]
    (kind,) = seen["cache"]["kinds"]
    assert kind["window"] == 256
    assert 0 < kind["held"] <= kind["pages"]
    assert kind["kept"] > 0, "the pages of the first answer are kept for those that begin alike"
    short = moe_server.complete(BEGINNING, max_tokens=1, model_view=True).json
    held = -(-short["usage"]["prompt_tokens"] // 16)  # pages of 16 tokens, though none is held any more
    assert short["cache"]["kinds"][0]["held"] == held


@pytest.mark.parametrize("ask", ["complete", "chat"])
def test_a_stream_tells_them_token_by_token(moe_server, ask):
    fields = {"logprobs": 1 if ask == "complete" else True, "max_tokens": 200}  # some are sent before the last is made
    whole = getattr(moe_server, ask)(BEGINNING, model_view=True, **fields).json
    events = getattr(moe_server, ask)(BEGINNING, model_view=True, stream=True, **fields).events
    pieces = [event for event in events if event["choices"] and event["choices"][0]["logprobs"]]
    told = [row for event in pieces for row in event["choices"][0]["experts"]]
    assert told == whole["choices"][0]["experts"]
    counts = [event["cache"]["tokens"] for event in pieces]
    assert counts == sorted(counts)
    assert counts[-1] <= whole["cache"]["tokens"]
    assert max(event["cache"]["kinds"][0]["held"] for event in pieces) > 0


def test_a_model_that_is_no_mixture_has_no_experts(stories):
    assert stories.complete(BEGINNING, model_view=True).json["choices"][0]["experts"] is None


@pytest.mark.parametrize("value", [1, "true", []])
def test_model_view_is_true_or_false(moe_server, value):
    answer = moe_server.complete(BEGINNING, model_view=value)
    assert (answer.status, answer.error["param"]) == (400, "model_view")
