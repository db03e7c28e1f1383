"""Refusals: the SDK's own exceptions, with codes and parameters, after as many requests as make sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import openai
from side import FAST, Side, done, each, entered, finish, httpx


async def keys_and_scopes_raise_the_sdks_own_classes(side: Side) -> None:
    async with entered(side.client(key="sk-nobody")) as client:
        unknown = dict(status_code=401, code="invalid_api_key", type="authentication_error", param=None)
        await side.refused(openai.AuthenticationError, lambda: client.models.list(), **unknown)
    async with entered(side.client(key="reader_key")) as client:
        assert isinstance((await done(client.videos.list())).data, list)
        denied = dict(status_code=403, code="insufficient_permissions", type="permission_error")
        await side.refused(openai.PermissionDeniedError, lambda: client.videos.create(prompt="a"), **denied)
    async with entered(side.client(key="other_key")) as client:
        missing = dict(status_code=404, code="video_not_found", param="video_id")
        await side.refused(openai.NotFoundError, lambda: client.videos.retrieve(side.facts["finished"]), **missing)


async def wrong_requests_name_what_is_wrong(side: Side) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        (dict(prompt=" "), "invalid_value", "prompt"),
        (dict(prompt="a", size="1280x721"), "invalid_value", "size"),
        (dict(prompt="a", seconds="121"), "invalid_value", "seconds"),
        (dict(prompt="a", seconds="60"), "invalid_value", "seconds"),
        (dict(prompt="a", extra_body={"sead": 1}), "unknown_parameter", "sead"),
        (dict(prompt="a", extra_body={"priority": 5}), "invalid_value", "priority"),
        (dict(prompt="a", extra_body={"webhook_url": "ftp://x"}), "invalid_webhook_url", "webhook_url"),
        (dict(prompt="a", input_reference=b"no picture"), "invalid_image", "input_reference"),
        (dict(prompt="a", extra_headers={"Idempotency-Key": "k" * 256}), "invalid_idempotency_key", "Idempotency-Key"),
    ]
    async with entered(side.held()) as client:
        for fields, code, param in wrong:
            expected = dict(status_code=400, code=code, param=param, type="invalid_request_error")
            await side.refused(openai.BadRequestError, lambda f=fields: client.videos.create(**f), **expected)
        body: dict[str, Any] = {}
        missing = dict(code="missing_required_parameter", param="prompt")
        post = client.post
        video = openai.types.Video
        await side.refused(openai.BadRequestError, lambda: post("/videos", cast_to=video, body=body), **missing)
        await side.refused(
            openai.NotFoundError, lambda: post("/voices", cast_to=video, body=body), code="unknown_url", param=None
        )
        await side.refused(
            openai.APIStatusError, lambda: client.put("/videos", cast_to=video, body=body), code="method_not_allowed"
        )


async def characters_are_refused_as_unsupported(side: Side) -> None:
    clip, wrong = Path(side.facts["clip"]), dict(status_code=400, code="unsupported")
    async with entered(side.held()) as client:
        await side.refused(
            openai.BadRequestError, lambda: client.videos.create_character(name="mia", video=clip), **wrong
        )
        await side.refused(openai.BadRequestError, lambda: client.videos.get_character("char_1"), **wrong)


async def a_used_up_quota_is_retried_when_the_header_says(side: Side) -> None:
    """Three attempts, each after the seconds that Retry-After named."""
    waits: list[float] = []

    async def nap(seconds: float) -> None:
        waits.append(seconds)

    sleep = mock.patch("anyio.sleep", nap) if side.is_async else mock.patch("time.sleep", waits.append)
    full = dict(status_code=429, code="quota_exceeded", type="rate_limit_error", attempts=3)
    async with entered(side.held("full_key")) as client:
        with sleep:
            raised = await side.refused(openai.RateLimitError, lambda: client.videos.create(prompt="a"), **full)
    assert raised.response.headers["retry-after"] == "10" and waits == [10, 10], waits


async def a_used_idempotency_key_is_one_job_and_a_conflict_is_not_retried(side: Side) -> None:
    key = {"Idempotency-Key": f"key-{side.is_async}-{openai.__version__}"}
    async with entered(side.held()) as client:
        made = [await done(client.videos.create(prompt="a", extra_headers=key)) for _ in range(2)]
        assert made[0].to_dict() == made[1].to_dict()
        conflict = dict(status_code=409, code="idempotency_conflict")
        await side.refused(
            openai.ConflictError, lambda: client.videos.create(prompt="b", extra_headers=key), **conflict
        )
        assert side.answers[-1].headers["x-should-retry"] == "false"
        await done(client.videos.delete(made[0].id))


async def a_lost_answer_is_retried_into_the_same_job(side: Side) -> None:
    key = {"Idempotency-Key": f"lost-{side.is_async}-{openai.__version__}"}
    async with entered(side.held("lost_key")) as client:
        before = len(await each(client.videos.list()))
        side.answers.clear()
        side.mishaps.append(httpx.ReadError("the answer is lost on its way"))
        video = await done(client.videos.create(prompt="a", extra_headers=key))
        assert [answer.request.method for answer in side.answers] == ["POST", "POST"]
        assert side.answers[1].request.headers["x-stainless-retry-count"] == "1"
        videos = await each(client.videos.list())
        assert videos[0].id == video.id and len(videos) == before + 1


async def raw_posts_and_raw_answers_work(side: Side) -> None:
    async with entered(side.client()) as client:
        body = {"prompt": "a", "seconds": 1, "size": "64x64", "num_inference_steps": 2, "model": "sora-2"}
        video = await done(client.post("/videos", cast_to=openai.types.Video, body=body))
        assert (video.seconds, video.size) == ("1", "64x64")
        await finish(client, video)
        raw = await done(client.videos.with_raw_response.create(prompt="a", extra_body=FAST))
        assert raw.headers["x-request-id"].startswith("req_") and int(raw.headers["openai-processing-ms"]) >= 0
        assert int(raw.headers["openai-poll-after-ms"]) > 0
        await finish(client, raw.parse())
