"""The job store: accepted jobs are kept, claims are unique, and whoever lost a lease changes nothing."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from skylapse.serve.store.database import Database, now
from skylapse.serve.store.jobs import (
    Bounds,
    IdempotencyConflict,
    Job,
    JobStore,
    NotFound,
    QuotaExceeded,
    RateExceeded,
    StoreFull,
)
from skylapse.serve.store.leases import Leases, Standing
from skylapse.serve.store.outbox import Outbox
from skylapse.serve.store.tables import jobs


def create(store: JobStore, tenant: str = "a", **fields: Any) -> Job:
    return store.create(tenant, {"prompt": "a star"}, **fields)


def claim(leases: Leases, count: int = 1, **fields: Any) -> list[Job]:
    return leases.claim("engine", count, **fields)


def lose_lease(store: JobStore, job: Job) -> None:
    """Let the lease expire, as if `lease_s` had passed since the last renewal."""
    with store.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(lease_until=now() - 1))


def at_once(count: int, run: Callable[[int], Any]) -> list[Any]:
    """The results of `run` in so many threads that start together; exceptions are results too."""
    start = threading.Barrier(count)
    results: list[Any] = [None] * count

    def thread(index: int) -> None:
        start.wait()
        try:
            results[index] = run(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=thread, args=(index,)) for index in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def test_a_job_goes_from_queued_to_completed(store: JobStore, leases: Leases) -> None:
    job = create(store, priority=2, work=1.5)
    assert (job.state, job.epoch, job.priority, job.work, job.request) == ("queued", 0, 2, 1.5, {"prompt": "a star"})
    (held,) = claim(leases)
    assert (held.id, held.state, held.epoch, held.owner) == (job.id, "in_progress", 1, "engine")
    assert leases.renew([held]) == set()
    leases.report([(held, Standing("denoise", 3, 30, 1.5))])
    assert leases.complete(held, {"video": {"key": "k", "bytes": 9, "sha256": "s"}})
    done = store.get("a", job.id)
    assert (done.state, done.step, done.num_steps, done.lease_until) == ("completed", 3, 30, None)
    assert done.artifacts == {"video": {"key": "k", "bytes": 9, "sha256": "s"}}
    assert done.created_at <= (done.started_at or 0) <= (done.ended_at or 0)


def test_a_job_survives_the_process(store: JobStore) -> None:
    job = create(store)
    url = store.database.engine.url.render_as_string(hide_password=False)
    store.database.close()
    again = Database(url)
    assert JobStore(again).get("a", job.id) == job
    again.close()


def test_a_job_is_claimed_once_by_many_at_once(store: JobStore, leases: Leases) -> None:
    made = {create(store).id for _ in range(12)}
    claimed = [job.id for found in at_once(6, lambda _: claim(leases, 4)) for job in found]
    claimed += [job.id for job in claim(leases, 12)]
    assert sorted(claimed) == sorted(made)


def test_a_quota_holds_against_creates_at_once(store: JobStore) -> None:
    results = at_once(20, lambda _: create(store, bounds=Bounds(quota=7)))
    assert sum(isinstance(result, Job) for result in results) == 7
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 13
    create(store, tenant="b", bounds=Bounds(quota=7))


def test_the_same_idempotency_key_is_the_same_job_even_at_once(store: JobStore) -> None:
    results = at_once(8, lambda _: create(store, idempotency_key=("/v1/videos", "key", "digest")))
    assert len({job.id for job in results}) == 1
    other = create(store, tenant="b", idempotency_key=("/v1/videos", "key", "digest"))
    elsewhere = create(store, idempotency_key=("/v1/videos/edits", "key", "digest"))
    assert len({results[0].id, other.id, elsewhere.id}) == 3
    with pytest.raises(IdempotencyConflict, match="this Idempotency-Key was used for another request"):
        create(store, idempotency_key=("/v1/videos", "key", "another"))


def test_whoever_lost_the_lease_changes_nothing(store: JobStore, leases: Leases) -> None:
    create(store)
    (zombie,) = claim(leases)
    lose_lease(store, zombie)
    leases.expire()
    (held,) = claim(leases)
    assert held.epoch == zombie.epoch + 1
    assert leases.renew([zombie]) == {zombie.id}
    leases.report([(zombie, Standing("denoise", 29, 30))])
    assert not leases.checkpoint(zombie, "k", 29)
    assert not leases.fail(zombie, "x", "y") and not leases.release(zombie)
    assert leases.complete(held, {"video": {"key": "right"}})
    assert not leases.complete(zombie, {"video": {"key": "wrong"}})
    done = store.get("a", held.id)
    assert done.artifacts == {"video": {"key": "right"}} and done.step == 0


def test_a_lease_that_is_renewed_does_not_expire(store: JobStore, leases: Leases) -> None:
    create(store)
    (held,) = claim(leases)
    assert leases.expire() == []
    lose_lease(store, held)
    assert leases.renew([held]) == set() and leases.expire() == []


def test_progress_never_falls(store: JobStore, leases: Leases) -> None:
    create(store)
    (held,) = claim(leases)
    for step in (5, 3, 7):
        leases.report([(held, Standing("denoise", step, 30))])
        assert store.get("a", held.id).step >= 5
    assert store.get("a", held.id).step == 7


def test_a_death_resumes_from_the_checkpoint_and_is_not_the_jobs_fault(store: JobStore, leases: Leases) -> None:
    create(store)
    (held,) = claim(leases)
    assert held.resumed_from_step is None
    leases.checkpoint(held, "jobs/1/1/state", 10)
    lose_lease(store, held)
    (late,) = leases.expire()
    assert (late.state, late.is_suspect, late.attempts) == ("queued", True, 0)
    (again,) = claim(leases)
    assert (again.checkpoint, again.resumed_from_step) == ("jobs/1/1/state", 10)


def test_a_suspect_is_tried_alone_and_only_where_nothing_else_runs(store: JobStore, leases: Leases) -> None:
    poison, good = create(store), create(store)
    for held in claim(leases, 2):
        lose_lease(store, held)
    leases.expire()
    fresh = create(store)
    for suspect in (poison, good):
        assert claim(leases, 5, is_idle=False) == []  # or a busy engine would never come to it
        assert [job.id for job in claim(leases, 5)] == [suspect.id]
    assert [job.id for job in claim(leases, 5, is_idle=False)] == [fresh.id]


def test_a_job_that_kills_its_engine_alone_fails_and_its_neighbour_does_not(store: JobStore, leases: Leases) -> None:
    leases.max_attempts = 2
    poison, good = create(store), create(store)
    for held in claim(leases, 2):  # together: nobody knows who it was
        lose_lease(store, held)
    leases.expire()
    states = []
    for _ in range(3):
        for held in claim(leases, 1):
            if held.id == good.id:
                leases.complete(held, {})
            else:
                lose_lease(store, held)
                states += [(job.state, job.attempts) for job in leases.expire()]
    assert states == [("queued", 1), ("failed", 2)]
    assert store.get("a", poison.id).error_code == "crashed"
    assert store.get("a", good.id).state == "completed"


def test_progress_past_a_checkpoint_clears_a_suspect(store: JobStore, leases: Leases) -> None:
    create(store)
    (held,) = claim(leases)
    lose_lease(store, held)
    leases.expire()
    (again,) = claim(leases)
    leases.checkpoint(again, "k", 20)
    lose_lease(store, again)
    (late,) = leases.expire()
    assert (late.attempts, late.state) == (0, "queued")


def test_a_released_job_is_queued_again_and_counts_against_nobody(store: JobStore, leases: Leases) -> None:
    create(store)
    (held,) = claim(leases)
    assert leases.release(held)
    (again,) = claim(leases)
    assert (again.attempts, again.is_suspect, again.epoch) == (0, False, 2)


def test_a_cancelled_job_has_ended_at_once_and_its_engine_has_lost_the_lease(store: JobStore, leases: Leases) -> None:
    queued, running = create(store), create(store, priority=1)
    (held,) = claim(leases)
    for job in (queued, running):
        done = store.cancel("a", job.id)
        assert (done.state, done.error_code) == ("failed", "cancelled")
    assert claim(leases) == [] and leases.lost([held]) == {running.id}
    leases.report([(held, Standing("denoise", 9, 30))])
    assert not leases.complete(held, {"video": {}}) and store.get("a", running.id).step == 0


def test_a_finished_job_is_not_cancelled(store: JobStore, leases: Leases) -> None:
    job = create(store)
    leases.complete(claim(leases)[0], {"video": {}})
    assert store.cancel("a", job.id).state == "completed"


def test_a_deleted_job_is_gone_and_its_engine_has_lost_the_lease(store: JobStore, leases: Leases) -> None:
    job = create(store, idempotency_key=("/v1/videos", "key", "digest"))
    (held,) = claim(leases)
    assert store.delete("a", job.id).id == job.id
    assert leases.renew([held]) == {held.id} and not leases.complete(held, {})
    with pytest.raises(NotFound):
        store.get("a", job.id)
    assert create(store, idempotency_key=("/v1/videos", "key", "digest")).id != job.id


def test_another_tenants_job_is_as_if_there_were_none(store: JobStore) -> None:
    job = create(store, tenant="b")
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(NotFound, match="there is no such job"):
            call("a", job.id)
    with pytest.raises(NotFound):
        store.page("a", 10, after=job.id)
    assert store.page("a", 10) == ([], False) and store.get("b", job.id).state == "queued"


@pytest.mark.parametrize("ascending", [False, True])
def test_pages_follow_the_order_of_creation_without_gaps(ascending: bool, store: JobStore) -> None:
    made = [create(store).id for _ in range(7)]
    create(store, tenant="b")
    seen: list[str] = []
    more = True
    while more:
        found, more = store.page("a", 3, after=seen[-1] if seen else None, ascending=ascending)
        seen += [job.id for job in found]
    assert seen == (made if ascending else made[::-1])


def test_jobs_created_at_once_have_an_order(store: JobStore) -> None:
    results = at_once(10, lambda index: create(store, tenant=f"t{index % 3}"))
    assert sorted(job.sequence for job in results) == list(range(1, 11))


def test_priority_then_the_tenant_with_least_running_then_age(store: JobStore, leases: Leases) -> None:
    first, second = create(store), create(store)
    other = create(store, tenant="b")
    urgent = create(store, priority=1)
    order = [claim(leases)[0].id for _ in range(4)]
    assert order == [urgent.id, other.id, first.id, second.id]


def test_migrating_at_once_is_safe(database: Database) -> None:
    assert at_once(5, lambda _: database.migrate()) == [None] * 5


def test_the_clock_is_the_databases_and_ticks_in_parts_of_a_second(database: Database) -> None:
    with database.read() as connection:
        values = [connection.scalar(select(now())) for _ in range(50)]
    times = [float(value or 0) for value in values]
    assert times == sorted(times) and 1.7e9 < times[0] < 4e9 and len(set(times)) > 1


def test_reads_wait_for_no_writer(store: JobStore) -> None:
    job = create(store)
    with store.database.write() as connection:
        connection.execute(update(jobs).values(step=5))
        assert store.get("a", job.id).step == 0
    assert store.get("a", job.id).step == 5


def test_a_transaction_that_fails_leaves_nothing(store: JobStore) -> None:
    job = create(store)
    with pytest.raises(RuntimeError), store.database.write() as connection:
        connection.execute(update(jobs).values(step=5))
        raise RuntimeError
    assert store.get("a", job.id) == job


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="the store must be sqlite or postgresql, got mysql"):
        Database("mysql://localhost/jobs")


def test_a_job_is_a_value(store: JobStore) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        create(store).state = "completed"  # type: ignore[misc]


def test_jobs_are_made_at_most_so_often_in_a_minute(store: JobStore) -> None:
    results = at_once(6, lambda _: create(store, bounds=Bounds(per_minute=4)))
    assert sum(isinstance(result, RateExceeded) for result in results) in (0, 1, 2)  # 2, unless a minute has just begun
    create(store, tenant="b", bounds=Bounds(per_minute=4))


def test_all_tenants_together_have_a_bound(store: JobStore) -> None:
    create(store)
    create(store, tenant="b", bounds=Bounds(max_queued=2))
    with pytest.raises(StoreFull):
        create(store, tenant="c", bounds=Bounds(max_queued=2))


def test_every_change_that_a_client_sees_has_a_version(store: JobStore, leases: Leases) -> None:
    job = create(store)
    seen = {job.id: job.version, "video_gone": 3}
    assert store.changed(seen) == ([], {"video_gone"})
    (held,) = claim(leases)
    leases.report([(held, Standing("denoise", 1, 30))])
    leases.preview(held, {"key": "k"})
    (newer,), _ = store.changed(seen)
    assert (newer.version, newer.step, newer.preview) == (3, 1, {"key": "k"})
    leases.complete(held, {})
    assert store.changed({job.id: 3})[0][0].version == 4 and store.changed({job.id: 4})[0] == []


def test_a_jobs_position_counts_who_goes_before(store: JobStore) -> None:
    first, second, urgent = create(store), create(store), create(store, priority=5)
    assert [store.position(job) for job in (urgent, first, second)] == [0, 1, 2]


def test_a_death_that_was_seen_needs_no_lease_to_expire(store: JobStore, leases: Leases) -> None:
    mine, other = create(store), create(store)
    leases.claim("dead"), leases.claim("alive")
    assert [job.id for job in leases.expire("dead")] == [mine.id]
    assert store.get("a", other.id).state == "in_progress"


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "crash"])
def test_the_end_of_a_job_puts_its_event_into_the_outbox(how: str, store: JobStore, leases: Leases) -> None:
    job = create(store, webhook_url="https://example.com/hook")
    create(store, priority=-1)  # of no interest to anybody
    (held,) = claim(leases)
    if how == "cancel":
        store.cancel("a", job.id)
    elif how == "crash":
        leases.max_attempts = 1
        lose_lease(store, held)
        leases.expire()
        lose_lease(store, claim(leases)[0])
        leases.expire()
    else:
        assert leases.complete(held, {}) if how == "complete" else leases.fail(held, "x", "y")
    assert not leases.complete(held, {})
    (delivery,) = Outbox(store.database).claim(5, 10.0)
    wanted = "video.completed" if how == "complete" else "video.failed"
    assert (delivery.job_id, json.loads(delivery.body)["type"]) == (job.id, wanted)
