"""The chat page in a real Chromium, against a real server. Screenshots are left in build/screenshots."""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from live import Live, eventually

import maestrale

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys, ActionChains = webdriver.Keys, webdriver.ActionChains

PAGE = Path(maestrale.__file__).parent / "serve" / "page"
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
BEGINNING = "Once upon a time there was a fisherman who lived by the sea."
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


class Page:
    """The page in a browser of its own window size, with what a test wants to know of it."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self, width=1280, height=860):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.driver.get(self.server.url)
        self.until(lambda: self.one("#model").text not in ("", "…"))

    def fresh(self, **options):
        """Opened with an empty store. options: what the settings panel would set for stories."""
        self.driver.get(self.server.url + "/page/icon.svg")
        settings = {"panel": "view", "theme": "light", "text": options, "chat": options}
        self.run("localStorage.clear(); localStorage.setItem('maestrale.settings', arguments[0])", json.dumps(settings))
        self.open()

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self):
        """What the messages show, their labels and buttons left out."""
        return self.run("return [...document.querySelectorAll('.body')].map((e) => e.textContent).join('')")

    def until(self, condition, seconds=60):
        return eventually(condition, seconds)

    def busy(self):
        return self.one("#stop").is_displayed()

    def done(self, seconds=90):
        self.until(lambda: not self.busy(), seconds)

    def send(self, words):
        self.one("#say").send_keys(words, Keys.ENTER)

    def press(self, label):
        """The last button that shows or is called `label`."""
        buttons = [b for b in self.all("button") if label in (b.text, b.get_attribute("aria-label"))]
        self.run("arguments[0].click()", buttons[-1])

    def bring(self, path):
        self.one("#file").send_keys(str(path))

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def complaints(self):
        logged = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [line for line in logged if "favicon.ico" not in line]  # asked for where `fresh` opens a picture


@pytest.fixture(scope="module")
def server():
    live = Live("stories-moe", "--dtype", "float32", "--backend", "torch")  # the slower one: replies can be stopped
    yield live
    live.close()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(switch)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(driver, server):
    driver.get_log("browser")
    one = Page(driver, server)
    one.fresh(temperature=0, max_tokens=24)
    yield one
    assert one.complaints() == []
    eventually(lambda: server.metric("maestrale_engine_running") == 0, 10)


@pytest.fixture
def chat_page(driver, start):
    """With a tiny model that has a chat form; what it says is noise."""
    one = Page(driver, start())
    driver.get_log("browser")
    one.fresh(temperature=0, max_tokens=12)
    yield one
    assert one.complaints() == []


def completed(server, prompt, **fields):
    fields = {"max_tokens": 24, "top_p": 0.9, "repetition_penalty": 1.1} | fields
    return server.complete(prompt, **fields).json["choices"][0]


# The files


def test_the_page_runs_nothing_but_its_own_files_and_asks_no_other_host():
    for path in PAGE.iterdir():
        text = path.read_text()
        foreign = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
        assert set(foreign) <= {"http://www.w3.org"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
        assert not re.search(r"\son[a-z]+=|\sstyle=|<script>|javascript:", text), path


def test_files_are_served_with_a_strict_policy(server):
    for path in ("/", *(f"/page/{file.name}" for file in PAGE.iterdir())):
        answer = server.get(path)
        assert answer.status == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.get("/page/main.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nothing.js", "/page/..%2fpage.py", "/page/%2e%2e", "/page/main.js/x"]
)
def test_no_other_file_is_served(server, path):
    assert server.get(path).status == 404


def test_a_server_with_keys_shows_the_page_to_those_who_have_one(start):
    server = start("--api-key", "secret-key-1")
    assert server.get("/").status == 401
    assert "Basic" in server.get("/").headers["www-authenticate"]
    basic = {"authorization": "Basic OnNlY3JldC1rZXktMQ=="}  # no name, the key as password
    assert server.get("/", basic).status == 200
    assert server.get("/page/main.js", basic).status == 200


@in_browser
def test_the_browsers_own_question_for_a_key_lets_the_page_ask(driver, start):
    server = start("--api-key", "secret-key-1")
    one = Page(driver, server)
    driver.get_log("browser")
    driver.get(f"http://me:secret-key-1@127.0.0.1:{server.port}/")
    one.until(lambda: one.one("#model").text not in ("", "…"))
    one.run("document.getElementById('say').value = 'hello'; document.getElementById('composer').requestSubmit()")
    one.until(lambda: one.all(".assistant .actions button"))
    assert one.complaints() == []


# What the page asks for: the model view's fields


def test_experts_and_the_cache_are_told_only_where_they_are_asked_for(server):
    plain, seen = (server.complete(BEGINNING, logprobs=1, **more).json for more in ({}, {"model_view": True}))
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
    assert 0 <= kind["held"] <= kind["held"] + kind["kept"] <= kind["pages"]
    assert kind["kept"] > 0, "the pages of the first answer are kept for those that begin alike"


@pytest.mark.parametrize("ask", ["complete", "chat"])
def test_a_stream_tells_them_token_by_token(server, ask):
    fields = {"logprobs": 1 if ask == "complete" else True, "max_tokens": 200}  # some are sent before the last is made
    whole = getattr(server, ask)(BEGINNING, model_view=True, **fields).json
    events = getattr(server, ask)(BEGINNING, model_view=True, stream=True, **fields).events
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
def test_model_view_is_true_or_false(server, value):
    answer = server.complete(BEGINNING, model_view=value)
    assert (answer.status, answer.error["param"]) == (400, "model_view")


# The page


@in_browser
def test_what_is_sent_is_gone_on_with_as_the_api_does(page):
    page.send(BEGINNING)
    page.done()
    assert page.text() == BEGINNING + completed(page.server, BEGINNING)["text"]
    assert re.search(r"24 tokens · [\d.]+ tokens/s", page.one(".stats").text)


@in_browser
def test_an_empty_field_lets_the_story_go_on(page):
    page.send(BEGINNING)
    page.done()
    first = page.text()
    page.press("Go on")
    page.done()
    assert page.text() == first + completed(page.server, first)["text"]


@in_browser
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


@in_browser
def test_a_reload_brings_the_conversation_back(page):
    page.send(BEGINNING)
    page.done()
    before = page.text()
    page.open()
    assert page.text() == before
    assert page.one("#list .open .talk").text.startswith(BEGINNING[:40])


@in_browser
def test_versions_of_a_reply_stand_beside_each_other(page):
    page.fresh(temperature=1.5, max_tokens=24)
    page.send(BEGINNING)
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


@in_browser
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


@in_browser
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


@in_browser
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


@in_browser
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


@in_browser
def test_a_hostile_message_is_only_text(chat_page):
    page = chat_page
    page.send("<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>")
    page.done()
    assert page.one(".user .body").text.startswith("<img src=x")
    assert page.run("return window.hacked ?? null") is None


@in_browser
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


@in_browser
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


@in_browser
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


@in_browser
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


# The model view


@in_browser
def test_the_view_shows_each_tokens_probability_alternatives_and_experts(page):
    page.send(BEGINNING)
    page.done()
    told = completed(page.server, BEGINNING, logprobs=6, model_view=True)
    tokens = page.all(".token")
    assert [token.get_attribute("textContent") for token in tokens] == told["logprobs"]["tokens"]
    for i, token in enumerate(tokens[:5]):
        ActionChains(page.driver).move_to_element(token).perform()
        page.until(lambda token=token: "chosen" in token.get_attribute("class"), 5)
        bars = page.all(".bars li")
        own = page.one(".bars .own b").text
        p = math.exp(told["logprobs"]["token_logprobs"][i])
        assert abs(float(own.strip("%<")) / 100 - p) < 0.006
        shown = {bar.find_element(By.TAG_NAME, "code").get_attribute("textContent") for bar in bars}
        assert shown == {name.replace("\n", "⏎") for name in told["logprobs"]["top_logprobs"][i]}
        chips = [int(chip.text) for chip in page.all(".layers .chip")]
        assert chips == [expert for layer in told["experts"][i] for expert in layer]
    counts = [0] * 8
    for expert in (expert for token in told["experts"] for layer in token for expert in layer):
        counts[expert] += 1
    label = page.one("canvas.strip").get_attribute("aria-label")
    assert label.startswith("Experts of 24 tokens in 4 layers")
    for expert, share in enumerate(re.findall(r"expert \d+ ([\d.]+)%", label)):
        assert abs(float(share) - 100 * counts[expert] / sum(counts)) < 0.51
    meters = {
        m.find_element(By.TAG_NAME, "span").text: m.find_element(By.TAG_NAME, "small").text for m in page.all(".meter")
    }
    known = len(page.server.post("/tokenize", {"prompt": BEGINNING}).json["tokens"]) + 24
    assert meters["Context"] == f"{known} of 2,048 tokens"
    assert meters["Window of 256"] == f"{known} of 256 tokens"
    page.shot("model-view")


@in_browser
def test_tokens_can_be_gone_through_with_the_arrow_keys(page):
    page.send(BEGINNING)
    page.done()
    box = page.one(".tokens")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert box.get_attribute("aria-activedescendant") == "token-2"
    box.send_keys(Keys.END)
    assert box.get_attribute("aria-activedescendant") == "token-23"
    assert page.one(".bars").get_attribute("aria-label") == "Token 24 of 24"


# Everybody


@in_browser
def test_every_control_has_a_name_and_every_colour_enough_contrast(page):
    page.send(BEGINNING)
    page.done()
    for opener in ("#settings-open", "#view-open"):
        if page.one(opener).get_attribute("aria-expanded") == "false":
            page.one(opener).click()
        for control in page.all("button, input:not([hidden]), textarea, select"):
            if control.is_displayed():
                assert control.accessible_name, control.get_attribute("outerHTML")
    for theme in ("light", "dark"):
        page.run("document.documentElement.dataset.theme = arguments[0]", theme)
        ratios = page.run(
            CONTRAST, ["#facts", ".user .body", ".assistant .body", "#send", "#hint", ".stats", ".talk", ".note"]
        )
        assert min(ratios.values()) >= 4.5, (theme, ratios)


CONTRAST = """
const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const light = (colour) => {
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
  return 'white';
};
return Object.fromEntries(arguments[0].map((selector) => {
  const node = document.querySelector(selector);
  const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
  return [selector, (a + 0.05) / (b + 0.05)];
}));
"""


@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(page, theme):
    page.run(
        "localStorage.setItem('maestrale.settings', arguments[0])",
        json.dumps({"theme": theme, "text": {"temperature": 0, "max_tokens": 60}}),
    )
    page.open(width=360, height=740)
    assert not page.one("#panel").is_displayed()
    page.send(BEGINNING)
    page.done()
    for selector in ("#send", "#say", "#view-open", "#side-open"):
        box = page.one(selector).rect
        assert box["x"] >= 0, selector
        assert box["x"] + box["width"] <= 360, selector
        assert box["y"] + box["height"] <= 740, selector
    page.shot(f"phone-{theme}")
    assert not page.one("#new").is_displayed()
    page.one("#side-open").click()
    page.until(lambda: page.one("#new").is_displayed(), 5)
    page.press("Close the list")
    page.one("#view-open").click()
    assert page.one(".tokens").is_displayed()
    page.shot(f"phone-view-{theme}")
    assert page.run("return document.scrollingElement.scrollWidth") <= 360
    page.one("body").send_keys(Keys.ESCAPE)
    assert not page.one("#panel").is_displayed()


@in_browser
def test_the_page_looks_right_in_both_colours(page):
    """Nothing is asserted but that there are two: pictures for people."""
    page.fresh(temperature=0.7, seed=7, max_tokens=220)
    page.send(BEGINNING)
    page.done()
    ActionChains(page.driver).move_to_element(page.all(".token")[14]).perform()
    page.shot("light")
    page.one("#theme").click()
    page.shot("dark")
    assert (SHOTS / "light.png").read_bytes() != (SHOTS / "dark.png").read_bytes()


# Markdown

LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer nofollow">{0}</a>'
SAMPLES = {
    "a *b* **c** `d` ~~e~~": "<p>a <em>b</em> <strong>c</strong> <code>d</code> <del>e</del></p>",
    "snake_case_name and 2*3*4": "<p>snake_case_name and 2<em>3</em>4</p>",
    "# One\ntwo": "<h3>One</h3><p>two</p>",
    "- a\n- b\n  - c\n\nd": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "<b>x</b> &amp;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    r"\*a\* \# b": "<p>*a* # b</p>",
    "[x](javascript:y) [z](/etc)": "<p>x z</p>",
    "a  \nb": "<p>a<br>b</p>",
    "<https://a.b/c?d=(e)>, https://a.b.": (
        f"<p>{LINK.format('https://a.b/c?d=(e)')}, {LINK.format('https://a.b')}.</p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
}
RENDER = """
const [texts, done] = arguments;
import('/page/markdown.js').then(({ show }) => {
  done(texts.map((text) => {
    const element = document.createElement('div'), began = performance.now();
    show(element, text);
    return [element.innerHTML, performance.now() - began];
  }));
});
"""


@in_browser
def test_markdown_becomes_the_elements_that_it_means(page):
    found = page.driver.execute_async_script(RENDER, list(SAMPLES))
    assert dict(zip(SAMPLES, [html for html, _ in found], strict=True)) == SAMPLES


@in_browser
def test_code_keeps_every_character_and_a_table_its_cells(page):
    code = "for i in range(3):\n\n    print('<b>', i)\n"
    (html, _), (table, _) = page.driver.execute_async_script(
        RENDER, [f"```python\n{code}```", "| a | b |\n|---|--:|\n| 1 | *2* |"]
    )
    assert f"<code>{code.replace('<', '&lt;').replace('>', '&gt;')[:-1]}</code>" in html
    assert '<th>a</th><th class="right">b</th>' in table
    assert '<td>1</td><td class="right"><em>2</em></td>' in table


@in_browser
@pytest.mark.parametrize(
    "unit", ["*", "[", "`", "_", "> ", "- ", "![](", "**a", "|", "\\", "1. ", "~~", "http://", " \n", "#"]
)
def test_odd_markdown_of_any_length_is_shown_soon(page, unit):
    ((_, milliseconds),) = page.driver.execute_async_script(RENDER, [unit * (40_000 // len(unit))])
    assert milliseconds < 2000


@in_browser
def test_a_text_that_grows_shows_what_the_whole_would(page):
    text = "\n\n".join(SAMPLES) + "\n\n```\ncode\n\nmore\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    script = """
    const [text, done] = arguments;
    import('/page/markdown.js').then(({ show }) => {
      const grown = document.createElement('div'), whole = document.createElement('div');
      for (let i = 0; i <= text.length; i += 3) show(grown, text.slice(0, i));
      show(grown, text);
      show(whole, text);
      done([grown.innerHTML, whole.innerHTML]);
    });
    """
    grown, whole = page.driver.execute_async_script(script, text)
    assert grown == whole
