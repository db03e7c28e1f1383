"""An ingress reads JSON alone and is ready once it has; commits are pinned; canaries take their share."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub import Hub, standing_in, use

from skylapse.serve.core.config import ServeConfig
from skylapse.serve.core.model_entry import is_of_canary

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine


BODY = {"prompt": "a red circle", "num_inference_steps": 2, "num_frames": 5, "size": "64x64"}


@pytest.fixture
def hub(two_engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    commits = {"1" * 40: two_engines["a"].model.folder.path, "2" * 40: two_engines["b"].model.folder.path}
    with standing_in({"org/wan": commits}) as hub:
        use(hub.url, monkeypatch)
        monkeypatch.setenv("SKYLAPSE_CACHE_DIR", str(tmp_path / "cache"))
        yield hub


def test_an_ingress_reads_json_alone_and_is_not_ready_before(
    hub: Hub, two_engines: dict[str, Engine], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    from ..service import serving

    hub.status = 503
    with serving(tmp_path / "data", two_engines["b"], model="org/wan", revision="2" * 40) as service:
        with service.client() as client:
            answer = client.get("/readyz")
            assert answer.status_code == 503 and "org/wan" in answer.json()["status"]
            refused = client.post("/v1/videos", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
            assert client.get("/v1/models").json()["data"] == []
            hub.status = None
            until_s = time.monotonic() + 10
            while client.get("/readyz").status_code != 200 and time.monotonic() < until_s:
                time.sleep(0.05)
            assert client.get("/readyz").json() == {"status": "ready"}
            assert client.get("/v1/models/org/wan").json()["revision"] == "2" * 40
        video = service.make(service.key())
        assert video["model_revision"] == "2" * 40
    assert hub.weights_asked() == 0


def test_revisions_are_pinned_where_a_service_is_built(hub: Hub, tmp_path: Path) -> None:
    from skylapse.serve.jobs.served_models import check_models, pin_revisions

    config = pin_revisions(
        ServeConfig(
            models=[
                {"name": "wan", "model": "org/wan", "canary": {"revision": "1" * 40, "share": 0.1}},
                {"model": "demo"},
            ]
        )
    )
    assert [group.revision for group in config.groups] == ["2" * 40, "1" * 40, None]
    check_models(config)
    assert pin_revisions(ServeConfig(model="org/wan")).revision == "2" * 40
    assert hub.weights_asked() == 0
    with pytest.raises(ValueError, match="model 'org/wan' has no revision 'v9'"):
        pin_revisions(ServeConfig(model="org/wan", revision="v9"))
    with pytest.raises(ValueError, match="revision is a hub id's, and 'demo' is a folder"):
        pin_revisions(ServeConfig(revision="main"))
    hub.status = 500
    assert pin_revisions(ServeConfig(model="org/other")).revision is None, "whoever needs it waits"
    with pytest.raises(ValueError, match="answers 500"):
        check_models(ServeConfig(model="org/other"))


def test_other_weights_than_the_fingerprints_are_told_before_a_start(two_engines: dict[str, Engine]) -> None:
    from skylapse.serve.jobs.served_models import check_models

    model = two_engines["a"].model
    check_models(ServeConfig(model=str(model.folder.path), fingerprint=model.fingerprint))
    other = two_engines["b"].model.fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint of model .* must be {other}, got {model.fingerprint}"):
        check_models(ServeConfig(model=str(model.folder.path), fingerprint=other))


def test_json_lines_carry_a_downloads_numbers() -> None:
    from skylapse.serve.core.logs import JsonLines

    record = logging.LogRecord("skylapse", logging.INFO, __file__, 1, "downloading", (), None)
    record.facts = {"bytes": 5, "total_bytes": 10, "progress": 0.5}
    assert {"bytes": 5, "progress": 0.5}.items() <= json.loads(JsonLines().format(record)).items()


def test_a_canary_makes_its_share_and_is_taken_back(two_engines: dict[str, Engine], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ..service import serving

    stable, second = two_engines["a"], two_engines["b"]
    entry = {"name": "wan", "model": str(stable.model.folder.path)}
    canary = {"model": str(second.model.folder.path), "share": 0.5}
    by_deployment = {"Engine-wan": stable, "Engine-wan-canary": second}
    with serving(tmp_path, by_deployment, models=[{**entry, "canary": canary}]) as service:
        key = service.key("tenant")
        made = [service.make(key, seed=seed) for seed in range(6)]
        for video in made:
            wanted = second if is_of_canary(video["id"], 0.5) else stable
            assert video["model_fingerprint"] == wanted.model.fingerprint
    with serving(tmp_path / "later", {"Engine-wan": stable}, models=[{**entry, "canary": canary}]) as service:
        key = service.key("tenant")
        with service.client(key) as client:
            ids = [client.post("/v1/videos", json={**BODY, "seed": seed}).json()["id"] for seed in range(8)]
        of_canary = [one for one in ids if is_of_canary(one, 0.5)]
        for one in set(ids) - set(of_canary):
            service.wait(key, one)
        with service.client(key) as client:
            assert {client.get(f"/v1/videos/{one}").json()["status"] for one in of_canary} <= {"queued"}
    with serving(tmp_path / "later", {"Engine-wan": stable}, models=[entry]) as service:
        for one in of_canary:
            video = service.wait(key, one)
            assert (video["status"], video["model_fingerprint"]) == ("completed", stable.model.fingerprint)
