"""Many clients at once: nothing is lost, polls stay quick while the engine works, quotas hold across ingresses."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from running import KEY, Running

JOBS, CLIENTS, POLL_S = 200, 20, 1.0
SHAPES = (
    dict(size="64x64", seconds="1", num_inference_steps=4),
    dict(size="96x64", num_frames=9, num_inference_steps=5),
    dict(size="64x96", num_frames=5, num_inference_steps=3, cache="high"),
    dict(size="64x64", num_frames=1, num_inference_steps=6),
)
TENANT = "small"
KEYS = (sys.executable, "-m", "skylapse", "keys")
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("load"), {"ingresses": 2, "quotas": {TENANT: 10}})
    try:
        running.start()
        yield running
    finally:
        running.stop()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def client_of(service: Running, number: int, polls_s: list[float]) -> list[dict[str, Any]]:
    """Make a share of the jobs, then ask for each once a second, until all have ended."""
    async with httpx.AsyncClient(base_url=service.url, headers=HEADERS, timeout=30.0, trust_env=False) as client:
        made = []
        for index in range(number, JOBS, CLIENTS):
            body = {"prompt": "a red circle", "seed": index, "partial_images": 1, **SHAPES[index % len(SHAPES)]}
            response = await client.post("/v1/videos", json=body)
            assert response.status_code == 200, response.text
            made.append(response.json()["id"])
        ended: dict[str, dict[str, Any]] = {}
        turn = 0
        while len(ended) < len(made):
            video_id = [video_id for video_id in made if video_id not in ended][turn % (len(made) - len(ended))]
            turn += 1
            began_s = time.perf_counter()
            response = await client.get(f"/v1/videos/{video_id}")
            polls_s.append(time.perf_counter() - began_s)
            assert response.status_code == 200
            if response.json()["status"] in ("completed", "failed"):
                ended[video_id] = response.json()
                continue  # the next one at once: it is the poll that is paced, not the news
            await asyncio.sleep(max(0.0, POLL_S - (time.perf_counter() - began_s)))
        return list(ended.values())


def test_two_hundred_jobs_of_twenty_clients_are_all_completed_while_polls_stay_quick(busy: Running) -> None:
    polls_s: list[float] = []

    async def run() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(client_of(busy, number, polls_s) for number in range(CLIENTS)))

    began_s = time.monotonic()
    videos = [video for found in asyncio.run(run()) for video in found]
    took_s = time.monotonic() - began_s
    assert len({video["id"] for video in videos}) == JOBS
    assert {video["status"] for video in videos} == {"completed"}
    first_s = [engine.get("first_preview_s") for engine in busy.engines()]
    print(
        json.dumps(
            {
                "jobs": JOBS,
                "seconds": round(took_s, 1),
                "polls": len(polls_s),
                "poll_p50_ms": round(1000 * statistics.median(polls_s), 1),
                "poll_p99_ms": round(1000 * percentile(polls_s, 0.99), 1),
                "first_preview_s": first_s,
            }
        )
    )
    assert percentile(polls_s, 0.99) < 1.0  # 0.07 s on two cores of its own, 0.4 s beside four other test runs


def test_polls_at_a_hundred_a_second_are_answered(busy: Running) -> None:
    """Open loop: each is sent when it is due, and timed from then on."""
    job = busy.create(num_inference_steps=60, seconds="4")["id"]

    async def run() -> list[float]:
        async with httpx.AsyncClient(base_url=busy.url, headers=HEADERS, timeout=30.0, trust_env=False) as client:
            start_s = time.perf_counter() + 0.1

            async def poll(number: int) -> float:
                due_s = start_s + number / 100
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                assert (await client.get(f"/v1/videos/{job}")).status_code == 200
                return time.perf_counter() - due_s

            return await asyncio.gather(*(poll(number) for number in range(500)))

    times_s = asyncio.run(run())
    report = {"p50_ms": 1000 * statistics.median(times_s), "p99_ms": 1000 * percentile(times_s, 0.99)}
    print(json.dumps({name: round(value, 1) for name, value in report.items()}))
    busy.ended([job])


def test_a_quota_holds_across_ingresses(busy: Running) -> None:
    """50 creates at once at two ingresses, of a tenant that may have 10 unfinished jobs."""
    options = ("--tenant", TENANT, "--data", str(busy.data))
    made = subprocess.run((*KEYS, "create", "--json", *options), check=True, capture_output=True, text=True)
    headers = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    body = {"prompt": "a star", "num_inference_steps": 200, "seconds": "4"}  # none of them ends meanwhile

    async def run() -> list[httpx.Response]:
        async def create() -> httpx.Response:
            async with httpx.AsyncClient(base_url=busy.url, headers=headers, timeout=60.0, trust_env=False) as client:
                return await client.post("/v1/videos", json=body)

        return await asyncio.gather(*(create() for _ in range(50)))

    answers = asyncio.run(run())
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (10, 40)
    for answer in answers:
        if answer.status_code == 200:
            video_id = answer.json()["id"]
            busy.client.post(f"/v1/videos/{video_id}/cancel", headers=headers).raise_for_status()
