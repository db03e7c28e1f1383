"""Sessions of browsers, which exchange a key for a cookie: EventSource and <video> cannot send a header.

A session ends when it expires, when it is closed, and when its key expires or is revoked. As with keys, the cookie's
value is 256 random bits of which only the digest is kept. A session may do what its key may, but for the scope of
operators: what a browser sends by itself must not administer a service.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from sqlalchemy import delete, insert, select

from ..store.database import Database, now
from ..store.tables import api_keys, sessions
from .keys import OPERATOR, ApiKey, digest_of, is_valid, to_key


class Sessions:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def open(self, key: ApiKey, valid_s: float) -> str:
        """Return a new session's token, which is not kept. Raises ValueError for a life of no length."""
        if not valid_s > 0:
            raise ValueError(f"valid_s must be above 0, got {valid_s}")
        token = secrets.token_urlsafe(32)
        row = dict(digest=digest_of(token), key_id=key.id, created_at=now(), expires_at=now() + valid_s)
        with self.database.write() as connection:
            connection.execute(insert(sessions).values(**row))
        return token

    def find(self, token: str) -> ApiKey | None:
        """Return the key exchanged for this token, without operators' scope, while session and key are both valid."""
        lives = sessions.c.expires_at > now()
        found = select(api_keys).join(sessions).where(sessions.c.digest == digest_of(token), lives, is_valid())
        with self.database.read() as connection:
            row = connection.execute(found).one_or_none()
        return None if row is None else for_browsers(to_key(row))

    def close(self, token: str) -> bool:
        """End a session; return whether there was one."""
        with self.database.write() as connection:
            return connection.execute(delete(sessions).where(sessions.c.digest == digest_of(token))).rowcount == 1

    def remove_expired(self) -> int:
        """Forget sessions that have expired; return their number."""
        with self.database.write() as connection:
            return connection.execute(delete(sessions).where(sessions.c.expires_at <= now())).rowcount


def for_browsers(key: ApiKey) -> ApiKey:
    """Return the key without the scope of operators, as a cookie carries it."""
    return replace(key, scopes=tuple(scope for scope in key.scopes if scope != OPERATOR))
