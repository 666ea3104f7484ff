"""Conversations on the chat page, in a real Chromium against a real server."""

import json
import re
import time

import pytest
from browser import BEGINNING, completed

Keys = pytest.importorskip("selenium.webdriver", reason="selenium is not installed").Keys
HOSTILE = """# <script>window.hacked = 1</script>

<img src=x onerror="window.hacked = 2"> and <b>bold?</b> &lt;script&gt;

[a link](javascript:window.hacked=3) [another](data:text/html,<script>hacked=4</script>) [good](https://example.org/x)

![picture](https://example.org/tracker.png)

```html
</code></pre><script>window.hacked = 5</script>
```

| <svg onload="window.hacked=6"> | b |
|---|---|
| `<iframe src="javascript:hacked=7">` | <https://example.org/> |
"""


def test_what_is_sent_is_gone_on_with_as_the_api_does(page):
    page.send(BEGINNING)
    page.done()
    assert page.text() == BEGINNING + completed(page.server, BEGINNING)["text"]
    assert re.search(r"24 tokens · [\d.]+ tokens/s", page.one(".stats").text)


def test_an_empty_field_lets_the_story_go_on(page):
    page.send(BEGINNING)
    page.done()
    first = page.text()
    page.press("Go on")
    page.done()
    assert page.text() == first + completed(page.server, first)["text"]


def test_text_appears_while_it_is_written_and_stop_keeps_what_there_is(page):
    page.fresh(temperature=1, max_tokens=1500)  # at 0 it soon repeats itself, which is looked up, not computed
    page.send(BEGINNING)
    seen = set()
    page.until(lambda: seen.add(len(page.text())) or len(seen) > 4)
    assert page.busy()
    page.one("#stop").click()
    page.done(5)
    stopped = page.text()
    assert len(stopped) > len(BEGINNING)
    page.until(lambda: page.server.metric("maestrale_engine_running") == 0, 5)
    time.sleep(0.3)
    assert page.text() == stopped


def test_a_reload_brings_the_conversation_back(page):
    page.send(BEGINNING)
    page.done()
    before = page.text()
    page.open()
    assert page.text() == before
    assert page.one("#list .open .talk").text.startswith(BEGINNING[:40])


def test_versions_of_a_reply_stand_beside_each_other(page):
    page.fresh(temperature=1.5, max_tokens=24)
    page.send("Once upon a time there was a")  # at a sentence's end a reply may be empty
    page.done()
    first = page.text()
    page.press("Another version")
    page.done()
    second = page.text()
    assert first != second
    assert "2/2" in page.one(".branch").text
    page.press("The version before")
    assert page.text() == first
    assert "1/2" in page.one(".branch").text
    page.open()
    assert page.text() == first


def test_a_version_that_fails_leaves_the_one_before(page):
    page.fresh(temperature=0, max_tokens=8)
    page.send(BEGINNING)
    page.done()
    first = page.text()
    page.run(
        "const kept = JSON.parse(localStorage.getItem('maestrale.settings'));"
        "kept.text.temperature = -1;"
        "localStorage.setItem('maestrale.settings', JSON.stringify(kept))"
    )
    page.open()
    page.press("Another version")
    page.until(lambda: "temperature" in page.one("#problem").text)
    assert page.text() == first
    (complaint,) = page.complaints()
    assert "400" in complaint


def test_conversations_are_listed_opened_and_deleted(page):
    for beginning in ("The old king", "A little mouse"):
        page.press("New conversation")
        page.send(beginning)
        page.done()
    titles = [entry.text for entry in page.all("#list .talk")]
    assert [title.split(",")[0][:8] for title in titles] == ["A little", "The old "]
    page.all("#list .talk")[1].click()
    assert page.text().startswith("The old king")
    remove = page.all("#list .remove")[1]
    page.run("arguments[0].click()", remove)
    assert len(page.all("#list .talk")) == 2, "the first press only asks"
    page.run("arguments[0].click()", remove)
    assert [entry.text[:8] for entry in page.all("#list .talk")] == ["A little"]


def test_a_failure_is_told_and_can_be_tried_again(page):
    page.run(
        "window.whole = window.fetch; window.fetch = () => Promise.resolve(new Response("
        "JSON.stringify({error: {message: 'the queue is full'}}), {status: 429}))"
    )
    page.send(BEGINNING)
    page.until(lambda: page.one("#problem").is_displayed())
    assert page.one("#problem").text == "the queue is full"
    page.run("window.fetch = window.whole")
    page.press("Try again")
    page.done()
    assert not page.one("#problem").is_displayed()
    assert page.text() == BEGINNING + completed(page.server, BEGINNING)["text"]


def test_a_chat_goes_turn_by_turn_and_an_edit_is_a_branch(chat_page):
    page = chat_page
    page.send("first words")
    page.done()
    said = [{"role": "user", "content": "first words"}]
    fields = {"temperature": 0, "max_tokens": 12, "top_p": 0.95}
    reply = page.server.post("/v1/chat/completions", {"messages": said} | fields).json["choices"][0]["message"][
        "content"
    ]
    stored = page.run("return JSON.parse(localStorage.getItem('maestrale.conversations'))[0]")
    assert sorted(node["content"] for node in stored["nodes"].values()) == sorted(["first words", reply])
    page.press("Edit this message; what follows becomes another branch")
    field = page.one(".edit textarea")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("other words", Keys.ENTER)
    page.done()
    assert page.one(".user .body").text == "other words"
    assert "2/2" in page.one(".user .branch").text
    page.press("The version before")
    assert page.one(".user .body").text == "first words"


def test_a_hostile_conversation_runs_nothing(page, tmp_path):
    hostile = tmp_path / "hostile.json"
    messages = [{"role": "system", "content": HOSTILE}]
    messages += [{"role": role, "content": HOSTILE} for role in ("user", "assistant", "user", "assistant")]
    hostile.write_text(json.dumps({"messages": messages}))
    page.bring(hostile)
    page.until(lambda: len(page.all(".message")) == 4)
    time.sleep(0.5)
    assert page.run("return window.hacked ?? null") is None
    assert (
        page.run("return document.querySelectorAll('#messages :is(script, img, iframe, svg, b, object)').length") == 0
    )
    links = [a.get_attribute("href") for a in page.all("#messages a")]
    assert links
    assert all(link.startswith("https://example.org/") for link in links)
    assert page.all(".user .body")[0].text == HOSTILE.strip()
    assert "<script>window.hacked = 1</script>" in page.one(".assistant h3").text
    page.shot("hostile")


def test_a_hostile_message_is_only_text(chat_page):
    page = chat_page
    page.send("<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>")
    page.done()
    assert page.one(".user .body").text.startswith("<img src=x")
    assert page.run("return window.hacked ?? null") is None


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[1]",
        '{"messages": [{"role": "pirate", "content": "x"}]}',
        '{"maestrale": [{"nodes": {"a": {"id": 3}}}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused(page, tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_text(content)
    page.bring(path)
    page.until(lambda: page.one("#problem").is_displayed())
    assert page.one("#problem").text.startswith("odd.json: ")


def test_a_damaged_store_is_no_obstacle(page):
    for content in (
        "{",
        "3",
        '[{"nodes": {"a": {"id": "a", "parent": "a", "role": "user", "content": "x"}}, "leaf": "a"}]',
    ):
        page.run("localStorage.setItem('maestrale.conversations', arguments[0])", content)
        page.run("window.addEventListener('pagehide', (event) => event.stopImmediatePropagation(), {capture: true})")
        page.open()
        assert page.one("#empty").is_displayed()


def test_what_is_exported_can_be_imported_and_is_what_the_terminal_loads(page, tmp_path):
    page.send(BEGINNING)
    page.done()
    shown = page.text()
    exported = page.driver.execute_async_script(
        "const done = arguments[0], [one] = JSON.parse(localStorage.getItem('maestrale.conversations'));"
        "import('/page/store.js').then((store) => done(store.exported(store.imported({maestrale: [one]})[0])))"
    )
    assert exported["text"] == shown
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"]
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps(exported))
    page.fresh(temperature=0)
    page.bring(path)
    page.until(lambda: page.text() == shown)


def test_settings_are_sent_and_kept(page):
    page.one("#settings-open").click()
    for name, value in (("max_tokens", "7"), ("seed", "5")):
        page.one(f"#{name}").clear()
        page.one(f"#{name}").send_keys(value)
    page.run(
        "const slider = document.getElementById('temperature'); slider.value = 1.5;"
        "slider.dispatchEvent(new Event('input'))"
    )
    page.open()
    page.send(BEGINNING)
    page.done()
    expected = completed(page.server, BEGINNING, max_tokens=7, seed=5, temperature=1.5)["text"]
    assert page.text() == BEGINNING + expected
