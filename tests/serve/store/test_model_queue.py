"""Engines claim their own model's jobs, and no clip is made by two models' weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import update

from skylapse.serve.core.model_entry import is_of_canary
from skylapse.serve.store.database import Database, now
from skylapse.serve.store.jobs import Job, JobStore
from skylapse.serve.store.leases import Leases, Weights
from skylapse.serve.store.model_queue import ModelQueue
from skylapse.serve.store.tables import jobs

if TYPE_CHECKING:
    pass


def create(store: JobStore, model: str | None, variant: str | None = None, **fields: Any) -> Job:
    return store.create("a", {"prompt": "a star"}, model=model, variant=variant, **fields)


def test_engines_claim_what_is_theirs(store: JobStore, leases: Leases) -> None:
    """Jobs without a model are of a release that served one: the first model's."""
    made = {model: create(store, model).id for model in (None, "a", "b")}
    first, second = ModelQueue("a", is_default=True), ModelQueue("b")
    assert leases.loads("x", [first, second]) == [(2, 0), (1, 0)]
    assert [job.id for job in leases.claim("x", 9, queue=second)] == [made["b"]]
    assert leases.claim("x", 9, queue=second) == []
    assert leases.loads("x", [first, second]) == [(2, 0), (0, 1)]
    assert {job.id for job in leases.claim("x", 9, queue=first)} == {made[None], made["a"]}


def test_a_suspect_of_one_model_holds_up_no_other(store: JobStore, leases: Leases) -> None:
    create(store, "a")
    leases.claim("dead", queue=ModelQueue("a"))
    leases.expire("dead")
    good = create(store, "b")
    assert leases.claim("x", 1, is_idle=False, queue=ModelQueue("a")) == []
    assert [job.id for job in leases.claim("x", 1, is_idle=False, queue=ModelQueue("b"))] == [good.id]


def test_a_tenants_jobs_of_one_model_cost_it_no_turn_at_another(store: JobStore, leases: Leases) -> None:
    for _ in range(3):
        create(store, "a")
    leases.claim("x", 3, queue=ModelQueue("a"))
    first = create(store, "b")
    store.create("z", {}, model="b")
    assert leases.claim("x", 1, queue=ModelQueue("b"))[0].id == first.id


def test_a_job_that_other_weights_have_begun_begins_again(store: JobStore, leases: Leases) -> None:
    job = create(store, "a", revision="made for")
    (held,) = leases.claim("x", weights=Weights("old", "r1"))
    assert (held.fingerprint, held.revision, held.resumed_from_step) == ("old", "r1", None)
    leases.checkpoint(held, "key", 10)
    leases.release(held)
    (again,) = leases.claim("x", weights=Weights("old", "r1"))
    assert (again.checkpoint, again.resumed_from_step) == ("key", 10)
    leases.release(again)
    (other,) = leases.claim("x", weights=Weights("new", None))
    assert (other.id, other.fingerprint, other.revision) == (job.id, "new", None)
    assert (other.checkpoint, other.checkpoint_step, other.resumed_from_step) == (None, 0, None)


def test_a_checkpoint_of_an_older_release_is_left_to_the_engine(store: JobStore, leases: Leases) -> None:
    """Its row tells of no weights; the checkpoint itself does."""
    create(store, None)
    (held,) = leases.claim("x")
    leases.checkpoint(held, "key", 10)
    leases.release(held)
    (again,) = leases.claim("x", queue=ModelQueue("a", is_default=True), weights=Weights("new"))
    assert (again.checkpoint, again.resumed_from_step, again.fingerprint) == ("key", 10, "new")


def test_a_canarys_jobs_are_its_own_until_it_is_taken_back(store: JobStore, leases: Leases) -> None:
    stable, canary = create(store, "a"), create(store, "a", "canary")
    assert leases.loads("x", [ModelQueue("a", True, False), ModelQueue("a", True, True)]) == [(1, 0), (1, 0)]
    (held,) = leases.claim("x", 9, queue=ModelQueue("a", True, True), weights=Weights("second"))
    assert held.id == canary.id
    leases.checkpoint(held, "key", 10)
    leases.release(held)
    taken = leases.claim("x", 9, queue=ModelQueue("a", True, None), weights=Weights("first"))
    assert {job.id for job in taken} == {stable.id, canary.id}
    assert {(job.fingerprint, job.checkpoint) for job in taken} == {("first", None)}


def test_shares_of_a_canary_are_kept_by_a_hash_of_the_id() -> None:
    ids = [f"video_{number:032x}" for number in range(4000)]
    share = sum(is_of_canary(job_id, 0.1) for job_id in ids) / len(ids)
    assert 0.08 < share < 0.12
    assert all(is_of_canary(job_id, 0.3) for job_id in ids if is_of_canary(job_id, 0.1)), "a greater share holds it"


def test_jobs_of_a_model_that_nobody_serves_fail_after_a_while(store: JobStore) -> None:
    lost, served, young, older = (create(store, model) for model in ("gone", "a", "gone", None))
    with store.database.write() as connection:
        old = update(jobs).where(jobs.c.id != young.id)
        connection.execute(old.values(created_at=now() - 7200))
    assert store.fail_unserved(["a"], 3600.0) == [lost.id]
    failed = store.get("a", lost.id)
    assert (failed.state, failed.error_code) == ("failed", "model_not_found")
    assert {store.get("a", job.id).state for job in (served, young, older)} == {"queued"}


def test_stores_of_the_release_before_have_jobs_of_the_first_model(database: Database) -> None:
    """Rows that it writes while both run, too."""
    job = JobStore(database).create("a", {"prompt": "a star"})
    assert (job.model, job.variant, job.fingerprint) == (None, None, None)
    (held,) = Leases(database).claim("x", queue=ModelQueue("anything", is_default=True))
    assert held.id == job.id
