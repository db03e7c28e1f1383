"""An older store becomes a newer one, whoever starts first, and a newer one serves an older release."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection, inspect, select, text

from skylapse.serve.accounts.keys import KeyStore, digest_of
from skylapse.serve.accounts.tenants import TenantStore
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.migrations import STEPS, migrate
from skylapse.serve.store.processes import Processes
from skylapse.serve.store.tables import metadata, versions

FIRST = Path(__file__).with_name("first_release.sql").read_text()
KEY = "sk-skylapse-of-the-first-release"


def add_a_column(connection: Connection) -> None:
    connection.execute(text("alter table jobs add column colour varchar(16) default 'red'"))


NEWER = (*STEPS, add_a_column)


def columns(database: Database) -> set[str]:
    with database.read() as connection:
        return {str(column["name"]) for column in inspect(connection).get_columns("jobs")}


def test_a_step_that_a_store_has_not_taken_is_taken_once(database: Database) -> None:
    job = JobStore(database).create("a", {"prompt": "a star"})
    for _ in range(2):
        with database.write() as connection:
            assert migrate(connection, NEWER) == len(NEWER)
    assert "colour" in columns(database)
    with database.read() as connection:
        assert list(connection.scalars(select(versions.c.version))) == [*range(1, len(NEWER) + 1)]
        assert connection.scalar(text("select colour from jobs")) == "red"
    assert JobStore(database).get("a", job.id) == job


def test_an_older_release_works_on_a_newer_store(database: Database) -> None:
    with database.write() as connection:
        migrate(connection, NEWER)
    database.migrate()
    assert JobStore(database).create("a", {"prompt": "a star"}).state == "queued"
    assert "colour" in columns(database)


def test_a_step_that_fails_leaves_the_store_as_it_was(database: Database) -> None:
    def breaks(connection: Connection) -> None:
        add_a_column(connection)
        raise RuntimeError("power loss")

    try:
        with database.write() as connection:
            migrate(connection, (*STEPS, breaks))
    except RuntimeError:
        pass
    assert "colour" not in columns(database)
    database.migrate()


@pytest.fixture
def first_store(database: Database) -> Database:
    """A store as the first release left it: its tables, a key, a job that waits, an engine."""
    metadata.drop_all(database.engine)
    with database.write() as connection:
        for statement in FIRST.replace("DIGEST", digest_of(KEY)).split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    return database


def test_a_store_of_the_first_release_gets_all_that_this_one_has(first_store: Database) -> None:
    first_store.migrate()
    first_store.migrate()
    with first_store.read() as connection:
        inspector = inspect(connection)
        for table in metadata.tables.values():
            there = {column["name"] for column in inspector.get_columns(table.name)}
            assert {column.name for column in table.columns} <= there, table.name
    keys, tenants = KeyStore(first_store), TenantStore(first_store)
    key = keys.find(KEY)
    assert key is not None and (key.tenant, key.max_priority, key.name, key.last_used_at) == ("acme", 3, None, None)
    keys.used(key.id)
    assert keys.get(key.id).last_used_at is not None
    tenants.change("acme", {"weight": 2.0})
    assert Processes(first_store).drain("old") and Processes(first_store).beat("old", "engine", {})
    (job,) = Leases(first_store).claim("engine")
    assert (job.tenant, job.request["prompt"]) == ("acme", "a star")


def test_the_first_release_works_on_a_store_of_this_one(first_store: Database) -> None:
    """During a rollout both write: what the older one inserts names no column that it does not know."""
    first_store.migrate()
    with first_store.write() as connection:
        for statement in FIRST.replace("DIGEST", "another").replace("000001'", "000002'").split(";"):
            if "INSERT INTO" in statement and "schema_version" not in statement:
                statement = statement.replace("', 1, 'acme'", "', 2, 'acme'").replace("'old'", "'older'")
                connection.exec_driver_sql(statement)
    keys, _ = KeyStore(first_store).page()
    assert len(keys) == 2 and not Processes(first_store).beat("older", "engine", {})
    assert {job.sequence for job in Leases(first_store).claim("engine", 2)} == {1, 2}
