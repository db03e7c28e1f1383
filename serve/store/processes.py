"""Live processes: dispatchers and engines leave a heartbeat every second, with their facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, insert, select, update

from .audit import Actor, record
from .database import Database, now
from .tables import processes

ENGINE, DISPATCHER = "engine", "dispatcher"
# `state` of an engine's facts; one of an earlier release tells none, and takes work. A failed one tells its `error`.
LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"
SICK = "sick"  # it drains because of its GPU, and its facts have the `reason`; Serve replaces it


@dataclass(frozen=True)
class Process:
    id: str
    kind: str
    silent_s: float  # since its newest sign
    facts: dict[str, Any]
    drain_asked: bool = False


class Processes:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def beat(self, process_id: str, kind: str, facts: Mapping[str, Any]) -> bool:
        """Note that `process_id` is alive, with its newest facts; return whether an operator asks it to drain."""
        values, mine = dict(seen_at=now(), facts=dict(facts)), processes.c.id == process_id
        with self.database.write() as connection:
            if not connection.execute(update(processes).where(mine).values(**values)).rowcount:
                connection.execute(insert(processes).values(id=process_id, kind=kind, **values))
            return connection.scalar(select(processes.c.drain_asked_at).where(mine)) is not None

    def drain(self, engine_id: str, by: Actor | None = None) -> bool:
        """Ask an engine to take no more jobs, which it reads within a second; return whether there is such an engine.

        The request ends with the process: the engine that takes its place has another id and works.
        """
        with self.database.write() as connection:
            engine = and_(processes.c.id == engine_id, processes.c.kind == ENGINE)
            asked = update(processes).where(engine, processes.c.drain_asked_at.is_(None))
            if connection.execute(asked.values(drain_asked_at=now())).rowcount:
                record(connection, by, "engine.drain", engine_id, {"draining": False}, {"draining": True})
                return True
            return connection.scalar(select(processes.c.id).where(engine)) is not None

    def leave(self, process_id: str) -> None:
        with self.database.write() as connection:
            connection.execute(delete(processes).where(processes.c.id == process_id))

    def alive(self, within_s: float = 10.0, kind: str | None = None) -> list[Process]:
        """Return the processes with a heartbeat within the last `within_s` seconds, the newest first."""
        silent = now() - processes.c.seen_at
        asked = processes.c.drain_asked_at.is_not(None)
        query = select(processes.c.id, processes.c.kind, silent.label("silent_s"), processes.c.facts, asked)
        query = query.where(processes.c.seen_at >= now() - within_s).order_by(processes.c.seen_at.desc())
        if kind is not None:
            query = query.where(processes.c.kind == kind)
        with self.database.read() as connection:
            return [Process(row[0], row[1], row[2], row[3], bool(row[4])) for row in connection.execute(query)]

    def forget(self, after_s: float) -> int:
        """Remove those that have been silent for `after_s` seconds; return their number."""
        with self.database.write() as connection:
            return connection.execute(delete(processes).where(processes.c.seen_at < now() - after_s)).rowcount
