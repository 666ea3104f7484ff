"""The chat page in a real Chromium, with what a test wants to know of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from live import eventually

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ENTER = "\ue007"  # as WebDriver writes the key
BEGINNING = "Once upon a time there was a fisherman who lived by the sea."


def start_chromium():
    """Skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(switch)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Page:
    """One page. Selectors are CSS; keys are Selenium's."""

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
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

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
        self.one("#say").send_keys(words, ENTER)

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


def completed(server, prompt, **fields):
    fields = {"max_tokens": 24, "top_p": 0.9, "repetition_penalty": 1.1} | fields
    return server.complete(prompt, **fields).json["choices"][0]
