"""kill -9 of any part of a running service: accepted jobs are completed, once, and go on where they were."""

from __future__ import annotations

import io
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import httpx2 as httpx
import pytest
from running import KEY, Running, wait_for

STEPS = 120  # long enough for a kill in the middle, at 20 to 60 ms a step


def start_jobs(service: Running, count: int = 3, steps: int = STEPS, **fields: Any) -> list[str]:
    return [service.create(num_inference_steps=steps, seed=seed, **fields)["id"] for seed in range(count)]


def wait_until_stepping(service: Running, video_ids: list[str], percent: int = 20) -> None:
    wait_for(
        lambda: any(service.get(video_id)["progress"] >= percent for video_id in video_ids), 90.0, "jobs to be stepping"
    )


def check_completed(service: Running, videos: list[dict[str, Any]], num_frames: int = 17) -> None:
    """Playable files of the right length, the same at every download."""
    for video in videos:
        assert video["status"] == "completed", video
        data = service.content(video["id"])
        with av.open(io.BytesIO(data)) as container:
            assert len([*container.decode(video=0)]) == num_frames
        assert service.content(video["id"]) == data


def test_the_service_is_ready_within_a_minute(service: Running) -> None:
    print(json.dumps({"ready_s": round(service.ready_s, 1)}))  # type: ignore[attr-defined]
    assert service.ready_s < 60  # type: ignore[attr-defined]


def test_a_killed_engines_jobs_go_on_from_their_checkpoints(service: Running) -> None:
    jobs = start_jobs(service)
    wait_until_stepping(service, jobs, 30)
    service.kill("engine")
    videos = service.ended(jobs)
    check_completed(service, videos)
    assert any(video["resumed_from_step"] for video in videos)
    assert all(video["attempts"] == 0 for video in videos)


@pytest.mark.parametrize("part", ["dispatcher", "controller", "ingress"])
def test_a_killed_part_costs_no_job_anything(part: str, service: Running) -> None:
    jobs = start_jobs(service)
    wait_until_stepping(service, jobs)
    service.kill(part)
    videos = service.ended(jobs)
    check_completed(service, videos)
    assert all(video["resumed_from_step"] is None for video in videos), "their engine was not touched"
    later = service.ended(start_jobs(service, 1))  # and whatever was killed is back
    check_completed(service, later)


def test_a_killed_proxy_is_back_within_eight_seconds(service: Running) -> None:
    jobs = start_jobs(service)
    wait_until_stepping(service, jobs)

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return service.client.get("/healthz", timeout=1.0).status_code == 200
        return False

    def dead_s() -> float:
        service.kill("proxy")
        killed_s = time.monotonic()
        wait_for(lambda: not answers(), 5.0, "the port to be dead", 0.02)
        wait_for(answers, 60.0, "the port to be back", 0.05)
        return time.monotonic() - killed_s

    times_s = [dead_s()]
    if times_s[0] >= 8:  # the machine is busy with something else
        times_s.append(dead_s())
    print(json.dumps({"proxy_dead_s": [round(seconds, 1) for seconds in times_s]}))
    assert min(times_s) < 8
    check_completed(service, service.ended(jobs))


def test_cancel_takes_effect_within_a_step_and_frees_the_slot(service: Running) -> None:
    (job,) = start_jobs(service, 1, seconds="4")
    wait_until_stepping(service, [job], 5)
    cancelled = service.client.post(f"/v1/videos/{job}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert service.get(job)["progress"] == cancelled["progress"]
    engine = wait_for(lambda: [e for e in service.engines() if e["running"] == 0], 5.0, "a free slot")
    assert engine and service.get(job)["progress"] == cancelled["progress"]


def test_no_log_holds_a_key_or_a_prompt(service: Running) -> None:
    """All that Ray and our own processes wrote; the driver prints the key on stderr, for whoever has started it."""
    prompt = "an unmistakable zeppelin"
    service.ended([service.create(prompt=prompt, num_inference_steps=2)["id"]])
    service.client.get("/v1/videos/video_nonsense")
    service.client.post("/v1/videos", json={"prompt": prompt, "size": "nonsense"})
    folder = Path(service.ray_variables["RAY_AUTH_TOKEN_PATH"]).parent
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    texts.append(json.dumps(service.log()).encode())
    assert sum(b"skylapse" in text for text in texts) > 3, "the logs are elsewhere"
    for secret in (KEY, prompt):
        assert not any(secret.encode() in text for text in texts)


def test_the_log_tells_each_job_from_its_request_to_its_end(service: Running) -> None:
    """On stdout, a line of JSON an event, whichever process it happened in."""
    made = service.client.post("/v1/videos", json={"prompt": "a star", "num_inference_steps": 2})
    job = made.json()["id"]
    service.ended([job])

    def found() -> list[dict[str, Any]] | None:
        lines = [line for line in service.log() if line.get("job") == job]
        return lines if any(line["message"].endswith("is completed") for line in lines) else None

    lines = wait_for(found, 10.0, "the end of the job in the log")
    asked = next(line for line in lines if line.get("route") == "/v1/videos")
    assert (asked["process"], asked["status"], asked["request"]) == ("ingress", 200, made.headers["x-request-id"])
    assert any(line["process"] == "engine" and "begins at step 0" in line["message"] for line in lines)
