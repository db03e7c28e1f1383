"""How the store's tables came to be what they are, step by step, so that an older store becomes a newer one.

Replicas of two releases run side by side during a rollout, so a step only adds (a table, a column with a default) what
the release before it does not miss; what nobody reads any more is removed by a step of a later release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Column, Connection, func, insert, inspect, select, text

from .tables import (
    api_keys,
    audit,
    job_traces,
    jobs,
    ledger,
    metadata,
    metrics,
    outbox,
    processes,
    tenants,
    versions,
)

Step = Callable[[Connection], None]


def _first(connection: Connection) -> None:
    """All tables of the first release."""
    metadata.create_all(connection)


def _operation(connection: Connection) -> None:
    """Settings of tenants, the audit, named keys that tell of their use, engines that are asked to drain."""
    metadata.create_all(connection, tables=[tenants, audit])
    for column in (api_keys.c.name, api_keys.c.last_used_at, api_keys.c.managed_by, processes.c.drain_asked_at):
        add_column(connection, column)


def _accounting(connection: Connection) -> None:
    """The ledger of what jobs have used, and counters that never fall."""
    metadata.create_all(connection, tables=[ledger, metrics])
    for column in (jobs.c.job_class, jobs.c.attempt_usage, jobs.c.kept_usage, jobs.c.usage):
        add_column(connection, column)


def _traces(connection: Connection) -> None:
    """Jobs keep where their trace begins, and since when they wait."""
    for column in (jobs.c.trace, jobs.c.queued_at, outbox.c.trace):
        add_column(connection, column)
    metadata.create_all(connection, tables=[job_traces])


STEPS: tuple[Step, ...] = (_first, _operation, _accounting, _traces)


def add_column(connection: Connection, column: Column[Any]) -> None:
    """Add a column that may be null to its table, unless a new store's first step has made it."""
    table = column.table.name
    if column.name not in {found["name"] for found in inspect(connection).get_columns(table)}:
        kind = column.type.compile(connection.dialect)
        connection.execute(text(f"alter table {table} add column {column.name} {kind}"))


def migrate(connection: Connection, steps: tuple[Step, ...] = STEPS) -> int:
    """Take the steps that this store has not taken; returns its version. The caller holds the lock.

    A store of a newer release is left as it is: its steps took nothing away that this release reads.
    """
    versions.create(connection, checkfirst=True)
    version = connection.scalar(select(func.max(versions.c.version))) or 0
    for number, step in enumerate(steps, start=1):
        if number > version:
            step(connection)
            connection.execute(insert(versions).values(version=number))
    return max(version, len(steps))
