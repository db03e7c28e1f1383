"""A job's usage is written with its end, whoever ends it and however, and no row is ever altered."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, select, text

from skylapse.runtime.core.usage import Usage
from skylapse.serve.core.metric_definitions import ENGINE_SECONDS, JOBS_ENDED, LOST_SECONDS, STEPS
from skylapse.serve.core.prices import Prices
from skylapse.serve.store.counters import VALUE, read_counters
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import Job, JobStore
from skylapse.serve.store.leases import Leases, Standing
from skylapse.serve.store.ledger import Ledger, Used
from skylapse.serve.store.tables import jobs, ledger

PRICES = Prices({"demo": {"cpu": Decimal("0.001")}}, "EUR")
REQUEST = {"prompt": "a star", "model": "sora-2", "num_frames": 17, "seconds": "2.125"}


@pytest.fixture
def books(database: Database) -> Ledger:
    return Ledger(PRICES)


@pytest.fixture
def store(database: Database, books: Ledger) -> JobStore:
    return JobStore(database, books)


@pytest.fixture
def leases(database: Database, books: Ledger) -> Leases:
    return Leases(database, lease_s=60.0, max_attempts=2, ledger=books)


def used(seconds: float, computed: int = 0, skipped: int = 0) -> Used:
    return Used(Usage(seconds, 2 * computed, computed, skipped), "cpu")


def begun(store: JobStore, leases: Leases, owner: str = "engine") -> Job:
    store.create("a", REQUEST, model="demo", job_class="gold")
    (job,) = leases.claim(owner)
    return job


def rows(database: Database) -> list[dict[str, Any]]:
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(select(ledger).order_by(ledger.c.id))]


def value(database: Database, metric: object, *labels: str) -> float:
    with database.read() as connection:
        return dict(read_counters(connection))[metric].get(labels, {}).get(VALUE, 0.0)  # type: ignore[index]


def total(database: Database, name: str = "engine_seconds") -> float:
    with database.read() as connection:
        return float(connection.scalar(select(func.sum(ledger.c[name]))) or 0.0)


def test_a_completed_job_is_charged_with_what_its_engine_told_last(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.report([(job, Standing("denoise", 3, 10))], [(job, used(1.0, 3))])
    assert leases.complete(job, {}, used(3.1, 8, 2))
    (row,) = rows(database)
    assert (row["tenant"], row["model"], row["job_class"], row["reason"]) == ("a", "demo", "gold", "completed")
    assert (row["engine_seconds"], row["evaluations"], row["steps_computed"], row["steps_skipped"]) == (3.1, 16, 8, 2)
    assert (row["jobs"], row["completed"], row["frames"], row["video_seconds"]) == (1, 1, 17, 2.125)
    assert (row["cost_nanos"], row["currency"]) == (3_100_000, "EUR")
    assert store.get("a", job.id).usage == {
        "engine_seconds": 3.1,
        "evaluations": 16,
        "steps_computed": 8,
        "steps_skipped": 2,
        "device": "cpu",
        "frames": 17,
        "cost_nanos": 3_100_000,
        "currency": "EUR",
    }
    assert value(database, ENGINE_SECONDS, "demo", "gold") == 3.1
    assert value(database, JOBS_ENDED, "demo", "completed", "gold") == 1
    assert not leases.complete(job, {}, used(9.0, 9)) and len(rows(database)) == 1


@pytest.mark.parametrize("ending", ["cancel", "delete", "fail"])
def test_a_job_that_ends_early_is_charged_with_what_it_had_used(
    ending: str, store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.report([], [(job, used(2.0, 4))])
    if ending == "fail":
        leases.fail(job, "not_finite", "NaN")
    else:
        getattr(store, ending)("a", job.id)
    (row,) = rows(database)
    assert (row["engine_seconds"], row["jobs"], row["completed"], row["frames"]) == (2.0, 1, 0, 0)
    assert row["reason"] == {"cancel": "cancelled", "delete": "deleted", "fail": "not_finite"}[ending]
    outcome = "not_finite" if ending == "fail" else "cancelled"
    assert value(database, JOBS_ENDED, "demo", outcome, "gold") == 1


def test_a_job_that_never_ran_has_used_nothing(store: JobStore, database: Database) -> None:
    job = store.create("a", REQUEST, model="demo")
    cancelled = store.cancel("a", job.id)
    assert cancelled.usage is not None and cancelled.usage["engine_seconds"] == 0 and cancelled.usage["device"] is None
    store.delete("a", job.id)
    (row,) = rows(database)
    assert (row["engine_seconds"], row["jobs"], row["device"], row["cost_nanos"]) == (0.0, 1, None, None)


def test_deleting_an_ended_job_leaves_its_bill_and_the_counters(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.complete(job, {}, used(3.0, 5))
    before = rows(database)
    store.delete("a", job.id)
    assert rows(database) == before
    assert value(database, JOBS_ENDED, "demo", "completed", "gold") == 1


def test_steps_behind_a_checkpoint_are_the_tenants_and_those_after_it_are_lost(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.checkpoint(job, "jobs/x/1/checkpoint-5", 5, used(5.0, 5))
    leases.report([], [(job, used(8.0, 7, 1))])
    leases.expire("engine")
    (row,) = rows(database)
    assert (row["reason"], row["jobs"], row["engine_seconds"], row["steps_computed"]) == ("taken_back", 0, 5.0, 5)
    assert (row["lost_seconds"], row["lost_steps"]) == (3.0, 3)
    assert value(database, STEPS, "demo", "lost") == 3 and value(database, LOST_SECONDS, "demo") == 3.0
    assert value(database, ENGINE_SECONDS, "demo", "gold") == 0  # it is counted with the job's end
    (again,) = leases.claim("another")
    leases.complete(again, {}, used(6.0, 5))
    usage = store.get("a", job.id).usage
    assert usage is not None and (usage["engine_seconds"], usage["steps_computed"]) == (11.0, 10)
    assert usage["cost_nanos"] == 11_000_000
    assert value(database, ENGINE_SECONDS, "demo", "gold") == total(database) == 11.0
    assert value(database, STEPS, "demo", "computed") == 10


def test_a_job_that_crashes_engines_pays_for_its_checkpoints_alone(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.report([], [(job, used(4.0, 2))])
    leases.expire("engine")
    for owner in ("second", "third"):
        (job,) = leases.claim(owner)
        leases.report([], [(job, used(4.0, 2))])
        leases.expire(owner)
    ended = store.get("a", job.id)
    assert ended.error_code == "crashed" and ended.usage is not None and ended.usage["engine_seconds"] == 0
    assert [row["reason"] for row in rows(database)] == ["taken_back", "taken_back", "crashed"]
    assert (total(database), total(database, "lost_seconds"), total(database, "lost_steps")) == (0.0, 12.0, 6)
    assert value(database, JOBS_ENDED, "demo", "crashed", "gold") == 1


def test_a_job_that_goes_on_from_nothing_is_not_charged_twice(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.checkpoint(job, "jobs/x/1/checkpoint-5", 5, used(5.0, 5))
    leases.report([], [(job, used(5.0, 5))])
    leases.release(job)
    (again,) = leases.claim("of a new release")
    assert leases.restart(again)
    leases.complete(again, {}, used(10.0, 10))
    usage = store.get("a", job.id).usage
    assert usage is not None and (usage["engine_seconds"], usage["steps_computed"]) == (10.0, 10)
    assert usage["cost_nanos"] == 10_000_000 == total(database, "cost_nanos")
    assert (total(database), total(database, "lost_seconds"), total(database, "lost_steps")) == (10.0, 5.0, 5)
    assert value(database, ENGINE_SECONDS, "demo", "gold") == 10.0


@pytest.mark.parametrize("ending", ["cancel", "delete"])
def test_the_step_that_ran_when_a_job_was_ended_is_charged_later(
    ending: str, store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.report([], [(job, used(2.0, 4))])
    getattr(store, ending)("a", job.id)
    for _ in range(2):  # the second time changes nothing
        leases.settle(job, used(2.5, 5))
    first, second = rows(database)
    assert (second["reason"], second["jobs"], second["engine_seconds"], second["steps_computed"]) == ("late", 0, 0.5, 1)
    assert second["cost_nanos"] == 500_000 and first["epoch"] == second["epoch"]
    assert value(database, ENGINE_SECONDS, "demo", "gold") == total(database) == 2.5
    if ending == "cancel":
        usage = store.get("a", job.id).usage
        assert usage is not None and (usage["engine_seconds"], usage["cost_nanos"]) == (2.5, 2_500_000)


def test_what_an_engine_does_after_it_lost_its_lease_is_lost(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.checkpoint(job, "jobs/x/1/checkpoint-5", 5, used(5.0, 5))
    leases.expire("engine")
    (again,) = leases.claim("another")
    leases.settle(job, used(9.0, 9))
    assert (total(database), total(database, "lost_seconds"), total(database, "lost_steps")) == (0.0, 9.0, 9)
    leases.complete(again, {}, used(10.0, 10))
    assert total(database) == 10.0


def test_a_lease_that_is_still_held_is_only_told(store: JobStore, leases: Leases, database: Database) -> None:
    job = begun(store, leases)
    leases.settle(job, used(1.0, 1))
    assert rows(database) == []
    store.cancel("a", job.id)
    assert total(database) == 1.0


def test_what_an_earlier_release_took_back_is_written_at_the_next_claim(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    leases.report([], [(job, used(4.0, 4))])
    with database.write() as connection:  # its expire() knows nothing of usage
        connection.execute(text("update jobs set state = 'queued', owner = null, lease_until = null"))
    (again,) = leases.claim("another")
    (row,) = rows(database)
    assert (row["epoch"], row["reason"], row["lost_seconds"]) == (1, "taken_back", 4.0)
    assert again.attempt_usage is None
    leases.complete(again, {}, used(5.0, 5))
    assert total(database) == 5.0


def test_what_an_earlier_release_deleted_is_charged_when_its_engine_tells(
    store: JobStore, leases: Leases, database: Database
) -> None:
    job = begun(store, leases)
    with database.write() as connection:
        connection.execute(jobs.delete())
    leases.settle(job, used(4.0, 4))
    assert total(database) == 4.0


def test_the_price_is_that_of_the_time_of_use(store: JobStore, leases: Leases, database: Database) -> None:
    leases.complete(begun(store, leases), {}, used(1.0))
    leases.ledger = Ledger(Prices({"*": {"cpu": Decimal("0.1"), "cuda": Decimal("2")}}, "EUR"))
    leases.complete(begun(store, leases), {}, used(1.0))
    leases.ledger = Ledger()
    leases.complete(begun(store, leases), {}, used(1.0))
    assert [row["cost_nanos"] for row in rows(database)] == [1_000_000, 100_000_000, None]


def test_a_day_ends_at_midnight_utc(store: JobStore, leases: Leases, database: Database) -> None:
    leases.complete(begun(store, leases), {}, used(1.0))
    with database.read() as connection:
        day = "strftime('%Y-%m-%d', 'now')" if database.is_sqlite else "to_char(now() at time zone 'utc', 'YYYY-MM-DD')"
        assert rows(database)[0]["day"] == connection.scalar(text(f"select {day}"))
