"""API keys: each belongs to a tenant, has scopes, an end and a highest priority, and is kept as a digest alone.

A key is 256 random bits, so its digest needs no salt and no slow hash: nobody can guess what there is to try.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Row, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.elements import ColumnElement

from .database import Database, now
from .tables import api_keys

PREFIX = "sk-skylapse-"
SCOPES = ("read", "write", "admin")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of a key; the key itself is not."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    max_priority: int
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class KeyStore:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        tenant: str,
        scopes: Iterable[str] = ("read", "write"),
        *,
        max_priority: int = 0,
        valid_s: float | None = None,
        secret: str | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which is shown this once. secret: a text of the operator's own.

        ValueError for a tenant that is no name, an unknown scope, a life that is over before it began, a short secret.
        """
        scopes = tuple(dict.fromkeys(scopes))
        if not TENANT.fullmatch(tenant):
            raise ValueError(f"tenant must be letters, digits, '-', '_' and '.', at most 64, got {tenant[:80]!r}")
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise ValueError(f"scope must be {', '.join(SCOPES)}, got {unknown[0]!r}")
        if valid_s is not None and not valid_s > 0:
            raise ValueError(f"valid_s must be above 0, got {valid_s}")
        if secret is not None and len(secret) < 16:
            raise ValueError(f"a key must have at least 16 characters, got {len(secret)}")
        text = secret or PREFIX + secrets.token_urlsafe(32)
        key_id = f"key_{secrets.token_hex(8)}"
        with self.database.write() as connection:
            connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    tenant=tenant,
                    digest=digest_of(text),
                    scopes=list(scopes),
                    max_priority=max_priority,
                    created_at=now(),
                    expires_at=None if valid_s is None else now() + valid_s,
                )
            )
            return to_key(connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one()), text

    def ensure(self, tenant: str, secret: str, scopes: Iterable[str], max_priority: int = 0) -> None:
        """Let there be a key of the operator's own text, whoever else makes it at the same time."""
        if self.find(secret) is None:
            with suppress(IntegrityError):  # its digest is there: made just now, or revoked, which holds
                self.create(tenant, scopes, max_priority=max_priority, secret=secret)

    def find(self, text: str) -> ApiKey | None:
        """The key that this text is, unless it has expired or was revoked."""
        with self.database.read() as connection:
            row = connection.execute(
                select(api_keys).where(api_keys.c.digest == digest_of(text), is_valid())
            ).one_or_none()
        return None if row is None else to_key(row)

    def page(self) -> list[ApiKey]:
        """Every key there was, the newest first."""
        with self.database.read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id))
            return [to_key(row) for row in rows]

    def revoke(self, key_id: str) -> bool:
        """Whether there was a valid key of this id; from now on there is none."""
        with self.database.write() as connection:
            valid = and_(api_keys.c.id == key_id, is_valid())
            return connection.execute(update(api_keys).where(valid).values(revoked_at=now())).rowcount == 1


def is_valid() -> ColumnElement[bool]:
    return and_(api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now()))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_key(row: Row[Any]) -> ApiKey:
    values = {field.name: getattr(row, field.name) for field in fields(ApiKey)}
    return ApiKey(**{**values, "scopes": tuple(values["scopes"])})
