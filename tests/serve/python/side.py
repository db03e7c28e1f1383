"""A client of either kind, sync or async, with its answers; and one way of using both."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai

httpx: Any = sys.modules.get("httpx2") or sys.modules["httpx"]  # what 3.x and 2.x stand on
FAST = {"num_inference_steps": 2, "num_frames": 5}  # a quarter of a second
KEYS = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at"),
    *("prompt", "size", "seconds", "remixed_from_video_id", "error"),
}


async def done(result: Any) -> Any:
    """Return a sync client's result as it is, an async one's awaited: so one text serves both."""
    return await result if inspect.isawaitable(result) else result


async def each(found: Any) -> list[Any]:
    """Yield all items of an iterator of either kind; of a page, also those of the pages behind it."""
    return [item async for item in found] if hasattr(found, "__aiter__") else list(found)


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


class Side:
    """Clients of one kind, the facts they work with, and the HTTP answers that they have had."""

    def __init__(self, is_async: bool, facts: dict[str, Any]) -> None:
        self.is_async, self.facts = is_async, facts
        self.answers: list[Any] = []
        self.heard_at_s: list[float] = []
        self.mishaps: list[Exception] = []  # raised instead of handing on the next answers

    def client(self, url: str = "url", key: str = "key", **options: Any) -> Any:
        def heard(answer: Any) -> None:
            self.answers.append(answer)
            self.heard_at_s.append(time.monotonic())
            if self.mishaps:
                raise self.mishaps.pop()

        async def heard_async(answer: Any) -> None:
            heard(answer)

        hooks = {"response": [heard_async if self.is_async else heard]}
        kind = openai.AsyncOpenAI if self.is_async else openai.OpenAI
        transport = openai.DefaultAsyncHttpxClient if self.is_async else openai.DefaultHttpxClient
        given = {"base_url": self.facts[url], "api_key": self.facts.get(key, key)}
        return kind(http_client=transport(event_hooks=hooks, trust_env=False), **given, **options)

    def held(self, key: str = "held_key", **options: Any) -> Any:
        """A client of the service that begins no job."""
        return self.client("held_url", key, **options)

    async def refused(self, error: type[openai.APIStatusError], call: Callable[[], Any], **expected: Any) -> Any:
        """Return the error that `call` raises, with the expected fields; `attempts`: the requests that it takes."""
        before = len(self.answers)
        attempts = expected.pop("attempts", 1)
        try:
            await done(call())
        except openai.APIStatusError as raised:
            assert type(raised) is error, repr(raised)
            told = {name: getattr(raised, name) for name in expected}
            assert told == expected, f"{told} is not {expected}"
            assert raised.request_id and raised.request_id == raised.response.headers["x-request-id"]
            assert isinstance(raised.body, dict) and set(raised.body) == {"message", "type", "param", "code"}
            assert len(self.answers) - before == attempts, f"{len(self.answers) - before} requests"
            return raised
        raise AssertionError("it was not refused")


async def finish(client: Any, video: Any) -> Any:
    video = await done(client.videos.poll(video.id, poll_interval_ms=30))
    assert (video.status, video.progress, video.error) == ("completed", 100, None), video
    return video
