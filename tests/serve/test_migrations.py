"""An older store becomes a newer one, whoever starts first, and a newer one serves an older release."""

from __future__ import annotations

from sqlalchemy import Connection, inspect, select, text

from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.migrations import STEPS, migrate
from skylapse.serve.store.tables import versions


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


def test_a_store_of_the_first_release_gets_what_is_new_and_keeps_its_jobs(database: Database) -> None:
    """Made as that release made it: without the columns that came later."""
    added = ("model", "variant", "revision", "fingerprint")
    store = JobStore(database)
    job = store.create("a", {"prompt": "a star"})
    with database.write() as connection:
        for name in added:
            connection.execute(text(f"alter table jobs drop column {name}"))
        connection.execute(text("delete from schema_version where version > 1"))
    assert not columns(database) & {*added}
    database.migrate()
    assert columns(database) >= {*added} and store.get("a", job.id) == job
    assert store.create("a", {"prompt": "a star"}, model="demo").model == "demo"
