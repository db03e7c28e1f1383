"""Migrates the store's tables of an older release to this one, step by step.

Replicas of two releases run side by side during a rollout, so a step only adds (a table, a column with a default) what
the release before it does not miss; what nobody reads any more is removed by a step of a later release.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Table, func, insert, inspect, select, text

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
    """Create all tables of the first release."""
    metadata.create_all(connection)


def _operation(connection: Connection) -> None:
    """Add tenants' settings, the audit, names and last use of keys, and requests to drain an engine."""
    metadata.create_all(connection, tables=[tenants, audit])
    add_columns(connection, api_keys, "name", "last_used_at", "managed_by")
    add_columns(connection, processes, "drain_asked_at")


def _models(connection: Connection) -> None:
    """Add the model, variant, revision and weights of jobs."""
    add_columns(connection, jobs, "model", "variant", "revision", "fingerprint")


def _accounting(connection: Connection) -> None:
    """Add the ledger of the usage of jobs, and counters that never fall."""
    metadata.create_all(connection, tables=[ledger, metrics])
    add_columns(connection, jobs, "job_class", "attempt_usage", "kept_usage", "usage")


def _traces(connection: Connection) -> None:
    """Add the traces of jobs, and the time since which they wait."""
    add_columns(connection, jobs, "trace", "queued_at")
    add_columns(connection, outbox, "trace")
    metadata.create_all(connection, tables=[job_traces])


STEPS: tuple[Step, ...] = (_first, _operation, _models, _accounting, _traces)


def add_columns(connection: Connection, table: Table, *names: str) -> None:
    """Add columns that may be null, as the table has them now; a new store has them from its first step."""
    there = {column["name"] for column in inspect(connection).get_columns(table.name)}
    for name in names:
        if name not in there:
            kind = table.c[name].type.compile(connection.dialect)
            connection.execute(text(f"alter table {table.name} add column {name} {kind}"))


def migrate(connection: Connection, steps: tuple[Step, ...] = STEPS) -> int:
    """Take the steps that this store has not taken; return its version. The caller holds the lock.

    A store of a newer release is left as it is: its steps took nothing away that this release reads.
    """
    versions.create(connection, checkfirst=True)
    version = connection.scalar(select(func.max(versions.c.version))) or 0
    for number, step in enumerate(steps, start=1):
        if number > version:
            step(connection)
            connection.execute(insert(versions).values(version=number))
    return max(version, len(steps))
