"""All bad requests against a whole service: each is refused in OpenAI's envelope, no job and no file comes of any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skylapse.runtime.engine.engine import Engine

from ..bad_requests import CASES, CLASSES
from ..raw_http import Client
from ..service import Service, serving


@pytest.fixture(scope="module")
def strict(demo_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Webhooks to private addresses are refused here."""
    with serving(tmp_path_factory.mktemp("strict"), demo_engine, webhook_private=False) as service:
        yield service


@pytest.fixture(scope="module")
def videos(strict: Service) -> tuple[str, str, str]:
    """(a key, a video of its tenant, another tenant's)."""
    key = strict.key("mine")
    return key, strict.make(key)["id"], strict.make(strict.key("theirs"))["id"]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_bad_request_is_refused_and_a_good_one_after_it_is_not(
    kind: str, strict: Service, videos: tuple[str, str, str]
) -> None:
    key, mine, theirs = videos
    client = Client(strict.url, key)
    cases = [case for case in CASES if case.kind == kind]
    problems = [case.problem(case.send(client, mine=mine, theirs=theirs)) for case in cases]
    assert not [problem for problem in problems if problem is not None]
    strict.make(key)
    with strict.client(key) as again:
        made = again.get("/v1/videos", params={"limit": 100}).json()["data"]
    assert all(video["status"] == "completed" for video in made), "a bad request became a job"
    left: list[Path] = [*strict.context.config.scratch.iterdir()]
    assert not left
