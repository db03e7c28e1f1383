"""The page's handling of jobs: first images, sequels, settings used again, code, older pages, problems, deletion."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from skylapse.runtime.media.clips import read_video

from ..browser import MISSING, Studio, chromium, problems
from ..service import SMALL, Service

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# A file that is dropped onto the page, as a script can play it.
DROP = """
const [text, type] = arguments;
const files = new DataTransfer();
files.items.add(new File([text], 'dropped', {type}));
for (const name of ['dragover', 'drop'])
  document.getElementById('composer').dispatchEvent(
    new DragEvent(name, {dataTransfer: files, bubbles: true, cancelable: true}));
"""

# Whoever comes back to the page is shown what other clients made meanwhile.
COME_BACK = "document.dispatchEvent(new Event('visibilitychange'))"


@pytest.fixture(scope="module")
def key(service: Service) -> str:
    return service.key()


@pytest.fixture(scope="module")
def studio(service: Service, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        visitor = Studio(driver, service.url)
        visitor.show_as()
        visitor.open()
        visitor.log_in(key)
        yield visitor


def shown_again(studio: Studio, video_id: str) -> None:
    studio.script(COME_BACK)
    studio.until(lambda: video_id in studio.cards, "the job does not appear")


def viewer_text(studio: Studio, part: str) -> str:
    return str(studio.find(f"#viewer [data-part={part}]").get_property("textContent"))


def get(service: Service, key: str, path: str) -> Any:
    with service.client(key) as client:
        return client.get(path)


def test_a_clip_begins_with_the_image_that_was_chosen(
    studio: Studio, service: Service, key: str, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), (200, 30, 120)).save(tmp_path / "first.png")
    studio.find("#image").send_keys(str(tmp_path / "first.png"))
    studio.until(lambda: studio.is_shown("#image-shown"), "the image is not shown")
    made = studio.generate("a red circle", size="64x64", seconds="0.5", num_inference_steps="2")
    assert studio.until_ended(made) == "completed"
    (tmp_path / "clip.mp4").write_bytes(get(service, key, f"/v1/videos/{made}/content").content)
    frames, _ = read_video(tmp_path / "clip.mp4", max_frames=9, max_pixels=64 * 64)
    assert np.abs(frames[0].mean((0, 1)) - (200, 30, 120)).max() < 12
    studio.find("#image-remove").click()
    assert not studio.is_shown("#image-shown, #image-remove")


def test_what_is_dropped_must_be_a_picture(studio: Studio) -> None:
    studio.script(DROP, "no picture", "text/plain")
    assert "PNG, JPEG or WebP" in studio.find("#problem").text and not studio.is_shown("#image-shown")
    studio.script(DROP, "it calls itself one", "image/png")
    assert studio.is_shown("#image-remove") and not studio.is_shown("#problem")
    studio.find("#image-remove").click()


def test_a_problem_is_told_where_it_is(studio: Studio) -> None:
    studio.choose(prompt="a red circle", guidance_scale="1000")
    studio.find("#generate").click()
    studio.until(lambda: studio.is_shown("#problem"), "no problem is told")
    field = studio.driver.switch_to.active_element
    assert "guidance_scale" in studio.find("#problem").text
    assert (field.get_attribute("name"), field.get_attribute("aria-invalid")) == ("guidance_scale", "true")
    studio.choose(prompt="", guidance_scale="")
    studio.find("#composer [name=prompt]").send_keys(Keys.ENTER)
    assert studio.find("#problem").text == "Say what the video should show."


def test_the_code_of_a_job_quotes_whatever_its_prompt_holds(studio: Studio, service: Service, key: str) -> None:
    prompt = "@it's \"$HOME\" `id` \\ $(id)\n'''é\u2028</script>"
    made = service.make(key, prompt=prompt, seed=7)["id"]
    shown_again(studio, made)
    studio.open_viewer(made)
    words = shlex.split(viewer_text(studio, "snippet"), comments=True)
    assert {f"prompt={prompt}", "seed=7", "size=64x64"} <= set(words) and f"{studio.url}/v1/videos" in words
    assert words[words.index(f"prompt={prompt}") - 1] == "--form-string"  # with -F, curl would read a file
    studio.find("#tab-python").click()
    code = ast.parse(viewer_text(studio, "snippet"))
    given = {node.arg: node.value for node in ast.walk(code) if isinstance(node, ast.keyword)}
    assert ast.literal_eval(given["prompt"]) == prompt
    assert ast.literal_eval(given["extra_body"])["seed"] == 7
    assert ast.literal_eval(given["base_url"]) == f"{studio.url}/v1"
    studio.escape()


def test_a_clip_is_remixed_and_extended(studio: Studio, service: Service, key: str) -> None:
    source = service.make(key, prompt="a blue circle")["id"]
    shown_again(studio, source)
    for kind, seconds in (("remix", 0.625), ("extend", 1.125)):
        before = studio.cards
        studio.open_viewer(source)
        field = studio.find("#viewer [name=prompt]")
        field.clear()
        field.send_keys(f"a {kind} of it")
        studio.find('#viewer [name=seconds] option[value="0.5"]').click()
        studio.find(f"#viewer [value={kind}]").click()
        made = studio.newest(before)
        studio.until(lambda: not studio.is_shown("#viewer"), "the viewer stays")
        assert studio.until_ended(made) == "completed"
        video = get(service, key, f"/v1/videos/{made}").json()
        assert (video["prompt"], float(video["seconds"])) == (f"a {kind} of it", seconds)


def test_settings_are_used_again(studio: Studio, service: Service, key: str) -> None:
    made = service.make(key, prompt="a white star", size="80x50", seed=11)["id"]  # no size of the model's own
    shown_again(studio, made)
    studio.card(made, "[data-part=reuse]").click()
    values = {
        name: studio.find(f"#composer [name={name}]").get_property("value") for name in ("prompt", "size", "seed")
    }
    assert values == {"prompt": "a white star", "size": "80x50", "seed": "11"}
    assert studio.driver.switch_to.active_element.get_attribute("id") == "prompt"


def test_deleting_is_asked_for_twice(studio: Studio, service: Service, key: str) -> None:
    made = service.make(key)["id"]
    shown_again(studio, made)
    button = studio.card(made, "[data-part=remove]")
    button.click()
    assert button.text == "Delete?" and made in studio.cards
    assert get(service, key, f"/v1/videos/{made}").status_code == 200
    button.click()
    studio.until(lambda: made not in studio.cards, "it is still there")
    assert get(service, key, f"/v1/videos/{made}").status_code == 404
    assert studio.driver.switch_to.active_element.get_attribute("data-part") == "open"  # its neighbour's


def test_a_download_has_the_name_of_its_video(studio: Studio, service: Service, key: str) -> None:
    made = service.make(key)["id"]
    shown_again(studio, made)
    link = studio.card(made, "[data-part=download]")
    studio.until(link.is_displayed, "there is no link")  # once the card has faded in
    assert link.get_attribute("download") == f"{made}.mp4"
    assert str(link.get_attribute("href")) == f"{studio.url}/v1/videos/{made}/content"


def test_whoever_wants_no_motion_sees_pictures(studio: Studio) -> None:
    studio.show_as(still=True)
    studio.driver.refresh()
    studio.until(lambda: studio.is_shown(".card video"), "no clip is shown")
    studio.until(lambda: studio.script("return document.querySelector('.card .glow[src]').complete"))
    assert studio.script("return [...document.querySelectorAll('.card video')].every(clip => clip.paused)")
    studio.show_as()


def test_older_videos_are_a_press_away_and_many_jobs_leave_the_page_usable(studio: Studio, service: Service) -> None:
    key = service.key()
    studio.find("#log-out").click()
    with service.paused(), service.client(key) as client:
        made = [client.post("/v1/videos", json=SMALL).json()["id"] for _ in range(14)]
        studio.log_in(key)
        studio.until(lambda: len(studio.cards) == 12, "a page is twelve")
        assert studio.cards == made[:1:-1]
        studio.find("#older").click()
        studio.until(lambda: len(studio.cards) == 14, "the older ones do not come")
        assert studio.cards == made[::-1] and not studio.is_shown("#older")
        for video_id in (made[0], made[13]):  # more streams than the browser has connections would block this
            studio.card(video_id, "[data-part=cancel]").click()
            assert studio.until_ended(video_id) == "cancelled"
        for video_id in made:
            client.delete(f"/v1/videos/{video_id}")


def test_a_session_that_ended_asks_for_the_key_again(studio: Studio, key: str) -> None:
    assert not problems(studio, "status of 400", "status of 404", "ERR_FILE_NOT_FOUND")  # those that were provoked
    studio.driver.delete_all_cookies()
    studio.script(COME_BACK)
    studio.until(lambda: studio.is_shown("#login-problem"), "it is not told")
    assert not studio.is_shown("#studio") and studio.cards == []
    studio.log_in(key)
    studio.until(lambda: studio.cards, "nothing is shown again")
