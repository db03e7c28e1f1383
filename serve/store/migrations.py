"""How the store's tables came to be what they are, step by step, so that an older store becomes a newer one.

Replicas of two releases run side by side during a rollout, so a step only adds (a table, a column with a default) what
the release before it does not miss; what nobody reads any more is removed by a step of a later release.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Table, func, insert, inspect, select, text

from .tables import jobs, metadata, versions

Step = Callable[[Connection], None]


def _first(connection: Connection) -> None:
    """All tables of the first release."""
    metadata.create_all(connection)


def _models(connection: Connection) -> None:
    """Jobs say whose they are: one of several models, by which weights."""
    add_columns(connection, jobs, "model", "variant", "revision", "fingerprint")


STEPS: tuple[Step, ...] = (_first, _models)


def add_columns(connection: Connection, table: Table, *names: str) -> None:
    """Add columns that may be null, as the table has them now; a new store has them from its first step."""
    there = {column["name"] for column in inspect(connection).get_columns(table.name)}
    for name in names:
        if name not in there:
            kind = table.c[name].type.compile(connection.dialect)
            connection.execute(text(f"alter table {table.name} add column {name} {kind}"))


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
