"""Webhook events that wait: written with the end of their job, handed out until one attempt succeeds."""

from __future__ import annotations

import json
import random
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, func, insert, select, update

from ..core.metric_definitions import WEBHOOKS
from .counters import Counters, Tally
from .database import Database, now
from .tables import outbox

# 5 s, 15 s, 45 s, ... to 6 h: the 12 attempts that ServeConfig.webhook_attempts means span 23 h, a receiver's bad day.
FIRST_RETRY_S, RETRY_FACTOR, MAX_RETRY_S = 5.0, 3.0, 6 * 3600.0
JITTER = 0.25  # of the wait, either way: what failed together is not tried again together
MAX_ERROR_CHARS = 200


def enqueue(connection: Connection, job_id: str, url: str, event_type: str, trace: str | None = None) -> str:
    """Add an event in the caller's transaction, so that it exists if and only if the job's end does; return its id.

    event_type: "video.completed" or "video.failed". trace: the job's, which the span of each attempt goes into.
    """
    event_id = f"evt_{secrets.token_hex(16)}"
    created_at = connection.scalar(select(now()))
    assert created_at is not None
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(created_at),
        "type": event_type,
        "data": {"id": job_id},
    }
    row = dict(id=event_id, job_id=job_id, url=url, body=json.dumps(event), created_at=created_at, next_at=created_at)
    connection.execute(insert(outbox).values(**row, trace=trace))
    return event_id


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One attempt at one event. `attempts` counts this one, and fences it: see `Outbox.failed`."""

    id: str
    job_id: str
    url: str
    body: str
    attempts: int
    trace: str | None = None  # the job's


class Outbox:
    """Every method is one transaction; any number of dispatchers may share the events."""

    def __init__(self, database: Database, max_attempts: int = 12) -> None:
        self.database = database
        self.max_attempts = max_attempts
        self.counters = Counters()

    def claim(self, count: int, attempt_s: float) -> list[Delivery]:
        """Return up to `count` events that are due, oldest first; nobody else gets them for `attempt_s`.

        After that they are due again: if the process that claimed them is dead, another one delivers them.
        """
        due = (
            select(outbox.c.id)
            .where(outbox.c.delivered_at.is_(None), outbox.c.failed_at.is_(None), outbox.c.next_at <= now())
            .order_by(outbox.c.next_at, outbox.c.id)
            .limit(count)
        )
        with self.database.read() as connection:  # dispatchers look ten times a second: mostly nothing is due, and
            if connection.scalar(due.limit(1)) is None:  # SQLite's writers need not wait for them to find that out
                return []
        with self.database.write() as connection:
            ids = list(connection.scalars(due.with_for_update(skip_locked=True)))
            if not ids:
                return []
            claimed = outbox.c.id.in_(ids)
            values = dict(attempts=outbox.c.attempts + 1, next_at=now() + attempt_s)
            connection.execute(update(outbox).where(claimed).values(**values))
            columns = (outbox.c.id, outbox.c.job_id, outbox.c.url, outbox.c.body, outbox.c.attempts, outbox.c.trace)
            found = {row.id: Delivery(**row._mapping) for row in connection.execute(select(*columns).where(claimed))}
            return [found[event_id] for event_id in ids]

    def delivered(self, delivery: Delivery) -> None:
        """Note that the receiver took the event; if another attempt has begun, its failure then changes nothing."""
        with self.database.write() as connection:
            event = and_(outbox.c.id == delivery.id, outbox.c.delivered_at.is_(None))
            values = dict(delivered_at=now(), failed_at=None, last_error=None)
            if connection.execute(update(outbox).where(event).values(**values)).rowcount:
                self._count(connection, "delivered")

    def failed(self, delivery: Delivery, error: str, retry_after_s: float | None = None) -> bool:
        """Try again later, not before the receiver's Retry-After; return whether this was the last attempt instead.

        Only the newest attempt counts: a slow one, whose event was handed out again meanwhile, decides nothing.
        """
        gives_up = delivery.attempts >= self.max_attempts
        wait_s = max(retry_s(delivery.attempts), min(retry_after_s or 0.0, MAX_RETRY_S))
        values = dict(failed_at=now()) if gives_up else dict(next_at=now() + wait_s)
        newest = and_(
            outbox.c.id == delivery.id, outbox.c.attempts == delivery.attempts, outbox.c.delivered_at.is_(None)
        )
        with self.database.write() as connection:
            counted = connection.execute(
                update(outbox).where(newest).values(**values, last_error=error[:MAX_ERROR_CHARS])
            ).rowcount
            if counted:
                self._count(connection, "given_up" if gives_up else "retried")
        return gives_up and counted == 1

    def _count(self, connection: Connection, outcome: str) -> None:
        tally = Tally()
        tally.add(WEBHOOKS, outcome)
        self.counters.add(connection, tally)

    def remove_old(self, older_than_s: float) -> int:
        """Forget events that were delivered or given up `older_than_s` ago; return their number."""
        with self.database.write() as connection:
            ended_at = func.coalesce(outbox.c.delivered_at, outbox.c.failed_at)
            return connection.execute(delete(outbox).where(ended_at < now() - older_than_s)).rowcount


def retry_s(attempts: int) -> float:
    """Return the seconds to wait after this many attempts."""
    wait_s = min(MAX_RETRY_S, FIRST_RETRY_S * RETRY_FACTOR ** min(attempts - 1, 20))
    return wait_s * random.uniform(1 - JITTER, 1 + JITTER)
