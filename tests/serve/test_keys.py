"""API keys: found by their text while they are valid, and readable nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select, update

from skylapse.serve.store.database import Database, now
from skylapse.serve.store.keys import PREFIX, KeyStore
from skylapse.serve.store.tables import api_keys


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def test_a_key_is_found_by_its_text_alone(keys: KeyStore) -> None:
    key, text = keys.create("team-a", ["read"], max_priority=3)
    assert text.startswith(PREFIX) and len(text) > 40
    assert keys.find(text) == key and (key.tenant, key.scopes, key.max_priority) == ("team-a", ("read",), 3)
    for wrong in (text[:-1], text + "x", text.upper(), key.id, "", "\ud800"):
        assert keys.find(wrong) is None


def test_the_text_is_kept_nowhere(keys: KeyStore, tmp_path: Path) -> None:
    _, text = keys.create("team-a")
    with keys.database.read() as connection:
        (row,) = connection.execute(select(api_keys)).all()
    assert text not in str(row)
    for path in tmp_path.iterdir():
        assert text.encode() not in path.read_bytes()


def test_two_keys_are_never_the_same(keys: KeyStore) -> None:
    assert len({keys.create("a")[1] for _ in range(20)}) == 20


def test_an_expired_key_is_none(keys: KeyStore) -> None:
    key, text = keys.create("a", valid_s=60)
    assert keys.find(text) == key
    with keys.database.write() as connection:
        connection.execute(update(api_keys).values(expires_at=now() - 1))
    assert keys.find(text) is None and not keys.revoke(key.id)


def test_a_revoked_key_is_none_and_stays_in_the_list(keys: KeyStore) -> None:
    (key, text), (other, other_text) = keys.create("a"), keys.create("b")
    assert keys.revoke(key.id) and not keys.revoke(key.id) and not keys.revoke("key_none")
    assert keys.find(text) is None and keys.find(other_text) == other
    assert {found.id: found.revoked_at is not None for found in keys.page()[0]} == {key.id: True, other.id: False}


def test_an_operator_may_choose_the_text(keys: KeyStore) -> None:
    key, text = keys.create("local", secret="a-secret-of-my-own")
    assert text == "a-secret-of-my-own" and keys.find("a-secret-of-my-own") == key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tenant=""), "tenant must be letters"),
        (dict(tenant="../etc"), "tenant must be letters"),
        (dict(tenant="a" * 65), "tenant must be letters"),
        (dict(tenant="a", scopes=["root"]), "scopes must be some of read, write, admin, operator, got 'root'"),
        (dict(tenant="a", valid_s=0), "valid_s must be above 0, got 0"),
        (dict(tenant="a", valid_s=float("nan")), "valid_s must be above 0, got nan"),
        (dict(tenant="a", secret="short"), "a key must have at least 16 characters, got 5"),
    ],
)
def test_wrong_keys_are_refused(arguments: dict, message: str, keys: KeyStore) -> None:
    with pytest.raises(ValueError, match=message):
        keys.create(**arguments)
    assert keys.page() == ([], False)
