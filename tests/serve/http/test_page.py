"""The page at `/` in a real Chromium, in front of a whole service: what a visitor can do, and what he cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from ..browser import MISSING, PHONE, Studio, chromium, make_watch_cancel_play, problems
from ..service import Service

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def studio(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Logged in; the tests share the browser, which takes two seconds to start."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        visitor = Studio(driver, service.url)
        visitor.show_as()
        visitor.open()
        visitor.find("#key").send_keys("a key that nobody has", Keys.ENTER)
        visitor.until(lambda: visitor.is_shown("#login-problem"), "a wrong key is not told")
        visitor.find("#key").clear()
        visitor.log_in(service.key())
        visitor.console()
        yield visitor


def test_a_visitor_generates_watches_cancels_and_plays(studio: Studio) -> None:
    make_watch_cancel_play(studio, num_inference_steps="24")
    assert not problems(studio)


def test_a_prompt_is_text_whatever_it_holds(studio: Studio) -> None:
    prompt = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    made = studio.generate(prompt, num_inference_steps="2")
    assert studio.until_ended(made) == "completed"
    assert prompt in studio.card(made).text
    assert studio.script("return document.title") != "taken"
    assert not studio.card(made).find_elements("css selector", "img[src=x], script")
    assert not problems(studio)


def test_the_keyboard_is_enough(studio: Studio) -> None:
    before = studio.cards
    field = studio.find("#composer [name=prompt]")
    field.clear()
    field.send_keys("a green square moving left")
    field.send_keys(Keys.CONTROL, Keys.ENTER)
    made = studio.newest(before)
    assert studio.until_ended(made) == "completed"
    opener = studio.card(made, "[data-part=open]")
    studio.script("arguments[0].focus()", opener)
    opener.send_keys(Keys.ENTER)
    studio.until(lambda: studio.is_shown("#viewer"), "the viewer does not open")
    studio.escape()
    studio.until(lambda: not studio.is_shown("#viewer"), "Escape does not close it")


def test_a_phone_shows_everything_without_scrolling_sideways(studio: Studio, tmp_path: Path) -> None:
    for dark in (False, True):
        studio.show_as(PHONE, dark=dark)
        width, shown = studio.script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= shown == PHONE[0]
        assert studio.find("#generate").is_displayed()
    studio.show_as()


def test_the_page_brings_its_policy(service: Service) -> None:
    with service.client() as client:
        policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_reload_shows_what_was_made(studio: Studio) -> None:
    before = studio.cards
    assert before
    studio.driver.refresh()
    studio.until(lambda: studio.cards == before, "the gallery is another one")
    assert not problems(studio)
