"""The audit: each operator's change, with its author and time. Rows are added with the change, never altered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, insert, select

from .database import Database, now
from .tables import audit


@dataclass(frozen=True)
class Actor:
    """The author of a change: a key's id, or `cli:` and an account; request_id: of the HTTP request."""

    name: str
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the audit. before, after: the fields that the change is about; None if there was nothing."""

    id: int
    at: float
    actor: str
    action: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    request_id: str | None


def record(
    connection: Connection,
    by: Actor | None,
    action: str,
    target: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
) -> None:
    """Add a row within the caller's transaction, so that it is there if and only if the change is.

    by: None for a change that no operator has made.
    """
    if by is None:
        return
    row: dict[str, Any] = dict(at=now(), actor=by.name, request_id=by.request_id, action=action, target=target)
    row |= {name: dict(facts) for name, facts in (("before", before), ("after", after)) if facts is not None}
    connection.execute(insert(audit).values(**row))


class Audit:
    """The audit, for reading alone: no method changes a row."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def page(self, limit: int, after: int | None = None) -> tuple[list[Entry], bool]:
        """Return at most `limit` rows, the newest first, from behind the row `after`, and whether there are more."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(audit.c.id < after)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        entries = [Entry(**{field.name: getattr(row, field.name) for field in fields(Entry)}) for row in rows[:limit]]
        return entries, len(rows) > limit
