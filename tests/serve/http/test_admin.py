"""Operators' routes: who may use them, what they change at once, and that each change is in the audit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from skylapse.serve.http.app import create_app
from skylapse.serve.http.routes.session import COOKIE
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.database import now
from skylapse.serve.store.processes import DISPATCHER, ENGINE
from skylapse.serve.store.tables import api_keys, jobs

from ..service import SMALL

PAGE = {"origin": "http://testserver"}
UNKNOWN = "video_" + "0" * 32


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    context = open_context({"data": str(tmp_path / "data"), "quota": 2})
    yield context
    context.database.close()


@pytest.fixture
def operator(context: Context) -> Iterator[TestClient]:
    with client_of(context, "operator") as client:
        yield client


def client_of(context: Context, *scopes: str, tenant: str = "ops") -> TestClient:
    key, text = context.keys.create(tenant, scopes, name="a test's")
    client = TestClient(create_app(context), headers={"authorization": f"Bearer {text}"})
    client.key_id = key.id  # type: ignore[attr-defined]
    return client


def create(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/videos", json={**SMALL, **fields})


def newest(client: TestClient) -> dict[str, Any]:
    """The newest row of the audit."""
    return client.get("/v1/admin/audit", params={"limit": 1}).json()["data"][0]


# ----------------------------------------------------------------------------------------------------------- who may


def test_no_other_scope_opens_an_operators_route(context: Context) -> None:
    paths = [(method, path) for path, found in create_app(context).openapi()["paths"].items() for method in found]
    ours = [(method, path) for method, path in paths if path.startswith("/v1/admin")]
    assert len(ours) == 15
    with client_of(context, "read", "write", "admin") as client:
        for method, path in ours:
            answer = client.request(method, path, json={} if method in ("post", "patch") else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions"), path
            assert client.request(method, path, headers={"authorization": ""}).status_code == 401
    assert context.audit.page(10) == ([], False)


def test_an_operators_key_sees_no_tenants_videos(context: Context, operator: TestClient) -> None:
    with client_of(context, "write", tenant="ops") as tenant:
        video = create(tenant).json()["id"]
    for method, path in (("GET", "/v1/videos"), ("GET", f"/v1/videos/{video}"), ("DELETE", f"/v1/videos/{video}")):
        assert operator.request(method, path).status_code == 403
    assert create(operator).status_code == 403


def test_a_cookie_never_carries_the_scope(context: Context) -> None:
    _, both = context.keys.create("ops", ["read", "operator"])
    _, alone = context.keys.create("ops", ["operator"])
    with TestClient(create_app(context), headers=PAGE) as browser:
        refused = browser.post("/session", json={"key": alone})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
        assert not browser.cookies
        assert browser.post("/session", json={"key": both}).json()["scopes"] == ["read"]
        assert browser.cookies[COOKIE] and browser.get("/session").json()["scopes"] == ["read"]
        assert browser.get("/v1/videos").status_code == 200
        assert browser.get("/v1/admin/keys").status_code == 403
        assert browser.get("/v1/admin/keys", headers={"authorization": f"Bearer {both}"}).status_code == 200


# ------------------------------------------------------------------------------------------------------------ tenants


def test_a_tenants_settings_hold_from_the_next_job_on(context: Context, operator: TestClient) -> None:
    with client_of(context, "write", tenant="acme") as acme:
        assert [create(acme).status_code for _ in range(3)] == [200, 200, 429]
        changed = operator.patch("/v1/admin/tenants/acme", json={"quota": 4, "weight": 2, "class": "gold"}).json()
        assert (changed["quota"], changed["weight"], changed["class"]) == (4, 2.0, "gold")
        assert changed["overrides"] == ["quota", "weight", "class"] and changed["queued"] == 2
        assert [create(acme).status_code for _ in range(3)] == [200, 200, 429]
        operator.patch("/v1/admin/tenants/acme", json={"quota": 100, "creates_per_minute": 1})
        refused = create(acme)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        back = operator.patch("/v1/admin/tenants/acme", json={"quota": None, "creates_per_minute": None}).json()
        assert (back["quota"], back["creates_per_minute"]) == (2, 600)
    assert context.tenants.class_of("acme") == "gold" and context.tenants.class_of("other") == "default"
    entry = newest(operator)
    assert (entry["action"], entry["target"]) == ("tenant.update", "acme")
    assert entry["before"] == {"quota": 100, "creates_per_minute": 1}
    assert entry["after"] == {"quota": None, "creates_per_minute": None}
    assert entry["actor"] == operator.key_id and entry["request_id"].startswith("req_")  # type: ignore[attr-defined]


def test_tenants_are_listed_by_name_and_page(context: Context, operator: TestClient) -> None:
    for name in ("b", "a", "c"):
        context.keys.create(name)
    context.tenants.change("d", {"weight": 3.0})
    first = operator.get("/v1/admin/tenants", params={"limit": 3}).json()
    assert [tenant["id"] for tenant in first["data"]] == ["a", "b", "c"] and first["has_more"]
    rest = operator.get("/v1/admin/tenants", params={"after": first["last_id"]}).json()
    assert [tenant["id"] for tenant in rest["data"]] == ["d", "ops"] and not rest["has_more"]


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("acme", {"quota": 0}, "quota"),
        ("acme", {"creates_per_minute": 10**7}, "creates_per_minute"),
        ("acme", {"weight": 0}, "weight"),
        ("acme", {"weight": -1}, "weight"),
        ("acme", {"class": "Gold"}, "class"),
        ("acme", {"class": ""}, "class"),
        ("acme", {"colour": "red"}, "colour"),
        ("a b", {"quota": 1}, "tenant"),
        ("%00", {"quota": 1}, "tenant"),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, body: dict[str, Any], param: str, operator: TestClient) -> None:
    answer = operator.patch(f"/v1/admin/tenants/{name}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert operator.get("/v1/admin/audit").json()["data"] == []


def test_there_are_eight_classes_at_most(operator: TestClient) -> None:
    for number in range(7):
        assert operator.patch(f"/v1/admin/tenants/t{number}", json={"class": f"c{number}"}).status_code == 200
    answer = operator.patch("/v1/admin/tenants/t8", json={"class": "c8"})
    assert answer.status_code == 400 and "c0, c1, c2, c3, c4, c5, c6, default" in answer.json()["error"]["message"]
    assert operator.patch("/v1/admin/tenants/t8", json={"class": "c3"}).status_code == 200
    assert operator.patch("/v1/admin/tenants/t0", json={"class": "c8"}).status_code == 200  # c0 has nobody left


# --------------------------------------------------------------------------------------------------------------- jobs


def test_jobs_of_all_tenants_are_listed_and_told_apart(context: Context, operator: TestClient) -> None:
    made = []
    for tenant in ("a", "b"):
        with client_of(context, "write", tenant=tenant) as client:
            made += [create(client, prompt="a secret plan").json()["id"] for _ in range(2)]
    context.jobs.cancel("a", made[0])

    def ids(**wanted: Any) -> list[str]:
        answer = operator.get("/v1/admin/jobs", params=wanted)
        assert answer.status_code == 200 and "secret" not in answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert ids() == made[::-1] and ids(tenant="b") == [made[3], made[2]]
    assert ids(state="failed") == [made[0]] and ids(state="queued", tenant="a") == [made[1]]
    assert ids(model="demo") == made[::-1] and ids(model="other") == [] and ids(tenant="nobody") == []
    assert ids(limit=1) == [made[3]] and ids(limit=2, after=made[2]) == [made[1], made[0]]
    for wrong in ({"state": "lost"}, {"limit": 0}, {"after": UNKNOWN}, {"tenant": "\0"}, {"model": ""}):
        assert operator.get("/v1/admin/jobs", params=wrong).status_code == 400, wrong


def test_a_job_is_put_before_others(context: Context, operator: TestClient) -> None:
    with client_of(context, "write", tenant="a") as client:
        first, second = (create(client).json()["id"] for _ in range(2))
    assert operator.patch(f"/v1/admin/jobs/{second}", json={"priority": 50}).json()["priority"] == 50
    assert (newest(operator)["before"], newest(operator)["after"]) == ({"priority": 0}, {"priority": 50})
    assert context.jobs.get("a", second).priority == 50
    context.jobs.cancel("a", first)
    ended = operator.patch(f"/v1/admin/jobs/{first}", json={"priority": 1})
    assert (ended.status_code, ended.json()["error"]["code"]) == (400, "job_has_ended")
    assert operator.patch(f"/v1/admin/jobs/{second}", json={"priority": 101}).status_code == 400
    assert operator.patch(f"/v1/admin/jobs/{second}", json={}).json()["error"]["param"] == "priority"


def test_a_job_is_cancelled_once(context: Context, operator: TestClient) -> None:
    with client_of(context, "write", tenant="a") as client:
        job_id = create(client).json()["id"]
    for _ in range(2):
        job = operator.post(f"/v1/admin/jobs/{job_id}/cancel").json()
        assert (job["state"], job["error"]["code"]) == ("failed", "cancelled")
    rows, _ = context.audit.page(10)
    assert [(row.action, row.before, row.after) for row in rows] == [
        ("job.cancel", {"state": "queued"}, {"state": "failed"})
    ]


def test_a_failed_job_is_tried_again_with_its_files(context: Context, operator: TestClient) -> None:
    with client_of(context, "read", "write", tenant="a") as client:
        old = create(client, seed=5).json()["id"]
        with context.database.write() as connection:
            request = connection.scalar(select(jobs.c.request).where(jobs.c.id == old))
            values = dict(request={**(request or {}), "inputs": ["image.png"]}, priority=7)
            connection.execute(update(jobs).where(jobs.c.id == old).values(**values))
        context.artifacts.write(f"jobs/{old}/inputs/image.png", b"a picture")
        refused = operator.post(f"/v1/admin/jobs/{old}/retry")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_retriable")
        context.jobs.cancel("a", old)
        new = operator.post(f"/v1/admin/jobs/{old}/retry").json()
        assert new["id"] != old and (new["retried_from"], new["state"], new["priority"]) == (old, "queued", 7)
        video = client.get(f"/v1/videos/{new['id']}").json()
        assert (video["seed"], video["retried_from"]) == (5, old)
        assert b"".join(context.artifacts.read(f"jobs/{new['id']}/inputs/image.png")) == b"a picture"
        assert newest(operator)["action"] == "job.retry" and newest(operator)["after"] == {"retried_from": old}
        context.artifacts.remove(f"jobs/{old}")
        gone = operator.post(f"/v1/admin/jobs/{old}/retry")
        assert (gone.status_code, gone.json()["error"]["code"]) == (400, "not_retriable")
        assert context.artifacts.folders("jobs", -60) == [new["id"]]  # nothing is left of the second try


def test_an_unknown_job_is_none(operator: TestClient) -> None:
    for name in (UNKNOWN, "video_1", "x"):
        for method, path in (("GET", ""), ("PATCH", ""), ("POST", "/cancel"), ("POST", "/retry")):
            body = {"priority": 1} if method == "PATCH" else None
            answer = operator.request(method, f"/v1/admin/jobs/{name}{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


# ------------------------------------------------------------------------------------------------------------ engines


def test_an_engine_is_asked_to_drain(context: Context, operator: TestClient) -> None:
    context.processes.beat("one", ENGINE, {"model": "demo", "slots": 8, "running": 1})
    context.processes.beat("two", ENGINE, {"model": "demo", "slots": 8, "running": 0})
    context.processes.beat("three", DISPATCHER, {})
    assert {engine["id"]: engine["state"] for engine in operator.get("/v1/admin/engines").json()["data"]} == {
        "one": "ready",
        "two": "ready",
    }
    for _ in range(2):
        assert operator.post("/v1/admin/engines/one/drain").json()["state"] == "draining"
    assert context.processes.beat("one", ENGINE, {}) and not context.processes.beat("two", ENGINE, {})
    rows, _ = context.audit.page(10)
    assert [(row.action, row.target) for row in rows] == [("engine.drain", "one")]
    for unknown in ("three", "four"):
        assert operator.post(f"/v1/admin/engines/{unknown}/drain").status_code == 404
    context.processes.leave("one")
    assert not context.processes.beat("one", ENGINE, {})  # what takes its place is not asked


# --------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_made_named_rotated_and_revoked(context: Context, operator: TestClient) -> None:
    made = operator.post("/v1/admin/keys", json={"tenant": "acme", "name": "ci", "scopes": ["read"]}).json()
    assert context.keys.find(made["key"]) and (made["name"], made["scopes"]) == ("ci", ["read"])
    path = f"/v1/admin/keys/{made['id']}"
    assert "key" not in operator.patch(path, json={"name": "builds"}).json()
    until = made["created_at"] + 3600
    assert operator.patch(path, json={"expires_at": until}).json()["expires_at"] == until
    new = operator.post(f"{path}/rotate", json={"overlap_s": 60}).json()
    assert context.keys.find(made["key"]) and context.keys.find(new["key"])
    assert (new["name"], new["tenant"], new["scopes"], new["expires_at"]) == ("builds", "acme", ["read"], until)
    last = operator.post(f"/v1/admin/keys/{new['id']}/rotate").json()
    assert context.keys.find(new["key"]) is None and context.keys.find(last["key"])
    assert operator.delete(f"/v1/admin/keys/{last['id']}").json()["deleted"]
    assert context.keys.find(last["key"]) is None
    assert operator.delete(f"/v1/admin/keys/{last['id']}").status_code == 404
    rows, _ = context.audit.page(10)
    actions = ["key.create", "key.update", "key.update", "key.rotate", "key.rotate", "key.revoke"]
    assert [row.action for row in reversed(rows)] == actions
    told = operator.get("/v1/admin/audit").text + operator.get("/v1/admin/keys").text
    assert not [text for text in (made["key"], new["key"], last["key"]) if text in told]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tenant": "a b"}, "tenant"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"expires_at": 1}, "expires_at"),
        ({"max_priority": 101}, "max_priority"),
        ({"days": 1}, "days"),
    ],
)
def test_wrong_keys_are_refused_by_name(body: dict[str, Any], param: str, operator: TestClient) -> None:
    answer = operator.post("/v1/admin/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(operator.get("/v1/admin/keys").json()["data"]) == 1


def test_an_unknown_key_is_none(operator: TestClient) -> None:
    for name in ("key_0000000000000000", "x", "key_%00"):
        for method, path in (("PATCH", ""), ("POST", "/rotate"), ("DELETE", "")):
            answer = operator.request(method, f"/v1/admin/keys/{name}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found"), (name, method)


def test_keys_are_listed_by_pages(context: Context, operator: TestClient) -> None:
    made = [context.keys.create("a")[0].id for _ in range(5)]
    seen: list[str] = []
    after = None
    while True:
        page = operator.get("/v1/admin/keys", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [key["id"] for key in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert sorted(seen) == sorted([*made, operator.key_id]) and len(seen) == 6  # type: ignore[attr-defined]
    assert operator.get("/v1/admin/keys", params={"after": "key_0"}).status_code == 400


def test_the_use_of_a_key_is_noted_beside_the_request(context: Context) -> None:
    app = create_app(context)
    key, text = context.keys.create("a")
    with TestClient(app, headers={"authorization": f"Bearer {text}"}) as client:
        for _ in range(3):
            assert client.get("/v1/videos").status_code == 200
    app.state.key_use.wait()
    used_at = context.keys.get(key.id).last_used_at
    assert used_at is not None
    context.keys.used(key.id)  # another ingress, within the minute
    assert context.keys.get(key.id).last_used_at == used_at
    with context.database.write() as connection:
        connection.execute(update(api_keys).values(last_used_at=now() - 61))
    context.keys.used(key.id)
    assert (context.keys.get(key.id).last_used_at or 0) >= used_at


# -------------------------------------------------------------------------------------------------------------- audit


def test_the_audit_is_read_by_pages_and_never_written(operator: TestClient) -> None:
    for number in range(5):
        operator.patch(f"/v1/admin/tenants/t{number}", json={"quota": 1})
    first = operator.get("/v1/admin/audit", params={"limit": 3}).json()
    rest = operator.get("/v1/admin/audit", params={"after": first["last_id"]}).json()
    assert [row["target"] for row in (*first["data"], *rest["data"])] == ["t4", "t3", "t2", "t1", "t0"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert operator.request(method, "/v1/admin/audit").status_code == 405
