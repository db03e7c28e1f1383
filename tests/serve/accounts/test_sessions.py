"""Sessions: a key becomes a cookie that lives as long as both do, and works for the page of this host alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from skylapse.serve.accounts.keys import KeyStore
from skylapse.serve.accounts.sessions import Sessions
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.http.routes import session
from skylapse.serve.http.routes.session import COOKIE, Failures, check_origin
from skylapse.serve.store.database import Database, now
from skylapse.serve.store.tables import api_keys, sessions
from skylapse.serve.wire.errors import ApiError

HOST = {"origin": "http://testserver"}


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


@pytest.fixture
def store(database: Database) -> Sessions:
    return Sessions(database)


# ------------------------------------------------------------------------------------------------------- the store


def test_a_session_is_found_by_its_token_alone(keys: KeyStore, store: Sessions) -> None:
    key, _ = keys.create("team-a", ["read"], max_priority=3)
    token = store.open(key, 60)
    assert len(token) > 40 and store.find(token) == key
    for wrong in (token[:-1], token + "x", token.upper(), key.id, "", "\ud800"):
        assert store.find(wrong) is None


def test_the_token_is_kept_nowhere(keys: KeyStore, store: Sessions, tmp_path: Path) -> None:
    token = store.open(keys.create("a")[0], 60)
    with store.database.read() as connection:
        (row,) = connection.execute(select(sessions)).all()
    assert token not in str(row)
    for path in tmp_path.iterdir():
        assert token.encode() not in path.read_bytes()


def test_a_session_ends_when_it_expires(keys: KeyStore, store: Sessions) -> None:
    token = store.open(keys.create("a")[0], 60)
    with store.database.write() as connection:
        connection.execute(update(sessions).values(expires_at=now() - 1))
    assert store.find(token) is None


def test_a_session_ends_with_its_key(keys: KeyStore, store: Sessions) -> None:
    (revoked, _), (expired, _), (valid, _) = keys.create("a"), keys.create("b"), keys.create("c")
    tokens = [store.open(key, 60) for key in (revoked, expired, valid)]
    keys.revoke(revoked.id)
    with store.database.write() as connection:
        connection.execute(update(api_keys).where(api_keys.c.id == expired.id).values(expires_at=now() - 1))
    assert [store.find(token) for token in tokens] == [None, None, valid]


def test_closing_ends_one_session_of_a_key(keys: KeyStore, store: Sessions) -> None:
    key, _ = keys.create("a")
    one, other = store.open(key, 60), store.open(key, 60)
    assert store.close(one) and not store.close(one) and not store.close("none")
    assert store.find(one) is None and store.find(other) == key


def test_expired_sessions_are_forgotten(keys: KeyStore, store: Sessions) -> None:
    key, _ = keys.create("a")
    store.open(key, 60)
    with store.database.write() as connection:
        connection.execute(update(sessions).values(expires_at=now() - 1))
    token = store.open(key, 60)
    assert (store.remove_expired(), store.remove_expired()) == (1, 0)
    assert store.find(token) == key


@pytest.mark.parametrize("valid_s", [0, -1, float("nan")])
def test_a_session_must_have_a_life(valid_s: float, keys: KeyStore, store: Sessions) -> None:
    with pytest.raises(ValueError, match="valid_s must be above 0"):
        store.open(keys.create("a")[0], valid_s)


# ------------------------------------------------------------------------------------------------------- the routes


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(session, "failures", Failures(limit=3))
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    app = FastAPI()
    app.state.context = SimpleNamespace(
        keys=KeyStore(database), sessions=Sessions(database), config=ServeConfig(session_s=600)
    )
    app.include_router(session.router)
    app.add_exception_handler(ApiError, lambda _, error: JSONResponse(error.body, error.status, error.headers))

    @app.api_route("/change", methods=["GET", "POST", "DELETE"])
    def change(request: Request) -> None:
        check_origin(request)

    with TestClient(app) as client:
        yield client
    database.close()


def context(client: TestClient) -> SimpleNamespace:
    return client.app.state.context  # type: ignore[attr-defined]


def test_a_key_is_exchanged_for_a_cookie(client: TestClient) -> None:
    key, text = context(client).keys.create("team-a")
    assert client.get("/session").json() == {"object": "session", "tenant": None, "scopes": []}
    answer = client.post("/session", json={"key": text}, headers=HOST)
    assert (answer.status_code, answer.json()["tenant"]) == (200, "team-a")
    attributes = answer.headers["set-cookie"].lower()
    for part in (f"{COOKIE}=", "httponly", "samesite=strict", "path=/", "max-age=600"):
        assert part in attributes
    assert "secure" not in attributes and text not in answer.text + attributes
    assert client.get("/session").json() == {"object": "session", "tenant": "team-a", "scopes": ["read", "write"]}
    assert context(client).sessions.find(client.cookies[COOKIE]) == key


def test_the_cookie_is_secure_on_https(client: TestClient) -> None:
    _, text = context(client).keys.create("a")
    for headers in (HOST | {"x-forwarded-proto": "https"}, HOST | {"x-forwarded-proto": "https, http"}):
        answer = client.post("/session", json={"key": text}, headers=headers)
        assert "secure" in answer.headers["set-cookie"].lower()


def test_logging_out_ends_the_session(client: TestClient) -> None:
    _, text = context(client).keys.create("a")
    client.post("/session", json={"key": text}, headers=HOST)
    token = client.cookies[COOKIE]
    answer = client.delete("/session", headers=HOST)
    assert answer.status_code == 204 and COOKIE not in client.cookies
    assert context(client).sessions.find(token) is None
    assert client.delete("/session", headers=HOST).status_code == 204


def test_logging_in_again_ends_the_older_session(client: TestClient) -> None:
    _, text = context(client).keys.create("a")
    tokens = []
    for _ in range(2):
        client.post("/session", json={"key": text}, headers=HOST)
        tokens.append(client.cookies[COOKIE])
    found = [context(client).sessions.find(token) for token in tokens]
    assert found[0] is None and found[1] is not None


def test_a_wrong_key_opens_nothing(client: TestClient) -> None:
    answer = client.post("/session", json={"key": "sk-skylapse-wrong"}, headers=HOST)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", "key")
    assert "sk-skylapse-wrong" not in answer.text


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"key": "k"}', "text/plain", 415),  # what a form of another site could send
        (b"key=k", "application/x-www-form-urlencoded", 415),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"key": ""}', "application/json", 400),
        (b'{"key": 7}', "application/json", 400),
        (b'{"key": "k", "admin": true}', "application/json", 400),
        (b'{"key": "' + b"k" * 2000 + b'"}', "application/json", 400),
        (b'{"key": "' + b"k" * 100_000 + b'"}', "application/json", 413),
        (b"[" * 4000, "application/json", 400),
    ],
)
def test_bad_logins_are_refused(body: bytes, content_type: str, status: int, client: TestClient) -> None:
    answer = client.post("/session", content=body, headers=HOST | {"content-type": content_type})
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_who_fails_too_often_waits(client: TestClient) -> None:
    _, text = context(client).keys.create("a")
    wrong = [client.post("/session", json={"key": "wrong"}, headers=HOST).status_code for _ in range(4)]
    assert wrong == [401, 401, 401, 429]
    answer = client.post("/session", json={"key": text}, headers=HOST)
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60


def test_old_failures_are_forgiven_and_many_addresses_take_no_more_room() -> None:
    failures = Failures(limit=1, window_s=0, max_addresses=5)
    for number in range(20):
        failures.count(f"10.0.0.{number}")
    failures.check("10.0.0.19")
    assert len(failures.times) == 5


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({"origin": "http://testserver"}, True),
        ({"origin": "https://TESTSERVER"}, True),  # behind a proxy that ends https
        ({"origin": "http://testserver:8000"}, False),
        ({"origin": "http://sub.testserver"}, False),
        ({"origin": "http://testserver.evil.example"}, False),
        ({"origin": "http://testserver@evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://[::1"}, False),
        ({}, False),
        ({"sec-fetch-site": "same-origin", "origin": "https://public.example"}, True),  # the proxy changed the host
        ({"sec-fetch-site": "same-site", "origin": "http://testserver"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"host": "", "origin": "null"}, False),
    ],
)
def test_changes_come_from_pages_of_this_host(headers: dict[str, str], is_own: bool, client: TestClient) -> None:
    for method in ("POST", "DELETE"):
        answer = client.request(method, "/change", headers=headers)
        assert answer.status_code == (200 if is_own else 403)
        assert is_own or answer.json()["error"]["code"] == "wrong_origin"
    assert client.get("/change", headers=headers).status_code == 200


def test_other_sites_cannot_log_anyone_in_or_out(client: TestClient) -> None:
    _, text = context(client).keys.create("a")
    client.post("/session", json={"key": text}, headers=HOST)
    other = {"origin": "http://evil.example"}
    assert client.post("/session", json={"key": text}, headers=other).status_code == 403
    assert client.delete("/session", headers=other).status_code == 403
    assert client.get("/session").json()["tenant"] == "a"
