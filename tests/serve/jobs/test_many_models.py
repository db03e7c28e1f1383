"""Several models of one service: each job by the weights that were asked for, or an error that names what there is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from pydantic import ValidationError

from skylapse.runtime.core.request import VideoRequest
from skylapse.runtime.media.writer import write_video
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.store.model_queue import ModelQueue

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

    from ..service import Service

BODY = {"prompt": "a red circle", "num_inference_steps": 2, "num_frames": 5, "size": "64x64"}


def entries(two_engines: dict[str, Engine], **fields: Any) -> list[dict[str, Any]]:
    return [{"name": name, "model": str(engine.model.folder.path), **fields} for name, engine in two_engines.items()]


@pytest.fixture(scope="module")
def two(two_engines: dict[str, Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("ray")
    from ..service import serving

    config: dict[str, Any] = {
        "models": entries(two_engines),
        "aliases": {"sora-2": "", "other": "b"},
        "engine_slots": 4,
    }
    by_deployment = {f"Engine-{name}": engine for name, engine in two_engines.items()}
    with serving(tmp_path_factory.mktemp("two"), by_deployment, **config) as service:
        yield service


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def solo_frames(engine: Engine, seed: int, folder: Path) -> np.ndarray:
    """Return the frames that a model makes by itself, through the same codec."""
    asked = VideoRequest(prompt="a red circle", width=64, height=64, num_frames=5, num_inference_steps=2, seed=seed)
    video = engine.generate(asked)
    return frames_of(write_video(folder / "solo.mp4", video.frames, video.fps).read_bytes())


def test_each_job_has_its_own_models_frames_under_load(
    two: Service, two_engines: dict[str, Engine], tmp_path: Path
) -> None:
    key = two.key()
    asked = [(name, seed) for seed in range(4) for name in ("a", "b", "sora-2", "other")]

    def make(job: tuple[str, int]) -> tuple[dict[str, Any], np.ndarray]:
        video = two.make(key, model=job[0], seed=job[1])
        with two.client(key) as client:
            return video, frames_of(client.get(f"/v1/videos/{video['id']}/content").content)

    with ThreadPoolExecutor(8) as clients:
        made = list(clients.map(make, asked))
    wanted = {(name, seed): solo_frames(two_engines[name], seed, tmp_path) for name in "ab" for seed in range(4)}
    for (name, seed), (video, frames) in zip(asked, made, strict=True):
        model = {"sora-2": "a", "other": "b"}.get(name, name)
        distance = np.abs(frames.astype(int) - wanted[model, seed].astype(int))
        assert distance.mean() < 1, "in a pack one value in 1,000 is rounded otherwise, which H.264 spreads"
        assert (video["model"], video["model_fingerprint"]) == (name, two_engines[model].model.fingerprint)
    differences = [np.abs(wanted["a", s].astype(int) - wanted["b", s].astype(int)).mean() for s in range(4)]
    assert min(differences) > 5, "the two models look alike, so nothing is shown"


def test_models_are_listed_by_all_of_their_names(two: Service) -> None:
    with two.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["root"]) for model in listed] == [
            ("a", "a"),
            ("b", "b"),
            ("sora-2", "a"),
            ("other", "b"),
        ]
        assert client.get("/v1/models/other").json()["root"] == "b"
        assert client.get("/healthz").json()["models"] == ["a", "b", "sora-2", "other"]
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/generations", "/v1/videos/edits", "/v1/videos/extensions"])
def test_a_model_that_is_not_there_is_named_with_those_that_are(path: str, two: Service) -> None:
    body = {**BODY, "model": "org/c"} if path != "/v1/videos/edits" else {"prompt": "a", "model": "org/c"}
    if path.endswith("extensions"):
        body = {"prompt": "a", "model": "org/c", "seconds": "1"}
    with two.client() as client:
        for answer in (client.post(path, json=body), client.get("/v1/models/org/c"), client.get("/v1/models/org%2Fc")):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert error["message"] == "There is no model 'org/c'; there are: a, b, sora-2, other."


def test_a_remix_is_made_by_the_model_of_its_source(two: Service, two_engines: dict[str, Engine]) -> None:
    key = two.key()
    source = two.make(key, model="other")
    with two.client(key) as client:
        made = client.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "at night", "num_inference_steps": 2})
        assert made.json()["model"] == "other"
    video = two.wait(key, made.json()["id"])
    assert video["model_fingerprint"] == two_engines["b"].model.fingerprint


def test_one_model_may_stand_still_while_the_other_goes_on(two_engines: dict[str, Engine], tmp_path: Path) -> None:
    """Whatever waits for `b`, whose engines are away, `a` is not behind it."""
    pytest.importorskip("ray")
    from ..service import serving

    with serving(tmp_path, {"Engine-a": two_engines["a"]}, models=entries(two_engines)) as service:
        key = service.key()
        with service.client(key) as client:
            waits = [client.post("/v1/videos", json={**BODY, "model": "b"}).json()["id"] for _ in range(20)]
            assert service.make(key, model="a")["status"] == "completed"
            assert {client.get(f"/v1/videos/{one}").json()["status"] for one in waits} == {"queued"}


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"aliases": {"two": "/path/demo2"}}, "alias 'two' must name a model that is served, demo, got '/path/demo2'"),
        (
            {"models": [{"model": "demo"}, {"name": "b", "model": "demo"}], "aliases": {"x": "c"}},
            "alias 'x' must name a model that is served, one of demo, b, got 'c'",
        ),
        (
            {"models": [{"model": "demo"}, {"name": "b", "model": "demo"}], "aliases": {"b": "demo"}},
            "alias 'b' must not be the name of another model, got 'demo'",
        ),
        ({"models": [{"model": "demo"}, {"model": "demo"}]}, "models must have names of their own, got 'demo' twice"),
        ({"model": "demo", "models": [{"model": "demo"}]}, "model belongs into an entry of models where these are"),
        (
            {"models": [{"model": "demo", "engines": 2, "autoscaling": {}}]},
            "engines must be left out",
        ),
        ({"engines": 2, "autoscaling": {}}, "engines must be left out"),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "min_replicas must be at most max_replicas, 2",
        ),
        ({"canary": {"share": 0.1}}, "a canary needs a model or a revision that differs"),
        ({"models": [{"model": "demo", "quantize": "int4"}]}, "must be .*int8"),
    ],
)
def test_what_does_not_fit_together_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ServeConfig(**config)


def test_one_model_is_a_list_of_one() -> None:
    (group,) = ServeConfig(device="cpu", engines=3, engine_slots=2, threads=1).groups
    assert (group.deployment, group.name, group.engines, group.engine_slots) == ("Engine", "demo", 3, 2)
    assert group.queue == ModelQueue("demo", is_default=True)


def test_entries_take_what_they_do_not_say_from_the_service() -> None:
    models = [
        {"model": "org/wan-14b", "engines": 2, "quantize": "int8"},
        {"name": "org wan/14b", "model": "demo", "device": "cpu", "autoscaling": {"max_replicas": 3}},
        {"name": "org?wan-14b", "model": "demo"},
    ]
    config = ServeConfig(models=models, device="cuda", autoscaling={"max_replicas": 9}, threads=2)
    first, second, third = config.groups
    assert first.deployment == "Engine-org-wan-14b" and len({group.deployment for group in config.groups}) == 3
    assert (first.device, first.quantize, first.engines, first.autoscaling) == ("cuda", "int8", 2, None)
    assert (second.device, second.max_engines, third.max_engines, third.threads) == ("cpu", 3, 9, 2)
    assert [group.queue.is_default for group in config.groups] == [True, False, False]
    assert ServeConfig(**config.model_dump(exclude_defaults=True)).groups == config.groups, "as replicas get it"
