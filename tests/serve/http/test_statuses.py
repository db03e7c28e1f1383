"""Every status that the OpenAPI document names is answered by some request, and every error as the document says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import httpx2 as httpx
import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from skylapse.serve.http.app import create_app
from skylapse.serve.http.openapi import BODIES
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.leases import Leases
from skylapse.serve.wire.admin_responses import ADMIN_ANSWERS, ADMIN_BODIES

from ..raw_http import Answer, Client
from ..service import SMALL, Service, serving

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

Told = tuple[str, httpx.Response | Answer]  # of which operation, what
UNKNOWN = "video_" + "0" * 32
JSON, TEXT = ("content-type", "application/json"), ("content-type", "text/plain")


@dataclass
class House:
    """A service that begins no job and takes one at a time; its tenant has a finished video."""

    service: Service
    document: dict[str, Any]
    key: str
    operator: str  # a key
    video_id: str

    @property
    def context(self) -> Context:
        return self.service.context

    @property
    def operations(self) -> dict[str, tuple[str, str]]:
        """(method, path) of each of a tenant's operations; the finished video stands for every id."""
        return {name: found for name, found in self.all_operations.items() if name not in ADMIN_ANSWERS}

    @property
    def all_operations(self) -> dict[str, tuple[str, str]]:
        """(method, path) of each operation, operators' too, which get ids of none."""
        values = {"video_id": self.video_id, "model": "demo", "character_id": "char_1", "tenant": "acme"}
        values |= {"job_id": UNKNOWN, "key_id": "key_0000000000000000", "engine_id": "none"}
        return {
            operation["operationId"]: (method.upper(), path.format(**values))
            for path, found in self.document["paths"].items()
            for method, operation in found.items()
        }

    def body(self, name: str, **fields: Any) -> dict[str, Any]:
        """Return the body of an operation that makes a video."""
        source = {"video": {"id": self.video_id}}
        needs: dict[str, dict[str, Any]] = {"editVideo": source, "extendVideo": {"seconds": "1", **source}}
        return {"prompt": "a", **needs.get(name, {}), **fields}


@pytest.fixture(scope="module")
def house(demo_engine: Engine, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    key = service.key()
    with service.client(key) as client:
        clip = client.get(f"/v1/videos/{service.make(key)['id']}/content").content
    with serving(tmp_path_factory.mktemp("held"), demo_engine, quota=1) as held, held.paused():
        key = held.key("tenant")
        with held.client(key) as client:
            video_id = client.post("/v1/videos", json=SMALL).json()["id"]
            (job,) = Leases(held.context.database).claim("a test")
            stored = asdict(held.context.artifacts.write(f"jobs/{video_id}/1/video.mp4", clip))
            Leases(held.context.database).complete(job, {"video": stored})
            yield House(held, client.get("/openapi.json").json(), key, held.key("ops", ("operator",)), video_id)


def test_every_documented_status_is_answered(
    house: House, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skylapse.serve.intake.body.TIMEOUT_S", 0.1)
    documented = {
        (operation["operationId"], int(status))
        for found in house.document["paths"].values()
        for operation in found.values()
        for status in operation["responses"]
    }
    answered = set()
    for part in (fine, wrong, unknown, barred, malformed, operated, conflicting, broken):
        for name, answer in part(house):
            check(answer)
            answered.add((name, status_of(answer)))
    for name, answer in (*made_at_once(service), *away(house, tmp_path)):
        check(answer)
        answered.add((name, status_of(answer)))
    assert answered == documented


def status_of(answer: httpx.Response | Answer) -> int:
    status = answer.status_code if isinstance(answer, httpx.Response) else answer.status
    assert status is not None
    return status


def check(answer: httpx.Response | Answer) -> None:
    status = status_of(answer)
    assert answer.headers["x-request-id"].startswith("req_")
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if status >= 400 and "/readyz" not in str(getattr(answer, "url", "")):
        content = answer.content if isinstance(answer, httpx.Response) else answer.body
        error = httpx.Response(status, content=content).json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], error


# ------------------------------------------------------------------------------------------ what is asked of the house


def fine(house: House) -> Iterator[Told]:
    with house.service.client(house.key) as client:
        for name, (method, path) in house.operations.items():
            if name in BODIES and name != "generateVideo":
                made = client.post(path, json=house.body(name))
                yield name, made
                yield "deleteVideo", client.delete(f"/v1/videos/{made.json()['id']}")
            elif name not in (*BODIES, "deleteVideo", "createCharacter", "retrieveCharacter"):
                yield name, client.request(method, path)
        _, path = house.operations["downloadVideo"]
        etag = client.get(path).headers["etag"]
        for headers in ({"range": "bytes=0-9"}, {"range": "bytes=99999999-"}, {"if-none-match": etag}):
            yield "downloadVideo", client.get(path, headers=headers)
    config = house.context.config.model_copy(update={"downloads": "redirect"})
    context = replace(house.context, config=config, artifacts=Signing(house.context.artifacts))
    with TestClient(create_app(context), headers={"authorization": f"Bearer {house.key}"}) as client:
        yield "downloadVideo", client.get(path, follow_redirects=False)


class Signing:
    """A bucket's store, as far as downloads are concerned."""

    def __init__(self, artifacts: Any) -> None:
        self.read = artifacts.read

    def sign(self, key: str, seconds: float) -> str:
        return f"http://bucket.example/{key}"


def wrong(house: House) -> Iterator[Told]:
    with house.service.client(house.key) as client:
        for name in BODIES:
            yield name, client.post(house.operations[name][1], json={})
        for name, query in (
            ("listVideos", {"limit": -1}),
            ("downloadVideo", {"variant": "spritesheet"}),
            ("getUsage", {"start": "x"}),
        ):
            yield name, client.get(house.operations[name][1], params=query)
        for name in ("createCharacter", "retrieveCharacter"):
            yield name, client.request(*house.operations[name])


def unknown(house: House) -> Iterator[Told]:
    with house.service.client(house.key) as client:
        for name, (method, path) in house.operations.items():
            if name in BODIES:
                yield name, client.post(path, json=house.body(name, model="sora-3"))
            elif house.video_id in path:
                yield name, client.request(method, path.replace(house.video_id, UNKNOWN))
        yield "retrieveModel", client.get("/v1/models/sora-3")


def barred(house: House) -> Iterator[Told]:
    """Send requests with no key, and with a key that lacks the scope."""
    keys = {scope: house.service.key("tenant", scopes=(scope,)) for scope in ("read", "write")}
    with httpx.Client(base_url=house.service.url, trust_env=False) as client:
        for name, (method, path) in house.all_operations.items():
            if path.startswith("/v1/"):
                yield name, client.request(method, path)
                other = keys["write" if method == "GET" else "read"]
                yield name, client.request(method, path, headers={"authorization": f"Bearer {other}"})
        elsewhere = {"x-forwarded-for": "203.0.113.7"}
        yield "metrics", client.get("/metrics", headers=elsewhere)
        yield "metrics", client.get("/metrics", headers={"authorization": f"Bearer {keys['read']}", **elsewhere})


def malformed(house: House) -> Iterator[Told]:
    """Send bodies that do not come, are too large, or of no known type."""
    tenant = Client(house.service.url, house.key)
    operator = Client(house.service.url, house.operator)
    for name in (*BODIES, "createCharacter", *ADMIN_BODIES):
        method, path = house.all_operations[name]
        client = operator if name in ADMIN_BODIES else tenant
        yield name, client.send(method, path, [JSON], slowly())
        yield name, client.send(method, path, [JSON], num_bytes=10**9)
        yield name, client.send(method, path, [TEXT], b"a video, please")


def slowly() -> Iterator[bytes]:
    """Yield a body without an end."""
    yield b"{"
    while True:
        time.sleep(0.02)
        yield b" "


def operated(house: House) -> Iterator[Told]:
    """Send operators' requests, right and wrong."""
    service, paths = house.service, house.all_operations
    with service.client(service.key("tried")) as tenant, service.client(house.operator) as client:
        job = f"/v1/admin/jobs/{tenant.post('/v1/videos', json=SMALL).json()['id']}"
        yield "retryJob", client.post(f"{job}/retry")  # it has not failed
        yield "changeJob", client.patch(job, json={"priority": 1})
        yield "retrieveJob", client.get(job)
        yield "cancelJob", client.post(f"{job}/cancel")
        again = client.post(f"{job}/retry")
        yield "retryJob", again
        client.post(f"/v1/admin/jobs/{again.json()['id']}/cancel")
        made = client.post("/v1/admin/keys", json={"tenant": "tried"})
        yield "createKey", made
        key = f"/v1/admin/keys/{made.json()['id']}"
        yield "changeKey", client.patch(key, json={"name": "a test's"})
        yield "rotateKey", client.post(f"{key}/rotate", json={"overlap_s": 60})
        yield "revokeKey", client.delete(key)
        yield "changeTenant", client.patch(paths["changeTenant"][1], json={"weight": 2})
        engines = client.get("/v1/admin/engines")
        yield "listEngines", engines
        yield "drainEngine", client.post(f"/v1/admin/engines/{engines.json()['data'][0]['id']}/drain")
        for name in ("listTenants", "listJobs", "listKeys", "listAudit"):
            yield name, client.get(paths[name][1])
            yield name, client.get(paths[name][1], params={"limit": 0})
        for name in ADMIN_BODIES:
            yield name, client.request(*paths[name], json={"colour": "red"})
        known: dict[str, Any] = {"changeJob": {"priority": 1}}
        for name in ("retrieveJob", "changeJob", "cancelJob", "retryJob", "drainEngine", "revokeKey", "changeKey"):
            yield name, client.request(*paths[name], json=known.get(name))
        yield "rotateKey", client.request(*paths["rotateKey"])


def conflicting(house: House) -> Iterator[Told]:
    """Use an Idempotency-Key for another request, and use up a quota."""
    create = house.context.jobs.create
    for name in BODIES:
        create("tenant", {}, idempotency_key=(house.operations[name][1], "a key", "another request"))
    with house.service.client(house.key) as client:
        for name in BODIES:
            _, path = house.operations[name]
            yield name, client.post(path, json=house.body(name), headers={"idempotency-key": "a key"})
            yield name, client.post(path, json=house.body(name))


def broken(house: House) -> Iterator[Told]:
    """Wait for a video that cannot be made."""
    key, leases = house.service.key("waits"), Leases(house.context.database)
    with house.service.client(key) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/videos/generations", json=SMALL)
        until_s = time.monotonic() + 30
        while not (jobs := [job for job in leases.claim("a test", 9) if job.tenant == "waits"]):
            assert time.monotonic() < until_s and not waiting.done()
            time.sleep(0.01)
        leases.fail(jobs[0], "not_finite", "The model produced values that are not finite for this request.")
        yield "generateVideo", waiting.result()


# ----------------------------------------------------------------------------------------------------- what others say


def made_at_once(service: Service) -> Iterator[Told]:
    with service.client() as client:
        yield "generateVideo", client.post("/v1/videos/generations", json=SMALL)


def away(house: House, folder: Path) -> Iterator[Told]:
    """Send requests while the store does not answer: another house's, since this one's crew would end."""
    context = open_context({"data": str(folder)})
    with TestClient(create_app(context), headers={"authorization": f"Bearer {house.key}"}) as client:
        for name in ("read", "write"):
            setattr(context.database, name, _fail)
        for name, (method, path) in house.all_operations.items():
            if name != "health":
                yield name, client.request(method, path)
        assert client.get("/healthz").json()["store"] == "unreachable"
    context.database.close()


def _fail() -> NoReturn:
    raise OperationalError("select 1", {}, ConnectionError())
