"""Two models of one service in Ray: under load, with one's engine killed, from no engine at all; never mixed up."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hub import Hub, standing_in
from running import Running, wait_for
from tiny import save_small_model

STEPS = 60  # long enough for a kill in the middle
FRAMES = 9


def engine_pid(service: Running, model: str) -> int:
    title = re.compile(rf"ray::ServeReplica:skylapse:Engine-{model}\b")
    return wait_for(
        lambda: next((pid for pid, found in service.processes() if title.match(found)), None), 60.0, f"{model}'s engine"
    )


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def distance(some: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(some.astype(int) - others.astype(int)).mean())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_small_model(folder / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def service(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    models = [{"name": name, "model": str(folder), "threads": 1} for name, folder in folders.items()]
    models[1]["autoscaling"] = {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 4}
    config: dict[str, Any] = {
        "models": models,
        "aliases": {"sora-2": "second"},
        "checkpoint_every": 5,
        "engine_slots": 4,
    }
    running = Running(tmp_path_factory.mktemp("data"), config)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def solo(service: Running, model: str, seed: int) -> np.ndarray:
    """Return the frames that the model makes of a seed while nobody else asks."""
    made = service.create(model=model, seed=seed, num_inference_steps=STEPS, num_frames=FRAMES)
    (video,) = service.ended([made["id"]])
    assert video["status"] == "completed", video
    return frames_of(service.content(video["id"]))


def engines_of(service: Running, model: str) -> list[dict[str, Any]]:
    return [engine for engine in service.engines() if engine["model"] == model and engine["state"] == "ready"]


def test_each_jobs_frames_are_its_own_models_under_load_and_after_a_kill(service: Running) -> None:
    """The second model has no engine before the first job for it."""
    assert engines_of(service, "second") == [] and len(engines_of(service, "first")) == 1
    began_s = time.monotonic()
    wanted = {(model, seed): solo(service, model, seed) for model in ("first", "second") for seed in range(2)}
    print(json.dumps({"solo_s": round(time.monotonic() - began_s, 1)}))
    assert min(distance(wanted["first", seed], wanted["second", seed]) for seed in range(2)) > 5

    def create(job: tuple[str, int]) -> str:
        return service.create(model=job[0], seed=job[1], num_inference_steps=STEPS, num_frames=FRAMES)["id"]

    jobs = [(model, seed) for _ in range(3) for seed in range(2) for model in ("first", "second")]
    with ThreadPoolExecutor(6) as clients:
        ids = list(clients.map(create, jobs))
    wait_for(
        lambda: any(
            service.get(one)["progress"] >= 20 and service.get(one)["status"] == "in_progress"
            for one, (model, _) in zip(ids, jobs, strict=True)
            if model == "second"
        ),
        120.0,
        "jobs of the second model to be stepping",
    )
    others = engine_pid(service, "first")
    os.kill(engine_pid(service, "second"), signal.SIGKILL)
    videos = {video["id"]: video for video in service.ended(ids, within_s=300.0)}
    for one, (model, seed) in zip(ids, jobs, strict=True):
        assert videos[one]["status"] == "completed", videos[one]
        frames = frames_of(service.content(one))
        assert distance(frames, wanted[model, seed]) < 0.5
    resumed = {jobs[ids.index(one)][0] for one, video in videos.items() if video["resumed_from_step"]}
    assert resumed == {"second"}, "the first model's engine was not touched"
    assert engine_pid(service, "first") == others
    assert len({videos[one]["model_fingerprint"] for one in ids}) == 2


def test_a_model_scales_to_no_engine_and_back_and_the_other_stays(service: Running) -> None:
    wait_for(lambda: not engines_of(service, "second"), 60.0, "the second model's engine to go")
    assert len(engines_of(service, "first")) == 1
    (video,) = service.ended([service.create(model="sora-2", num_inference_steps=2)["id"]])
    assert (video["status"], video["model"]) == ("completed", "sora-2")
    assert len(engines_of(service, "second")) == 1


# --------------------------------------------------------------------------------------------------- weights of a hub


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    with standing_in({"org/wan": {"1" * 40: folders["first"]}}) as hub:
        yield hub


def test_two_engines_download_weights_once_and_the_ingress_none(hub: Hub, tmp_path: Path) -> None:
    """While they come, the command tells how far they are; both engines have the commit that was pinned."""
    hub.pause_s = 0.1
    environment = {**hub.environment, "SKYLAPSE_CACHE_DIR": str(tmp_path / "cache")}
    service = Running(tmp_path / "data", {"model": "org/wan", "engines": 2, "threads": 1}, environment)
    try:
        service.start()
        engines = wait_for(
            lambda: found if len(found := [e for e in service.engines() if e["state"] == "ready"]) == 2 else None,
            60.0,
            "two engines",
        )
        assert {engine["revision"] for engine in engines} == {"1" * 40}
        (video,) = service.ended([service.create(num_inference_steps=2)["id"]])
        assert (video["status"], video["model_revision"]) == ("completed", "1" * 40)
        weights = {
            path: count for (method, path), count in hub.asked.items() if method == "GET" and "safetensors" in path
        }
        assert len(weights) >= 3 and set(weights.values()) == {1}
        assert re.search(r"downloading org/wan: .* MB, \d+ %", (service.data / "driver.log").read_text())
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model": "org/nothing"}, "model 'org/nothing' is no local folder, and .* has none of this name"),
        (
            {"model": "org/wan", "fingerprint": "0" * 64},
            "fingerprint of model 'org/wan' must be 0{64}, got ",
        ),
        ({"aliases": {"two": "/path"}}, "alias 'two' must name a model that is served, demo, got '/path'"),
    ],
)
def test_a_wrong_model_is_one_line_within_seconds(
    config: dict[str, Any], reason: str, hub: Hub, tmp_path: Path
) -> None:
    environment = {**hub.environment, "SKYLAPSE_CACHE_DIR": str(tmp_path / "cache")}
    service = Running(tmp_path / "data", config, environment)
    began_s = time.monotonic()
    with pytest.raises(AssertionError, match="the service ended"):
        service.start()
    took_s = time.monotonic() - began_s
    try:
        told = [
            line for line in (service.data / "driver.log").read_text().splitlines() if line.startswith("skylapse: ")
        ]
        assert service.driver is not None and service.driver.returncode == 2
        assert len(told) == 1 and re.search(reason, told[0])
        print(json.dumps({"seconds": round(took_s, 1), "line": told[0]}))
        assert took_s < 60
    finally:
        service.kill_all()
        service.client.close()


def test_no_route_to_the_hub_is_one_line(tmp_path: Path) -> None:
    """Nobody listens at the port."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment["SKYLAPSE_CACHE_DIR"] = str(tmp_path / "cache")
    service = Running(tmp_path / "data", {"model": "org/wan"}, environment)
    try:
        with pytest.raises(AssertionError, match="the service ended"):
            service.start()
        log = (service.data / "driver.log").read_text()
        assert "model 'org/wan' is not on this machine, and http://127.0.0.1:9 cannot be reached" in log
    finally:
        service.kill_all()
        service.client.close()
