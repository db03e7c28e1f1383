"""The generator of load against a stub: honest latencies, both loops, and whatever a server may do wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from skylapse.benchmarks.load import play as playing
from skylapse.benchmarks.load.play import Played, play
from skylapse.benchmarks.load.selftest import STOP_S, stopped, stub, target_of
from skylapse.benchmarks.load.stub import Stub, start
from skylapse.benchmarks.load.target import GaveUp, Target, _described, checked_url, detect
from skylapse.benchmarks.load.traces import Arrival, at_once, poisson
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.http.app import create_app
from skylapse.serve.jobs.services import open_context

FIELDS = {"prompt": "a star", "size": "64x64", "seconds": "2", "num_inference_steps": 4}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(number: int) -> tuple[str, dict[str, object], float]:
    return "small", FIELDS, 2.0


def every(gap_s: float, count: int) -> list[Arrival]:
    return [Arrival(gap_s * index, "small", FIELDS, 2.0) for index in range(count)]


def played_by(app: web.Application, trace: list[Arrival], concurrency: int | None = None, **settings: object) -> Played:
    """Against a server in the same loop."""
    played = Played()

    async def run() -> None:
        runner, url = await start(app)
        try:
            target = Target(url, poll_least_s=0.005, poll_rate=1e5, timeout_s=5.0)
            await play(trace, replace(target, **settings), played, concurrency=concurrency)  # type: ignore[arg-type]
        finally:
            await runner.cleanup()

    asyncio.run(run())
    return played


# --- latencies --------------------------------------------------------------------------------------------------------


def test_open_loop_latency_is_that_of_the_queue_that_arrivals_build() -> None:
    """One slot of 0.1 s and an arrival each 0.05 s: the n-th waits 0.05 n longer than the first, and no less."""
    played = played_by(Stub(0.1, slots=1).app(), every(0.05, 8))
    expected = [0.1 + 0.05 * index for index in range(8)]
    for latency_s, least_s in zip(played.latencies_s, expected, strict=True):
        assert least_s - 0.002 <= latency_s < least_s + 0.3
    assert [one.end for one in played.outcomes] == ["ok"] * 8


def test_a_generator_that_stands_still_counts_from_when_requests_were_due_and_distrusts_itself() -> None:
    trace = every(0.01, 30)

    async def hold() -> None:
        await asyncio.sleep(0.05)
        time.sleep(0.4)  # the loop itself: whoever is due meanwhile is sent late

    played = Played()

    async def run() -> None:
        runner, url = await start(Stub(0.0).app())
        await asyncio.gather(play(trace, Target(url), played), hold())
        await runner.cleanup()

    asyncio.run(run())
    held = [one for one in played.outcomes if 0.08 < one.due_s < 0.3]
    assert len(held) > 15
    assert all((one.latency_s or 0.0) >= 0.44 - one.due_s for one in held)
    assert played.distrust is not None


def test_closed_loop_keeps_so_many_and_no_more_in_flight() -> None:
    most = 0

    class Counting(Stub):
        async def create(self, request: web.Request) -> web.Response:
            nonlocal most
            answer = await super().create(request)
            now = time.perf_counter()
            most = max(most, sum(done_at > now for done_at in self._done_at.values()))
            return answer

    played = played_by(Counting(0.03).app(), at_once(ask, 12), concurrency=3)
    assert most == 3
    assert len(played.latencies_s) == 12 and all(one.lag_s < 0.02 for one in played.outcomes)


def test_what_is_not_done_at_the_runs_end_is_late_and_the_server_is_told() -> None:
    server = Stub(0.05, slots=1)
    played = Played()

    async def run() -> None:
        runner, url = await start(server.app())
        await play(every(0.0, 10), Target(url, poll_least_s=0.005), played, end_s=0.25)
        await runner.cleanup()

    asyncio.run(run())
    ends = played.ends()
    assert ends["ok"] + ends["late"] == 10 and ends["late"] >= 5
    assert sorted(server.deleted) == sorted(one.video_id or "" for one in played.outcomes if one.end == "late")


def test_polls_are_a_share_of_a_requests_age_and_their_resolution_is_told() -> None:
    played = played_by(Stub(0.5).app(), every(0.0, 1), poll_share=0.2)
    one = played.outcomes[0]
    assert 3 <= one.polls <= 20  # each 20 ms they would be 25
    assert 0 < one.resolution_s <= 0.25


def test_a_process_of_its_own_is_loaded_at_200_requests_a_second_and_a_stop_is_seen() -> None:
    """The whole claim, 500 on one core, is `python -m skylapse.benchmarks.load.selftest`."""
    with stub(0.05) as (url, pid):
        trace = poisson(200.0, ask, 0, duration_s=1.6)
        played = stopped(trace, target_of(url), pid, 0.5, None)
    assert played.ends() == {"ok": len(trace)}
    assert min(played.latencies_s) >= 0.05
    due = [one for one in played.outcomes if 0.6 < one.due_s < 0.5 + STOP_S]
    assert len(due) > 40
    assert all((one.latency_s or 0.0) >= 0.5 + STOP_S - one.due_s - 0.02 for one in due)


# --- servers that misbehave -------------------------------------------------------------------------------------------

VIDEO = {"id": "video_1", "object": "video", "status": "in_progress"}
DONE = VIDEO | {"status": "completed"}
FAILED = VIDEO | {"status": "failed", "error": {"code": "oom", "message": "no room"}}


async def never(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    raise AssertionError


async def cut(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def says(content: object, status: int = 200, **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        text = content if isinstance(content, str) else json.dumps(content)
        return web.Response(text=text, status=status, headers=headers)

    return answer


def server(create: Handler, get: Handler | None = None) -> web.Application:
    app = web.Application()
    app.router.add_post("/v1/videos", create)
    app.router.add_post("/v1/videos/generations", create)
    if get is not None:
        app.router.add_get("/v1/videos/video_1", get)
    return app


LIMIT = "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("create", "get", "end", "why"),
    [
        (says({"error": {"code": "internal_error", "message": "oh"}}, 500), None, "http_500", "internal_error: oh"),
        (says("<h1>Bad gateway</h1>", 502), None, "http_502", "Bad gateway"),
        (says({"error": {"code": LIMIT, "message": "slow"}}, 429, **{"Retry-After": "7"}), None, "rejected", LIMIT),
        (says({"error": "full"}, 503, **{"Retry-After": "soon"}), None, "rejected", "503"),
        (says("I am no JSON"), None, "garbage", "no JSON"),
        (says([1, 2]), None, "garbage", "no JSON object"),
        (says({"id": 7, "status": "queued"}), None, "garbage", "as id, got 7"),
        (says(VIDEO | {"status": "thinking"}), None, "garbage", "as status, got 'thinking'"),
        (says({"status": "queued"}), None, "garbage", "as id, got None"),
        (never, None, "hang", "no answer to POST within 0.3 s"),
        (cut, None, "disconnected", ""),
        (says(VIDEO), says({"error": {"code": "video_not_found"}}, 404), "http_404", "video_not_found"),
        (says(VIDEO), says("oops", 500), "http_500", "oops"),
        (says(VIDEO), says("null"), "garbage", "no JSON object"),
        (says(VIDEO), says(FAILED), "failed:oom", "no room"),
        (says(VIDEO), says(FAILED | {"error": None}), "failed:unknown", ""),
        (says(VIDEO), says(VIDEO), "late", "not done 1 s after"),
    ],
)  # fmt: skip
def test_each_kind_of_wrong_answer_is_told_from_the_others(
    create: Handler, get: Handler | None, end: str, why: str
) -> None:
    played = played_by(server(create, get), every(0.0, 2), http_timeout_s=0.3, timeout_s=1.0)
    assert played.ends() == {end: 2}
    assert why in played.reasons().get(end, "")
    if end == "rejected":
        assert played.outcomes[0].retry_after_s in (7.0, 1.0)


def test_a_server_that_is_not_there_refuses() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        played = Played()
        asyncio.run(play(every(0.0, 3), Target(url), played))
        assert played.ends() == {"refused": 3}
        with pytest.raises(GaveUp, match="nothing answers at"):
            asyncio.run(detect(Target(url)))


def test_a_poll_that_goes_wrong_now_and_then_is_not_the_requests_end() -> None:
    answers = iter([says("oops", 500), says("?"), says(VIDEO), says("oops", 503), says(DONE)])

    async def get(request: web.Request) -> web.StreamResponse:
        return await next(answers)(request)

    assert played_by(server(says(VIDEO), get), every(0.0, 1)).ends() == {"ok": 1}


def test_a_server_that_has_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "GIVE_UP_S", 0.05)
    played = Played()

    async def run() -> None:
        runner, url = await start(server(says("oops", 500)))
        try:
            await play(every(0.01, 5000), Target(url), played)
        finally:
            await runner.cleanup()

    with pytest.raises(GaveUp, match="requests in a row ended as http_500"):
        asyncio.run(run())
    assert 20 <= len(played.outcomes) < 500


def test_a_server_that_turns_away_is_not_one_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "GIVE_UP_S", 0.0)
    assert played_by(server(says({}, 429)), every(0.001, 60)).ends() == {"rejected": 60}


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_our_own_document_says_what_our_service_takes(tmp_path: Path) -> None:
    app = create_app(open_context(ServeConfig(data=str(tmp_path))))
    target = _described(Target("http://x", previews=1), app.openapi())
    assert target.engine == "skylapse" and target.has_events and not target.form
    asked = {"prompt": "a star", "size": "64x64", "num_frames": 9, "fps": 8, "num_inference_steps": 4, "seed": 1}
    assert target.body(asked) == asked | {"partial_images": 1}
    assert target.dropped(asked | {"guidance_scale_2": 3.0}) == ["guidance_scale_2"]


def test_a_server_that_documents_nothing_gets_openais_fields_alone() -> None:
    target = Target("http://x", model="sora-2")
    asked = {"prompt": "a star", "size": "64x64", "num_frames": 17, "fps": 8, "seed": 1}
    assert target.body(asked) == {"prompt": "a star", "size": "64x64", "seconds": "2.125", "model": "sora-2"}
    assert target.dropped(asked) == ["seed"]


@pytest.mark.parametrize(
    "document", [None, 3, [], {"paths": 3}, {"paths": {"/v1/videos": {"post": {}}}}, {"paths": None}]
)
def test_documents_that_make_no_sense_tell_nothing(document: object) -> None:
    assert _described(Target("http://x"), document) == Target("http://x")


def test_forms_are_sent_where_a_server_takes_nothing_else() -> None:
    got = []

    async def create(request: web.Request) -> web.Response:
        got.append((request.content_type, dict(await request.post())))
        return web.json_response(DONE)

    played_by(server(create), every(0.0, 1), form=True)
    assert got == [("multipart/form-data", {"prompt": "a star", "size": "64x64", "seconds": "2"})]


def test_the_synchronous_endpoint_is_done_when_it_answers() -> None:
    got = []

    async def create(request: web.Request) -> web.Response:
        got.append(await request.json())
        await asyncio.sleep(0.1)
        return web.json_response({"video_id": "v", "video_bytes": ""})

    played = played_by(server(create), every(0.0, 1), endpoint="generations")
    assert played.latencies_s[0] >= 0.1 and got == [FIELDS]


def test_previews_and_the_end_are_heard_from_events() -> None:
    async def events(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        preview: dict[str, object] = {"type": "video.preview", "preview": {"b64_json": "A" * 300_000}}
        for number, event in enumerate(({"type": "video.progress"}, preview), 1):
            await stream.write(f"id: {number}\nevent: any\ndata: {json.dumps(event)}\n\n".encode())
        await asyncio.sleep(0.1)
        done = {"type": "video.completed", "video": VIDEO | {"status": "completed", "seconds": "3"}}
        await stream.write(f"id: 3\ndata: {json.dumps(done)}\n\n".encode())
        return stream

    app = server(says(VIDEO))
    app.router.add_get("/v1/videos/video_1/events", events)
    (one,) = played_by(app, every(0.0, 1), previews=1, has_events=True).outcomes
    assert (one.end, one.polls, one.video_s) == ("ok", 0, 3.0)
    assert one.first_preview_s is not None and one.latency_s is not None
    assert one.latency_s - one.first_preview_s > 0.08


def test_where_events_break_off_polls_go_on() -> None:
    app = server(says(VIDEO), says(DONE))
    app.router.add_get("/v1/videos/video_1/events", says("", 200))
    (one,) = played_by(app, every(0.0, 1), previews=1, has_events=True).outcomes
    assert (one.end, one.polls) == ("ok", 1)


def test_clips_are_downloaded_where_that_is_asked_for() -> None:
    app = server(says(DONE))
    app.router.add_get("/v1/videos/video_1/content", says("no clip", 400))
    assert played_by(app, every(0.0, 1), fetch=True).ends() == {"http_400": 1}
    assert played_by(server(says(DONE)), every(0.0, 1)).ends() == {"ok": 1}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:0x", "http://x:99999"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url must begin with http"):
        checked_url(url)


def test_urls_may_be_those_that_sdks_take() -> None:
    assert checked_url("https://host:8443/v1/") == "https://host:8443"
