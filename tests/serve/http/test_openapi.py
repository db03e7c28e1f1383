"""The OpenAPI document is valid, complete and true, and what OpenAI's own says of videos holds for it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import APIRoute

from skylapse.serve.http.openapi import BODIES

from ..service import SMALL, Service, serving

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

schemathesis = pytest.importorskip("schemathesis")
HERE = Path(__file__).parents[1]
QUOTA = 60  # of unfinished videos, where schemathesis makes them
ROUTES = HERE.parents[1] / "serve" / "http" / "routes"

UNDOCUMENTED = {  # of the page, which is no client, and what differs from its GET by the body alone
    *(("GET", "/"), ("HEAD", "/"), ("GET", "/static/{name}"), ("HEAD", "/static/{name}")),
    *(("GET", "/session"), ("POST", "/session"), ("DELETE", "/session")),
    ("HEAD", "/v1/videos/{video_id}/content"),
}

# OpenAI's document of 2026-08-21: VideoResource, whose keys are all required; those that may be null; and operations.
STATUSES = {"queued", "in_progress", "completed", "failed"}
REQUIRED = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at"),
    *("prompt", "size", "seconds", "remixed_from_video_id", "error"),
}
NULLABLE = {"completed_at", "expires_at", "prompt", "remixed_from_video_id", "error"}
LIST = {"object", "data", "first_id", "last_id", "has_more"}
OPERATIONS = {
    *(("post", "/v1/videos"), ("get", "/v1/videos"), ("get", "/v1/videos/{video_id}")),
    *(("delete", "/v1/videos/{video_id}"), ("get", "/v1/videos/{video_id}/content")),
    *(("post", "/v1/videos/edits"), ("post", "/v1/videos/extensions"), ("post", "/v1/videos/{video_id}/remix")),
    *(("post", "/v1/videos/characters"), ("get", "/v1/videos/characters/{character_id}")),
    *(("get", "/v1/models"), ("get", "/v1/models/{model}")),
}
FIELDS = {
    "createVideo": {"prompt", "input_reference", "model", "seconds", "size"},
    "editVideo": {"prompt", "video"},
    "extendVideo": {"prompt", "seconds", "video"},
    "remixVideo": {"prompt"},
}
SIZES = ("720x1280", "1280x720", "1024x1792", "1792x1024", "1920x1080", "1080x1920")
SECONDS = ("4", "8", "12", "16", "20")


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    with service.client() as client:
        return client.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {operation["operationId"]: operation for path in document["paths"].values() for operation in path.values()}


def test_document_is_valid_openapi_31(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()


def test_every_route_is_documented_or_on_the_list() -> None:
    found = set()
    for path in ROUTES.glob("*.py"):
        routes = getattr(importlib.import_module(f"skylapse.serve.http.routes.{path.stem}"), "router", None)
        for route in routes.routes if routes else ():
            assert isinstance(route, APIRoute)
            found |= {(method, route.path, route.include_in_schema) for method in route.methods}
    assert {(method, path) for method, path, is_shown in found if not is_shown} == UNDOCUMENTED
    assert len(found) > len(UNDOCUMENTED) + 15


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    for kind, named in document["components"].items():
        if kind != "securitySchemes":
            assert {name for name in named if f'"#/components/{kind}/{name}"' not in text} == set()
    assert text.count("#/components/") == sum(
        text.count(f'"#/components/{kind}/{name}"') for kind, named in document["components"].items() for name in named
    )


def test_videos_have_all_that_openais_have(document: dict[str, Any]) -> None:
    video = document["components"]["schemas"]["Video"]
    assert set(video["required"]) == set(video["properties"]) > REQUIRED
    assert set(video["properties"]["status"]["enum"]) == STATUSES
    kinds = {name: json.dumps(schema) for name, schema in video["properties"].items() if name in REQUIRED}
    assert {name for name, schema in kinds.items() if "null" in schema} <= NULLABLE
    for name, kind in {"progress": "integer", "created_at": "integer", "seconds": "string", "size": "string"}.items():
        assert video["properties"][name]["type"] == kind
    assert set(document["components"]["schemas"]["VideoList"]["required"]) == LIST
    assert set(document["components"]["schemas"]["ErrorDetail"]["required"]) == {"message", "type", "param", "code"}


def test_requests_may_have_all_that_openais_may(document: dict[str, Any]) -> None:
    assert {(method, path) for path, found in document["paths"].items() for method in found} > OPERATIONS
    for name, fields in FIELDS.items():
        content = operations(document)[name]["requestBody"]["content"]
        assert {"multipart/form-data", "application/json"} < set(content)
        schema, _ = BODIES[name]
        assert set(document["components"]["schemas"][schema.__name__]["properties"]) > fields
        assert set(schema.model_json_schema()["required"]) <= fields
    create = BODIES["createVideo"][0]
    for size in SIZES:
        for seconds in SECONDS:
            create.model_validate({"prompt": "a", "size": size, "seconds": seconds})
    create.model_validate({"prompt": "a" * 10_000, "seconds": 4})
    limits = {p["name"]: p["schema"] for p in operations(document)["listVideos"]["parameters"]}
    assert (limits["limit"]["minimum"], limits["limit"]["maximum"]) == (0, 100)
    assert set(limits["order"]["enum"]) == {"asc", "desc"}


@pytest.mark.slow
def test_schemathesis_finds_nothing(demo_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No 5xx, no undocumented status, content type or shape, no wrong input taken; videos made, read and deleted."""
    monkeypatch.setattr("skylapse.serve.http.routes.events.STREAM_S", 0.05)  # of videos that nobody works on
    with serving(tmp_path, demo_engine, quota=QUOTA) as service:
        key, full_key = service.key("fuzzed"), service.key()
        video = service.make(key)
        with service.paused(), service.client(full_key) as full:
            for _ in range(QUOTA):
                full.post("/v1/videos", json=SMALL).raise_for_status()
            command = [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "--config-file",
                str(HERE / "schemathesis.toml"),
                "run",
            ]
            command += [f"{service.url}/openapi.json", "--phases", "examples,fuzzing,stateful"]
            # A document cannot say all: that a size is even, or a length within the model's. Refusals are fine.
            command += ["--max-examples", "25", "--seed", "7", "--exclude-checks", "positive_data_acceptance"]
            variables = {"SKYLAPSE_KEY": key, "SKYLAPSE_FULL_KEY": full_key, "SKYLAPSE_VIDEO": video["id"]}
            variables["SKYLAPSE_OPERATOR_KEY"] = service.key(scopes=("operator",))
            environment = {**os.environ, **variables, "NO_COLOR": "1"}
            run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            print(run.stdout)  # what was tried, and how long it took
            assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
            assert f"{len(operations(full.get('/openapi.json').json()))} selected" in run.stdout
