"""An older store becomes a newer one, whoever starts first, and a newer one serves an older release."""

from __future__ import annotations

from sqlalchemy import Connection, func, inspect, select, text

from skylapse.runtime.usage import Usage
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.ledger import Used
from skylapse.serve.store.migrations import STEPS, migrate
from skylapse.serve.store.tables import ledger, versions


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


def as_the_release_before(database: Database) -> None:
    """The store without the ledger, the counters and what rows tell of them."""
    with database.write() as connection:
        for table in ("ledger", "metrics"):
            connection.execute(text(f"drop table {table}"))
        for column in ("job_class", "attempt_usage", "kept_usage", "usage"):
            connection.execute(text(f"alter table jobs drop column {column}"))
        connection.execute(text("delete from schema_version where version > 1"))


def test_a_store_of_the_release_before_gets_a_ledger_and_keeps_its_jobs(database: Database) -> None:
    store, leases = JobStore(database), Leases(database)
    waits, runs = (store.create("a", {"prompt": "a star", "model": "demo"}) for _ in range(2))
    as_the_release_before(database)
    for _ in range(2):
        database.migrate()
    assert {"job_class", "attempt_usage", "kept_usage", "usage"} <= columns(database)
    assert store.get("a", waits.id).usage is None
    for job in leases.claim("an engine", count=2):
        assert leases.complete(job, {}, Used(Usage(1.0, 2, 1), "cpu"))
    usage = store.get("a", runs.id).usage
    assert usage is not None and usage["engine_seconds"] == 1.0
    with database.read() as connection:
        assert connection.scalar(select(func.sum(ledger.c.jobs))) == 2
        assert set(connection.scalars(select(ledger.c.job_class))) == {"default"}
