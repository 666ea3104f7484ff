"""What the chat page looks like and who can use it. Screenshots are left in build/screenshots."""

import json

import pytest
from browser import BEGINNING, SHOTS

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys, ActionChains = webdriver.Keys, webdriver.ActionChains


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
