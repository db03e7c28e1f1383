"""API keys: each belongs to a tenant, has scopes, an end and a highest priority, and is kept as a digest alone.

A key is 256 random bits, which nobody can guess, so its digest needs no salt and no slow hash.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from ...runtime.core.config import MIN_KEY_CHARACTERS
from ..store.audit import Actor, record
from ..store.database import Database, now
from ..store.tables import api_keys
from .tenants import check_name

PREFIX = "sk-skylapse-"
OPERATOR = "operator"
TENANT_SCOPES = ("read", "write", "admin")  # the last is both of the others, within the key's own tenant
SCOPES = (*TENANT_SCOPES, OPERATOR)
MAX_NAME_CHARACTERS = 100
MAX_OVERLAP_S = 366 * 86400.0
USED_EVERY_S = 60.0  # how exact `last_used_at` is
ENVIRONMENT, FILE = "environment", "file"  # where the text of a managed key is set


class KeyNotFound(LookupError):
    """There is no key of this id, or none that is still valid."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """The facts of a key, without its text. last_used_at is right to the minute."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    max_priority: int
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    name: str | None = None
    last_used_at: float | None = None
    managed_by: str | None = None


class KeyStore:
    """Every method is one transaction. by: the operator whom the audit names."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        tenant: str,
        scopes: Iterable[str] = ("read", "write"),
        *,
        name: str | None = None,
        max_priority: int = 0,
        valid_s: float | None = None,
        expires_at: float | None = None,
        secret: str | None = None,
        by: Actor | None = None,
    ) -> tuple[ApiKey, str]:
        """Return a new key and its text, which is shown this once. secret: a text of the operator's own.

        Its end is `valid_s` from now, or at `expires_at`. Raises ValueError for an invalid tenant's name, an unknown
        scope, an end that has passed, a short secret.
        """
        scopes = tuple(dict.fromkeys(scopes))
        check_name(tenant)
        _check_label(name)
        if not scopes:
            raise ValueError(f"scopes must be some of {', '.join(SCOPES)}, got none")
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise ValueError(f"scopes must be some of {', '.join(SCOPES)}, got {unknown[0][:80]!r}")
        if valid_s is not None and not valid_s > 0:
            raise ValueError(f"valid_s must be above 0, got {valid_s}")
        if not -100 <= max_priority <= 100:
            raise ValueError(f"max_priority must be from -100 to 100, got {max_priority}")
        if secret is not None and len(secret) < MIN_KEY_CHARACTERS:
            raise ValueError(f"a key must have at least {MIN_KEY_CHARACTERS} characters, got {len(secret)}")
        text = secret or new_text()
        values: dict[str, Any] = dict(tenant=tenant, scopes=list(scopes), name=name, max_priority=max_priority)
        values["expires_at"] = expires_at if valid_s is None else now() + valid_s
        with self.database.write() as connection:
            _check_end(connection, expires_at)
            key = _insert(connection, text, values)
            record(connection, by, "key.create", key.id, None, _audited(key))
            return key, text

    def find(self, text: str) -> ApiKey | None:
        """Return the key with this text, unless it has expired or was revoked."""
        with self.database.read() as connection:
            row = connection.execute(
                select(api_keys).where(api_keys.c.digest == digest_of(text), is_valid())
            ).one_or_none()
        return None if row is None else to_key(row)

    def get(self, key_id: str) -> ApiKey:
        """Return a key, also one that has ended. Raises KeyNotFound."""
        with self.database.read() as connection:
            return _get(connection, key_id)

    def page(self, limit: int | None = None, after: str | None = None) -> tuple[list[ApiKey], bool]:
        """Return all keys, ended ones too, newest first, from behind the key `after`, and whether there are more."""
        query = select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
        with self.database.read() as connection:
            if after is not None:
                last = _get(connection, after)
                same = and_(api_keys.c.created_at == last.created_at, api_keys.c.id > last.id)
                query = query.where(or_(api_keys.c.created_at < last.created_at, same))
            rows = connection.execute(query if limit is None else query.limit(limit + 1)).all()
        shown = rows if limit is None else rows[:limit]
        return [to_key(row) for row in shown], len(rows) > len(shown)

    def change(self, key_id: str, changes: Mapping[str, Any], by: Actor | None = None) -> ApiKey:
        """Set `name` or `expires_at` (None: never) of a valid key. Raises KeyNotFound, ValueError."""
        assert set(changes) <= {"name", "expires_at"}, changes
        _check_label(changes.get("name"))
        with self.database.write() as connection:
            before = _get(connection, key_id, is_valid())
            _check_end(connection, changes.get("expires_at"))
            if changes:
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(**changes))
            after = _get(connection, key_id)
            record(
                connection, by, "key.update", key_id, *({n: getattr(k, n) for n in changes} for k in (before, after))
            )
            return after

    def rotate(self, key_id: str, overlap_s: float = 0.0, by: Actor | None = None) -> tuple[ApiKey, str]:
        """Return a new key with the rights of a valid one, and its text; the old one ends after `overlap_s`.

        Raises KeyNotFound; ValueError for an invalid overlap, and for a key whose text is set elsewhere.
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise ValueError(f"overlap_s must be from 0 to {MAX_OVERLAP_S:.0f}, got {overlap_s}")
        text = new_text()
        with self.database.write() as connection:
            old = _get(connection, key_id, is_valid())
            if old.managed_by == ENVIRONMENT:
                raise ValueError(f"key {key_id} is SKYLAPSE_API_KEY's: set another text there and start the service")
            if old.managed_by == FILE:
                raise ValueError(f"key {key_id} is the one in the data folder's api_key: put another text there")
            values = dict(tenant=old.tenant, scopes=list(old.scopes), name=old.name, max_priority=old.max_priority)
            new = _insert(connection, text, {**values, "expires_at": old.expires_at})
            ending = update(api_keys).where(api_keys.c.id == key_id)
            if overlap_s == 0:
                connection.execute(ending.values(revoked_at=now()))
            else:
                is_later = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now() + overlap_s)
                connection.execute(ending.where(is_later).values(expires_at=now() + overlap_s))
            record(connection, by, "key.rotate", key_id, _audited(old), {"key": new.id, "overlap_s": overlap_s})
            return new, text

    def revoke(self, key_id: str, by: Actor | None = None) -> bool:
        """End a key; return whether it was valid until now."""
        with self.database.write() as connection:
            valid = and_(api_keys.c.id == key_id, is_valid())
            if connection.execute(update(api_keys).where(valid).values(revoked_at=now())).rowcount != 1:
                return False
            after = _get(connection, key_id)
            record(connection, by, "key.revoke", key_id, {"revoked_at": None}, {"revoked_at": after.revoked_at})
            return True

    def manage(self, place: str, secret: str | None, tenant: str, scopes: Iterable[str], max_priority: int = 0) -> None:
        """Let `secret` be the one key whose text is set at `place`; the one that was set there before has ended.

        None: no text is set there any more. A key that was revoked stays revoked; one that has ended because another
        took its place is valid again once it is set again.
        """
        with self.database.write() as connection:
            self.database.lock(connection, "managed keys")  # all replicas start at once
            theirs = and_(api_keys.c.managed_by == place, is_valid())
            digest = None if secret is None else digest_of(secret)
            others = theirs if digest is None else and_(theirs, api_keys.c.digest != digest)
            connection.execute(update(api_keys).where(others).values(expires_at=now()))
            if secret is None:
                return
            known = connection.execute(select(api_keys).where(api_keys.c.digest == digest)).one_or_none()
            if known is None:
                values = dict(tenant=tenant, scopes=list(scopes), max_priority=max_priority, managed_by=place)
                _insert(connection, secret, values | {"name": LABELS[place]})
            elif known.managed_by != place or known.expires_at is not None:
                values = dict(managed_by=place, name=known.name or LABELS[place], expires_at=None)
                connection.execute(update(api_keys).where(api_keys.c.digest == digest).values(**values))

    def used(self, key_id: str) -> None:
        """Note that a key is in use, unless that was noted within the last minute."""
        with self.database.write() as connection:
            long_ago = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < now() - USED_EVERY_S)
            connection.execute(update(api_keys).where(api_keys.c.id == key_id, long_ago).values(last_used_at=now()))


LABELS = {ENVIRONMENT: "SKYLAPSE_API_KEY", FILE: "api_key in the data folder"}


def new_text() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def is_valid() -> ColumnElement[bool]:
    return and_(api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now()))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_key(row: Row[Any]) -> ApiKey:
    values = {field.name: getattr(row, field.name) for field in fields(ApiKey)}
    return ApiKey(**{**values, "scopes": tuple(values["scopes"])})


def _get(connection: Connection, key_id: str, *where: ColumnElement[bool]) -> ApiKey:
    row = connection.execute(select(api_keys).where(api_keys.c.id == key_id, *where)).one_or_none()
    if row is None:
        raise KeyNotFound(f"there is no {'valid ' if where else ''}key {key_id[:80]!r}")
    return to_key(row)


def _insert(connection: Connection, text: str, values: Mapping[str, Any]) -> ApiKey:
    key_id = f"key_{secrets.token_hex(8)}"
    row = dict(id=key_id, digest=digest_of(text), created_at=now(), **values)
    connection.execute(insert(api_keys).values(**row))
    return _get(connection, key_id)


def _audited(key: ApiKey) -> dict[str, Any]:
    facts = {name: getattr(key, name) for name in ("tenant", "name", "max_priority", "expires_at")}
    return {**facts, "scopes": list(key.scopes)}


def _check_label(name: str | None) -> None:
    if name is not None and not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
        raise ValueError(f"name must have 1 to {MAX_NAME_CHARACTERS} printable characters, got {name[:120]!r}")


def _check_end(connection: Connection, expires_at: float | None) -> None:
    present = connection.scalar(select(now())) or 0.0
    if expires_at is not None and not present < expires_at < present + 100 * MAX_OVERLAP_S:
        raise ValueError(f"expires_at must be seconds since 1970, in the next 100 years, got {expires_at:g}")
