"""Usage by day, tenant and model: sums over the ledger."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import func, select, tuple_
from sqlalchemy.sql.elements import ColumnElement

from ..core.prices import Cost
from ..store.database import Database
from ..store.tables import ledger

DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")  # fromisoformat also takes weeks
GROUPS = ("day", "tenant", "model")
SUMS = ("jobs", "completed", "engine_seconds", "video_seconds", "cost_nanos")


@dataclass(frozen=True)
class Bucket:
    """The usage of the jobs of a day, a tenant or a model; None: of all days, tenants or models.

    cost: of what had a price when it was used; None if nothing had.
    """

    day: str | None
    tenant: str | None
    model: str | None
    jobs: int
    completed: int
    engine_seconds: float
    video_seconds: float
    cost: Cost | None
    cursor: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A query for usage. start, end: days by UTC, both included. by: some of GROUPS. tenant: None is all."""

    start: date
    end: date
    by: Sequence[str] = ("day",)
    tenant: str | None = None


def parse_day(name: str, text: str) -> date:
    """Parse a day. Raises ValueError, which names the text that is none."""
    with suppress(ValueError):
        if DAY.fullmatch(text):
            return date.fromisoformat(text)
    raise ValueError(f"{name} must be a day such as 2026-11-30, got {text[:40]!r}")


def parse_groups(name: str, text: str) -> tuple[str, ...]:
    """Parse a list of GROUPS. Raises ValueError for another text."""
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= set(GROUPS) or len(set(words)) != len(words):
        raise ValueError(f"{name} must be of {', '.join(GROUPS)}, each once, got {text[:80]!r}")
    return tuple(group for group in GROUPS if group in words)


def read_usage(
    database: Database, asked: Asked, limit: int | None = None, after: str | None = None
) -> tuple[list[Bucket], bool]:
    """Return at most `limit` buckets in order of day, tenant and model, and whether there are more.

    Sums of different currencies are not added up: then there is a bucket for each. Raises ValueError for an `after`
    that is no cursor of such a list.
    """
    where: list[ColumnElement[bool]] = [ledger.c.day.between(asked.start.isoformat(), asked.end.isoformat())]
    if asked.tenant is not None:
        where.append(ledger.c.tenant == asked.tenant)
    with database.read() as connection:
        currencies = select(func.count(ledger.c.currency.distinct())).where(*where)
        is_mixed = (connection.scalar(currencies) or 0) > 1
        keys: list[ColumnElement[Any]] = [ledger.c[group] for group in asked.by]
        keys += [func.coalesce(ledger.c.currency, "")] if is_mixed else []
        if after is not None:
            where.append(tuple_(*keys) > tuple_(*_values(after, len(keys))))
        query = select(*keys, *(func.sum(ledger.c[name]) for name in SUMS), func.max(ledger.c.currency))
        query = query.where(*where).group_by(*keys).order_by(*keys)
        rows = connection.execute(query if limit is None else query.limit(limit + 1)).all()
    buckets = [_bucket(asked, row[: len(keys)], row[len(keys) :]) for row in rows[:limit]]
    return buckets, limit is not None and len(rows) > limit


def _bucket(asked: Asked, keys: Sequence[Any], sums: Sequence[Any]) -> Bucket:
    jobs, completed, engine_seconds, video_seconds, nanos, currency = sums
    named = dict.fromkeys(GROUPS) | {"tenant": asked.tenant} | dict(zip(asked.by, keys, strict=False))
    cost = None if nanos is None else Cost(int(nanos), currency)
    cursor = base64.urlsafe_b64encode(json.dumps(list(keys)).encode()).decode().rstrip("=")
    return Bucket(**named, jobs=jobs, completed=completed, engine_seconds=engine_seconds,
                  video_seconds=video_seconds, cost=cost, cursor=cursor)  # fmt: skip


def _values(cursor: str, count: int) -> list[str]:
    try:
        values = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, str) for v in values):
        raise ValueError("after must be the last_id of such a list")
    return values
