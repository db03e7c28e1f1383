"""Ways of learning that a video is finished: polls, event streams, webhooks."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from receiver import receiver
from side import FAST, KEYS, Side, done, each, entered


async def create_and_poll_comes_back_with_a_finished_video(side: Side) -> None:
    async with entered(side.client()) as client:
        video = await done(client.videos.create_and_poll(prompt="a star", extra_body=FAST, poll_interval_ms=50))
        assert (video.status, video.progress) == ("completed", 100)
        assert video.completed_at >= video.created_at and video.expires_at > video.completed_at
        polls = [answer for answer in side.answers if answer.request.method == "GET"]
        assert all(poll.request.headers["x-stainless-poll-helper"] == "true" for poll in polls)


async def poll_waits_as_long_as_the_header_says_and_sees_a_cancelled_video_end(side: Side) -> None:
    async with entered(side.held()) as client, entered(side.held(timeout=5.0)) as other:
        video = await done(client.videos.create(prompt="a"))
        side.heard_at_s.clear()
        polling = asyncio.ensure_future(
            client.videos.poll(video.id) if side.is_async else asyncio.to_thread(client.videos.poll, video.id)
        )
        while not side.heard_at_s:
            await asyncio.sleep(0.01)
        cancelled = await done(other.post(f"/videos/{video.id}/cancel", cast_to=openai.types.Video, body={}))
        video = await polling
        assert video.status == cancelled.status == "failed" and video.error.code == "cancelled"
        first, _, last = side.heard_at_s
        assert side.answers[-3].headers["openai-poll-after-ms"] == "1000"
        assert "openai-poll-after-ms" not in side.answers[-1].headers
        assert 0.9 < last - first < 5, last - first


async def events_are_streamed_up_to_the_end(side: Side) -> None:
    stream_of = (openai.AsyncStream if side.is_async else openai.Stream)[dict[str, Any]]
    async with entered(side.client()) as client:
        video = await done(client.videos.create(prompt="a", extra_body=FAST | dict(partial_images=1)))
        events = client.get(f"/videos/{video.id}/events", cast_to=object, stream=True, stream_cls=stream_of)
        seen = await each(await done(events))
        kinds = [event["type"] for event in seen]
        assert kinds[-1] == "video.completed" and set(kinds) <= {
            *("video.queued", "video.in_progress", "video.progress", "video.preview", "video.completed")
        }
        assert all(set(event["video"]) >= KEYS for event in seen)
        progress = [event["video"]["progress"] for event in seen]
        assert progress == sorted(progress) and progress[-1] == 100
        events = client.get(f"/videos/{side.facts['failed']}/events", cast_to=object, stream=True, stream_cls=stream_of)
        (event,) = await each(await done(events))
        assert event["type"] == "video.failed" and event["video"]["error"]["code"] == "cancelled"


async def a_webhook_is_delivered_and_unwrapped(side: Side) -> None:
    async with receiver() as heard, entered(side.client(webhook_secret=side.facts["webhook_secret"])) as client:
        url = f"http://127.0.0.1:{heard.port}/hook"
        video = await done(client.videos.create(prompt="a", extra_body=FAST | dict(webhook_url=url)))
        async with asyncio.timeout(60):
            while not heard.requests:
                await asyncio.sleep(0.02)
        _, headers, body = heard.requests[0]
        event = client.webhooks.unwrap(body, headers)
        assert (event.type, event.object, event.data.id) == ("video.completed", "event", video.id)
        assert event.id == headers["webhook-id"] and (await done(client.videos.retrieve(video.id))).progress == 100
        try:
            client.webhooks.unwrap(body + b" ", headers)
        except openai.InvalidWebhookSignatureError:
            return
        raise AssertionError("a changed body was accepted")
