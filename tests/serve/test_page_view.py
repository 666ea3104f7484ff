"""The model view on the chat page, in a real Chromium: what it shows is what the API says."""

import json
import math
import re

import pytest
from browser import BEGINNING, completed

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys, ActionChains = webdriver.Keys, webdriver.ActionChains


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
        shown = {bar.find_element("tag name", "code").get_attribute("textContent") for bar in bars}
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
        m.find_element("tag name", "span").text: m.find_element("tag name", "small").text for m in page.all(".meter")
    }
    known = len(page.server.post("/tokenize", {"prompt": BEGINNING}).json["tokens"]) + 24
    assert meters["Context"] == f"{known} of 2,048 tokens"
    assert meters["Window of 256"] == f"{known} of 256 tokens"
    page.shot("model-view")


def test_tokens_can_be_gone_through_with_the_arrow_keys(page):
    page.send(BEGINNING)
    page.done()
    box = page.one(".tokens")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert box.get_attribute("aria-activedescendant") == "token-2"
    box.send_keys(Keys.END)
    assert box.get_attribute("aria-activedescendant") == "token-23"
    assert page.one(".bars").get_attribute("aria-label") == "Token 24 of 24"


KEPT = "return JSON.parse(localStorage.getItem('maestrale.views') ?? '[]')"


def test_a_reload_shows_the_view_again(page):
    page.send(BEGINNING)
    page.done()
    tokens, label = [token.text for token in page.all(".token")], page.one("canvas.strip").get_attribute("aria-label")
    meters = [m.text for m in page.all(".meter small")]
    page.one(".tokens").send_keys(Keys.END)
    bars = page.one(".bars").text
    page.open()
    assert [token.text for token in page.all(".token")] == tokens
    assert page.one("canvas.strip").get_attribute("aria-label") == label
    assert [m.text for m in page.all(".meter small")] == meters
    page.one(".tokens").send_keys(Keys.END)
    assert page.one(".bars").text == bars


def test_of_a_deleted_conversation_no_view_is_kept(page):
    page.send(BEGINNING)
    page.done()
    assert len(page.run(KEPT)) == 1
    remove = page.one("#list .remove")
    for _ in range(2):
        page.run("arguments[0].click()", remove)
    assert page.run(KEPT) == []


def test_the_newest_views_are_kept_and_no_more_than_there_is_room_for(page):
    kept = page.driver.execute_async_script(
        """
        const done = arguments[0], token = { text: "x".repeat(1000), logprob: -1, others: [], experts: undefined };
        import('/page/views.js').then(({ keepView }) => {
          for (let i = 0; i < 9; i++) keepView({ id: `reply ${i}`, tokens: new Array(300).fill(token) });
          const all = JSON.parse(localStorage.getItem('maestrale.views'));
          done([all.map((text) => JSON.parse(text).id), localStorage.getItem('maestrale.views').length]);
        });
        """
    )
    assert kept[0] == [f"reply {i}" for i in (8, 7, 6, 5)]  # of some 300,000 characters each
    assert kept[1] < 1_600_000


@pytest.mark.parametrize(
    "damaged",
    ["{", '"x"', '["{", "3", "null"]', "tokens: 3", 'tokens: [["a", "b", [], null]]', 'tokens: [["a", -1, 3]]'],
)
def test_a_damaged_view_is_forgotten(page, damaged):
    page.send(BEGINNING)
    page.done()
    before = page.text()
    if damaged.startswith("tokens"):
        page.run(
            "const [one] = JSON.parse(localStorage.getItem('maestrale.views')), view = JSON.parse(one);"
            "view.tokens = arguments[0];"
            "localStorage.setItem('maestrale.views', JSON.stringify([JSON.stringify(view)]))",
            json.loads(damaged.removeprefix("tokens: ")),
        )
    else:
        page.run("localStorage.setItem('maestrale.views', arguments[0])", damaged)
    page.open()
    assert page.text() == before
    assert page.all(".token") == []
    assert page.run(KEPT) == []
