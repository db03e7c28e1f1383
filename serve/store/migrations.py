"""How the store's tables came to be what they are, step by step, so that an older store becomes a newer one.

Replicas of two releases run side by side during a rollout, so a step only adds (a table, a column with a default) what
the release before it does not miss; what nobody reads any more is removed by a step of a later release.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, func, insert, select

from .tables import metadata, versions

Step = Callable[[Connection], None]


def _first(connection: Connection) -> None:
    """All tables of the first release."""
    metadata.create_all(connection)


STEPS: tuple[Step, ...] = (_first,)


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
