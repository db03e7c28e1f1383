"""The page in a real Chromium: what a visitor does and sees, against any server that serves it.

`Studio` is one visitor; `make_watch_cancel_play` is the way through the page that every server has to allow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs chromium and chromedriver (Debian: chromium, chromium-driver)"
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have; the only pages shown are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
DESKTOP, PHONE = (1280, 900), (390, 844)

# Notes whatever a card shows on its way, however short: {id: {status: [...], previews: [...]}}.
WATCH = """
window.watched = {};
const note = () => {
  for (const card of document.querySelectorAll('.card')) {
    const seen = window.watched[card.dataset.id] ??= {status: [], previews: []};
    const add = (list, value) => value && list.at(-1) !== value && list.push(value);
    const preview = card.querySelector('.preview');
    if (!card.querySelector('.run').hidden) add(seen.status, card.querySelector('[data-part=status]').textContent);
    if (!preview.hidden) add(seen.previews, preview.src);
  }
};
new MutationObserver(note).observe(document.getElementById('gallery'),
  {subtree: true, childList: true, attributes: true, characterData: true});
note();
"""


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """Start Chromium with a fresh profile in `folder`; it downloads nothing, and finds no host but the loopback."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Studio:
    """The page at `url`, and a visitor in front of it."""

    def __init__(self, driver: webdriver.Chrome, url: str, wait_s: float = 20) -> None:
        self.driver, self.url, self.wait_s = driver, url.rstrip("/"), wait_s

    # --- looking --------------------------------------------------------------------------------------------------

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def until(self, what: Callable[[], Any], message: str = "") -> Any:
        """Wait until `what` returns something true, and return it."""
        ignored = WebDriverWait(self.driver, self.wait_s, poll_frequency=0.03)
        return ignored.until(lambda _: what(), message)

    def find(self, selector: str, root: Any = None) -> WebElement:
        return (root or self.driver).find_element(By.CSS_SELECTOR, selector)

    def is_shown(self, selector: str) -> bool:
        return any(found.is_displayed() for found in self.driver.find_elements(By.CSS_SELECTOR, selector))

    @property
    def cards(self) -> list[str]:
        """Ids of the jobs in the gallery, the newest first."""
        return self.script("return [...document.querySelectorAll('.card')].map(card => card.dataset.id)")

    def card(self, video_id: str, selector: str = "") -> WebElement:
        return self.find(f'.card[data-id="{video_id}"] {selector}')

    def state(self, video_id: str) -> str:
        return str(self.card(video_id, ".stage").get_attribute("data-state"))

    def watched(self, video_id: str) -> dict[str, list[str]]:
        return self.script("return window.watched[arguments[0]]", video_id)

    def console(self, *expected: str) -> list[str]:
        """Return the browser's complaints since the last call, without lines that hold an `expected` text."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [line for line in lines if not any(text in line for text in expected)]

    def hosts(self) -> set[str]:
        """All hosts that the open page has sent requests to."""
        names = "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        urls = self.script(f"return {names}.map(entry => entry.name)")
        return {urlsplit(url).netloc for url in urls if not url.startswith(("blob:", "data:"))}

    # --- doing ----------------------------------------------------------------------------------------------------

    def show_as(self, size: tuple[int, int] = DESKTOP, dark: bool = False, still: bool = False) -> None:
        """Set the window's size, scheme and motion by DevTools: a real window cannot be as narrow as a phone."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.is_shown("#login, #studio"), "the page shows nothing")
        self.script(WATCH)

    def log_in(self, key: str) -> None:
        self.until(lambda: self.is_shown("#login"), "no login form")
        self.find("#key").send_keys(key, Keys.ENTER)
        self.until(lambda: self.is_shown("#generate") and self.find("#composer [name=size]").get_attribute("value"))

    def choose(self, **values: str) -> None:
        """Fill in fields of the form; those in the fold are unfolded first."""
        for name, value in values.items():
            field = self.find(f'#composer [name="{name}"]')
            if not field.is_displayed():
                self.find("#advanced summary").click()
            if field.tag_name == "select":
                self.find(f'option[value="{value}"]', field).click()
            else:
                field.clear()
                field.send_keys(value)

    def generate(self, prompt: str, **values: str) -> str:
        """Generate a video and return the new job's id."""
        before = self.cards
        self.choose(prompt=prompt, **values)
        self.find("#generate").click()
        return self.newest(before)

    def newest(self, before: list[str]) -> str:
        """Return the id of the job that was not there before."""
        return str(self.until(lambda: [card for card in self.cards if card not in before], "no new card")[0])

    def until_ended(self, video_id: str) -> str:
        self.until(lambda: self.state(video_id) in ("completed", "failed", "cancelled"), f"{video_id} does not end")
        return self.state(video_id)

    def open_viewer(self, video_id: str) -> None:
        self.card(video_id, "[data-part=open]").click()
        self.until(lambda: self.is_shown("#viewer"))

    def escape(self) -> None:
        self.driver.switch_to.active_element.send_keys(Keys.ESCAPE)

    def screenshot(self, path: str | Path) -> None:
        self.driver.save_screenshot(str(path))


def steps_in(statuses: list[str]) -> list[int]:
    """Return the steps in statuses such as "step 3 of 12, 2 s left"."""
    return [int(status.split()[1]) for status in statuses if status.startswith("step ")]


def make_watch_cancel_play(studio: Studio, **values: str) -> str:
    """Generate, see steps and previews, cancel another, play; returns the id of the video that was played."""
    made = studio.generate("a red circle moving right", size="64x64", **values)
    assert studio.until_ended(made) == "completed"
    seen = studio.watched(made)
    steps = steps_in(seen["status"])
    assert len(set(steps)) >= 2 and steps == sorted(steps), seen["status"]
    assert len(seen["previews"]) >= 2 and all(url.startswith("data:image/webp") for url in seen["previews"])

    endless = studio.generate("a blue star at night", size="64x64", num_inference_steps="1000")
    studio.until(lambda: steps_in(studio.watched(endless)["status"]), "it never began")
    studio.card(endless, "[data-part=cancel]").click()
    studio.until(lambda: studio.state(endless) == "cancelled")
    assert studio.card(endless, ".note").text == "Cancelled"

    clip = studio.card(made, "video")
    studio.script("arguments[0].scrollIntoView({block: 'center'})", clip)
    studio.until(lambda: studio.script("return arguments[0].readyState", clip) >= 2, "the clip does not load")
    studio.until(lambda: studio.script("return arguments[0].currentTime", clip) > 0, "the clip does not play")
    assert studio.script("const v = arguments[0]; return [v.videoWidth, v.videoHeight, v.loop]", clip) == [64, 64, True]
    return made


def problems(studio: Studio, *expected: str) -> str:
    """Return all that the page should not have done: complaints of the browser, and requests to other hosts."""
    others = studio.hosts() - {urlsplit(studio.url).netloc}
    return (
        json.dumps({"console": found, "hosts": sorted(others)})
        if (found := studio.console(*expected)) or others
        else ""
    )
