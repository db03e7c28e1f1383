"""One request against a server of the OpenAI Videos API: made, waited for, timed, and how it ended.

Ends: `ok`; `late` (not done in time, though the server answers); `rejected` (429 or 503); `http_STATUS`; `refused`;
`hang` (no answer to one HTTP exchange); `disconnected`; `garbage` (no JSON, or not of the API's types);
`failed:CODE` as the server says; `unfinished` where the run ended first.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from .target import Target
from .traces import Arrival

POLL_TRIES = 5  # in a row that may go wrong: it is the clip that is asked for, not the poll
WAITING = ("queued", "in_progress")


class Bad(Exception):
    """How a request ended, if not well."""

    def __init__(self, end: str, why: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.end, self.retry_after_s = end, retry_after_s


@dataclass(slots=True)
class Outcome:
    """Seconds since the run began. due_s: when it should have been sent, which is what latency counts from."""

    index: int
    kind: str
    due_s: float
    video_s: float
    sent_s: float | None = None
    accepted_s: float | None = None
    first_preview_s: float | None = None
    done_s: float | None = None
    resolution_s: float = 0.0  # so much earlier it may have been done
    polls: int = 0
    end: str = "unfinished"
    why: str = ""
    video_id: str | None = None
    retry_after_s: float = 0.0

    @property
    def latency_s(self) -> float | None:
        """From when it was due to when it was known to be done; None of what was not."""
        return self.done_s - self.due_s if self.end == "ok" and self.done_s is not None else None

    @property
    def lag_s(self) -> float:
        """The generator's own: how much later than due it was sent."""
        return 0.0 if self.sent_s is None else self.sent_s - self.due_s


class Client:
    """Sends and waits. `now`: seconds since the run began."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, now: Callable[[], float]) -> None:
        self.session, self.target, self.now = session, target, now
        self.outstanding = 0
        self.polls = 0
        self._videos = f"{target.url}/v1/videos"

    async def run(self, arrival: Arrival, outcome: Outcome) -> None:
        """Until it has ended; writes into `outcome` and raises nothing but a cancellation."""
        self.outstanding += 1
        outcome.sent_s = self.now()
        left_s = self.target.timeout_s - (outcome.sent_s - outcome.due_s)
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self._whole(arrival, outcome)
            outcome.end = "ok"
        except Bad as bad:
            outcome.end, outcome.why, outcome.retry_after_s = bad.end, str(bad)[:200], bad.retry_after_s
        except TimeoutError:
            outcome.end, outcome.why = "late", f"not done {self.target.timeout_s:g} s after it was due"
        finally:
            self.outstanding -= 1
        if outcome.end == "late":
            await self.forget(outcome)

    async def _whole(self, arrival: Arrival, outcome: Outcome) -> None:
        body = self.target.body(arrival.fields)
        if self.target.endpoint == "generations":
            await self._json("POST", f"{self._videos}/generations", body, timeout_s=self.target.timeout_s)
            outcome.done_s = self.now()
            return
        video = await self._json("POST", self._videos, body)
        outcome.accepted_s = self.now()
        outcome.video_id = video_id = _text(video, "id")
        if _text(video, "status") in WAITING:
            told = self.target.previews and self.target.has_events and await self._follow(video_id, outcome)
            video = told or await self._poll(video_id, outcome)
        outcome.done_s = self.now()
        if video["status"] != "completed":
            error = video.get("error")
            code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
            raise Bad(f"failed:{code or 'unknown'}", str(message))
        if self.target.fetch:
            await self._exchange("GET", f"{self._videos}/{video_id}/content")
            outcome.done_s = self.now()
        outcome.video_s = _seconds(video) or outcome.video_s

    async def _poll(self, video_id: str, outcome: Outcome) -> dict[str, Any]:
        """Asks more rarely the older the request and the more there are: a share of its age is what it costs."""
        url, wrong, asked_s = f"{self._videos}/{video_id}", 0, outcome.accepted_s or self.now()
        target = self.target
        while True:
            age_s = self.now() - outcome.due_s
            pause_s = max(target.poll_least_s, target.poll_share * age_s, self.outstanding / target.poll_rate)
            await asyncio.sleep(min(target.poll_most_s, pause_s))
            before_s, asked_s = asked_s, self.now()
            outcome.polls += 1
            self.polls += 1
            try:
                video = await self._json("GET", url)
                if _text(video, "status") not in WAITING:
                    outcome.resolution_s = self.now() - before_s
                    return video
                wrong = 0
            except Bad as bad:
                wrong += 1
                if wrong == POLL_TRIES or bad.end in ("http_401", "http_403", "http_404"):
                    raise
                await asyncio.sleep(min(1.0, bad.retry_after_s))

    async def _follow(self, video_id: str, outcome: Outcome) -> dict[str, Any] | None:
        """By the server's events, which tell of previews too; None where they break off without an end."""
        last = ""
        while True:
            ended, before = False, last
            async for identity, event in self._events(video_id, last):
                last = identity or last
                if event.get("type") == "video.preview" and outcome.first_preview_s is None:
                    outcome.first_preview_s = self.now()
                ended = event.get("type") in ("video.completed", "video.failed")
                if ended and isinstance(video := event.get("video"), dict):
                    _text(video, "status")
                    return video
            if last == before or ended:
                return None

    async def _events(self, video_id: str, last: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(id, data) of each server-sent event; our service ends a stream after a minute."""
        headers = {"last-event-id": last} if last else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=self.target.http_timeout_s)
        try:
            async with self.session.get(
                f"{self._videos}/{video_id}/events", headers=headers, timeout=timeout
            ) as answer:
                if answer.status != 200:
                    return
                text = b""
                async for piece in answer.content.iter_any():
                    text += piece
                    while b"\n\n" in text:
                        block, _, text = text.partition(b"\n\n")
                        if found := _event(block):
                            yield found
        except (TimeoutError, aiohttp.ClientError):
            return

    async def forget(self, outcome: Outcome) -> None:
        """Ask the server to drop a clip that nobody waits for any more; whatever it says."""
        if outcome.video_id is not None:
            with suppress(Bad):
                await self._exchange("DELETE", f"{self._videos}/{outcome.video_id}")

    # --- one HTTP exchange ------------------------------------------------------------------------------------------

    async def _json(
        self, method: str, url: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        text = await self._exchange(method, url, body, timeout_s)
        try:
            found = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise Bad("garbage", f"no JSON: {text[:60]!r}") from None
        if not isinstance(found, dict):
            raise Bad("garbage", f"no JSON object: {text[:60]!r}")
        return found

    async def _exchange(
        self, method: str, url: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> bytes:
        data: Any = {}
        if body is not None:
            data = {"data": _form(body)} if self.target.form else {"json": body}
        if timeout_s is not None:
            data["timeout"] = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.request(method, url, **data) as answer:
                text = await answer.read()
                if answer.status >= 400:
                    raise _bad(answer.status, answer.headers.get("retry-after"), text)
                return text
        except aiohttp.ServerTimeoutError:
            raise Bad("hang", f"no answer to {method} within {self.target.http_timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise Bad("refused", str(error.strerror or error)) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise Bad("disconnected", str(error)) from None
        except (aiohttp.ClientError, ValueError) as error:  # no HTTP, lines without end, a payload that breaks off
            raise Bad("garbage", f"{type(error).__name__}: {error}") from None
        except TimeoutError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # the request's own time is over
            raise Bad("hang", f"no answer to {method} within {self.target.http_timeout_s:g} s") from None


def _form(body: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in body.items():
        form.add_field(name, str(value))
    return form


def _bad(status: int, retry_after: str | None, text: bytes) -> Bad:
    try:
        error = json.loads(text)["error"]
        why = f"{error.get('code')}: {error.get('message')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        why = text[:120].decode(errors="replace")
    try:
        retry_after_s = min(60.0, max(0.0, float(retry_after or 0)))
    except ValueError:  # a date
        retry_after_s = 1.0
    return Bad("rejected" if status in (429, 503) else f"http_{status}", f"{status}: {why}", retry_after_s)


def _text(video: dict[str, Any], name: str) -> str:
    value = video.get(name)
    if not isinstance(value, str) or not value or (name == "status" and value not in (*WAITING, "completed", "failed")):
        known = f" of {', '.join((*WAITING, 'completed', 'failed'))}" if name == "status" else ""
        raise Bad("garbage", f"a Video object must have text{known} as {name}, got {value!r:.60}")
    return value


def _seconds(video: dict[str, Any]) -> float | None:
    try:
        return float(video["seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def _event(block: bytes) -> tuple[str, dict[str, Any]] | None:
    identity, data = "", ""
    for line in block.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "id":
            identity = value.strip()
        elif name == "data":
            data += value.removeprefix(" ")
    try:
        found = json.loads(data)
    except json.JSONDecodeError:
        return None
    return (identity, found) if isinstance(found, dict) else None


def clock() -> Callable[[], float]:
    """Seconds since now."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began
