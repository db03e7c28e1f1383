"""The database, SQLite or Postgres, behind one interface; time is the database's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Float, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ..core.private import restrict
from .migrations import migrate

MIGRATION_LOCK = 0x5C71A95E  # of Postgres' advisory locks: any number that nobody else takes
SQLITE_WAIT_S = 10
POSTGRES_WAIT_S = 5  # for a connection; a server that is away answers at once, one that hangs does not
POOL = 16  # connections that are kept; an ingress answers in 40 threads


class now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock; a lease must not depend on whose machine looks at it."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgres_now(element: Any, compiler: Any, **options: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """A pool of connections; `url` is SQLAlchemy's, "sqlite:///file" or "postgresql+psycopg://..."."""

    def __init__(self, url: str) -> None:
        kind = make_url(url).get_backend_name()
        if kind not in ("sqlite", "postgresql"):
            raise ValueError(f"the store must be sqlite or postgresql, got {kind}")
        self.url, self.is_sqlite = url, kind == "sqlite"
        if self.is_sqlite:
            _make_private(make_url(url).database)
            options: dict[str, Any] = {"connect_args": {"timeout": SQLITE_WAIT_S}}
        else:
            options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": POSTGRES_WAIT_S}}
        self.engine: Engine = create_engine(url, pool_size=POOL, max_overflow=POOL, **options)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_immediate)

    def migrate(self) -> None:
        """Bring the tables up to date, under one lock for all processes that start at once."""
        with self.write() as connection:  # SQLite: the write lock itself
            if not self.is_sqlite:
                connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            migrate(connection)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that commits at the end; on SQLite no other one writes meanwhile."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection whose reads see all that is committed, and wait for no writer."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def lock(self, connection: Connection, name: str) -> None:
        """Wait within a transaction for others that hold this name; SQLite's writers are alone anyway."""
        if not self.is_sqlite:
            connection.execute(text("select pg_advisory_xact_lock(hashtext(:name))"), {"name": name})

    def insert_missing(self, connection: Connection, table: Table, **values: Any) -> None:
        """Add a row unless there is one of the same key, whoever else adds it at the same time."""
        added = sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)
        connection.execute(added.values(**values).on_conflict_do_nothing())

    def close(self) -> None:
        self.engine.dispose()


def _make_private(path: str | None) -> None:
    """Make SQLite's file private first: SQLite gives the files that it writes beside it the same rights."""
    if path is None or path in ("", ":memory:") or path.startswith("file:"):
        return
    with suppress(FileExistsError, FileNotFoundError):  # a folder that is missing is told by SQLite
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    for suffix in ("", "-wal", "-shm"):
        restrict(Path(path + suffix))


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred: two readers that then write would deadlock
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
