"""API keys: found by their text while they are valid, and readable nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select, update

from skylapse.serve.accounts.keys import ENVIRONMENT, FILE, PREFIX, TENANT_SCOPES, KeyNotFound, KeyStore
from skylapse.serve.store.database import Database, now
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


def test_a_new_text_of_the_environment_ends_the_old_one(keys: KeyStore) -> None:
    first, second = "the first text that was set", "the second text that was set"
    for _ in range(2):  # every replica does it
        keys.manage(ENVIRONMENT, first, "local", TENANT_SCOPES, 100)
    key = keys.find(first)
    assert key is not None and (key.managed_by, key.name, key.max_priority) == ("environment", "SKYLAPSE_API_KEY", 100)
    _, another = keys.create("local")
    keys.manage(FILE, "a text in the data folder", "local", TENANT_SCOPES)
    keys.manage(ENVIRONMENT, second, "local", TENANT_SCOPES)
    assert keys.find(first) is None and keys.find(second)
    assert keys.find(another) and keys.find("a text in the data folder")
    keys.manage(ENVIRONMENT, first, "local", TENANT_SCOPES)  # and back
    assert keys.find(first) and keys.find(second) is None
    keys.manage(ENVIRONMENT, None, "local", TENANT_SCOPES)
    assert keys.find(first) is None and keys.find("a text in the data folder")
    assert len(keys.page()[0]) == 4


def test_a_revoked_text_of_the_environment_stays_revoked(keys: KeyStore) -> None:
    keys.manage(ENVIRONMENT, "a text that was set", "local", TENANT_SCOPES)
    key = keys.find("a text that was set")
    assert key is not None and keys.revoke(key.id)
    keys.manage(ENVIRONMENT, "a text that was set", "local", TENANT_SCOPES)
    assert keys.find("a text that was set") is None


def test_a_key_that_an_older_release_made_of_the_environment_is_managed_from_now_on(keys: KeyStore) -> None:
    keys.create("local", TENANT_SCOPES, secret="a text that was set")
    keys.manage(ENVIRONMENT, "a text that was set", "local", TENANT_SCOPES)
    keys.manage(ENVIRONMENT, "another text, set later", "local", TENANT_SCOPES)
    assert keys.find("a text that was set") is None and len(keys.page()[0]) == 2


def test_a_managed_key_is_rotated_where_its_text_is_set(keys: KeyStore) -> None:
    for place, where in ((ENVIRONMENT, "SKYLAPSE_API_KEY"), (FILE, "api_key")):
        keys.manage(place, f"a text in the {place}", "local", TENANT_SCOPES)
        key = keys.find(f"a text in the {place}")
        assert key is not None
        with pytest.raises(ValueError, match=where):
            keys.rotate(key.id)


def test_a_rotated_key_is_valid_for_the_overlap(keys: KeyStore) -> None:
    old, old_text = keys.create("a", ["read"], name="ci", max_priority=5, valid_s=3600)
    new, new_text = keys.rotate(old.id, 60)
    assert keys.find(old_text) and keys.find(new_text)
    facts = (new.tenant, new.scopes, new.name, new.max_priority, new.expires_at)
    assert facts == ("a", ("read",), "ci", 5, old.expires_at)
    end = keys.get(old.id).expires_at
    assert end is not None and old.expires_at is not None and end < old.expires_at - 3000
    keys.rotate(old.id, 7200)
    assert keys.get(old.id).expires_at == end  # an end that is nearer stays
    _, newest = keys.rotate(new.id)
    assert keys.find(new_text) is None and keys.find(newest)
    for wrong in (new.id, "key_none"):
        with pytest.raises(KeyNotFound):
            keys.rotate(wrong)
    with pytest.raises(ValueError, match="overlap_s must be from 0"):
        keys.rotate(old.id, float("nan"))


def test_a_key_is_named_and_given_an_end(keys: KeyStore) -> None:
    key, text = keys.create("a")
    assert keys.change(key.id, {"name": "ci"}).name == "ci"
    with keys.database.read() as connection:
        soon = (connection.scalar(select(now())) or 0) + 60
    assert keys.change(key.id, {"expires_at": soon}).expires_at == pytest.approx(soon)
    assert keys.change(key.id, {"expires_at": None, "name": None}) == key
    for wrong in (soon - 120, soon * 100):
        with pytest.raises(ValueError, match="expires_at must be seconds since 1970"):
            keys.change(key.id, {"expires_at": wrong})
    with pytest.raises(ValueError, match="name must have 1 to 100 printable characters"):
        keys.change(key.id, {"name": "a\tb"})
    assert keys.find(text) == key


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
