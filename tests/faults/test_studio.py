"""The page against a real `skylapse serve`, through Ray's proxy."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import KEY, Running

from skylapse.tests.serve.browser import MISSING, Studio, chromium, make_watch_cancel_play, problems


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_visitor_generates_watches_cancels_and_plays(service: Running, tmp_path: Path) -> None:
    with chromium(tmp_path) as driver:
        studio = Studio(driver, service.url, wait_s=60)
        studio.show_as()
        studio.open()
        studio.log_in(KEY)
        make_watch_cancel_play(studio, num_inference_steps="40")
        assert not problems(studio)
