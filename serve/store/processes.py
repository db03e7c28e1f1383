"""Who is alive: dispatchers and engines leave a sign every second, and with it what they know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update

from .database import Database, now
from .tables import processes

ENGINE, DISPATCHER = "engine", "dispatcher"
# `state` of an engine's facts; one of an earlier release tells none, and takes work. A failed one tells its `error`.
LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"


@dataclass(frozen=True)
class Process:
    id: str
    kind: str
    silent_s: float  # since its newest sign
    facts: dict[str, Any]


class Processes:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def beat(self, process_id: str, kind: str, facts: Mapping[str, Any]) -> None:
        """`process_id` is alive, and this is the newest of it."""
        values = dict(seen_at=now(), facts=dict(facts))
        with self.database.write() as connection:
            if not connection.execute(update(processes).where(processes.c.id == process_id).values(**values)).rowcount:
                connection.execute(insert(processes).values(id=process_id, kind=kind, **values))

    def leave(self, process_id: str) -> None:
        with self.database.write() as connection:
            connection.execute(delete(processes).where(processes.c.id == process_id))

    def alive(self, within_s: float = 10.0, kind: str | None = None) -> list[Process]:
        """Those who gave a sign within so many seconds, the newest first."""
        silent = now() - processes.c.seen_at
        query = select(processes.c.id, processes.c.kind, silent.label("silent_s"), processes.c.facts)
        query = query.where(processes.c.seen_at >= now() - within_s).order_by(processes.c.seen_at.desc())
        if kind is not None:
            query = query.where(processes.c.kind == kind)
        with self.database.read() as connection:
            return [Process(*row) for row in connection.execute(query)]

    def forget(self, after_s: float) -> int:
        """Remove those who have been silent for so long; returns how many."""
        with self.database.write() as connection:
            return connection.execute(delete(processes).where(processes.c.seen_at < now() - after_s)).rowcount
