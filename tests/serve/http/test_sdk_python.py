"""OpenAI's Python SDK works unmodified, sync and async: the release of today, and the last of 2.x."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from skylapse.serve.http.routes import events

from ..sdk import run_program
from ..service import Service

HERE = Path(__file__).parents[1]
PROGRAM = HERE / "python"
SCENARIO = re.compile(r"^async def (\w+)\(side: Side\)", re.MULTILINE)
NAMES = [name for path in sorted(PROGRAM.glob("*.py")) for name in SCENARIO.findall(path.read_text())]
OLD = Path(sys.prefix) / "openai-2"  # `make clients` installs it there
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["3-sync", "3-async", "2-sync", "2-async"])
def results(request: pytest.FixtureRequest, sdk_facts: dict[str, Any]) -> dict[str, str | None]:
    """Run every scenario and return its result: None, or the error."""
    release, kind = request.param.split("-")
    paths = [str(HERE.parent)]
    if release == "2":
        if not (OLD / "openai").exists():
            pytest.skip("openai 2.x is not installed: `make clients`")
        paths.insert(0, str(OLD))
    command = [sys.executable, "-W", "error", str(PROGRAM), kind]
    printed = run_program(command, sdk_facts, {"PYTHONPATH": ":".join(paths)})
    assert printed["version"].startswith(f"{release}.")
    results: dict[str, str | None] = printed["results"]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_sdk(results: dict[str, str | None], name: str) -> None:
    if (problem := results[name]) is not None:
        pytest.fail(problem, pytrace=False)


def test_a_stream_that_is_kept_alive_has_nothing_but_events_for_the_sdk(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the SDK's decoder any blank line ends an event, be there one or not."""
    decoder = pytest.importorskip("openai._streaming").SSEDecoder()
    monkeypatch.setattr(events, "COMMENT_S", 0.01)
    monkeypatch.setattr(events, "POSITION_S", 0.01)
    with service.client() as client, service.paused():
        video = client.post("/v1/videos", json={"prompt": "a"}).json()
        with client.stream("GET", f"/v1/videos/{video['id']}/events") as stream:
            pieces = stream.iter_bytes()
            sent = b""
            while b": still here" not in sent:
                sent += next(pieces)
            client.post(f"/v1/videos/{video['id']}/cancel")
            sent += b"".join(pieces)
    told = [event.json()["type"] for event in decoder.iter_bytes([sent])]
    assert told == ["video.queued", "video.failed"]
