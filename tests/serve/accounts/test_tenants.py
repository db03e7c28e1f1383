"""Tenants' settings in the store, and claims that weigh tenants by them."""

from __future__ import annotations

from collections import Counter

import pytest

from skylapse.runtime.engine.scheduler import Scheduler, SchedulerConfig
from skylapse.serve.accounts.tenants import Tenant, TenantStore
from skylapse.serve.store.audit import Actor, Audit
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases


@pytest.fixture
def tenants(database: Database) -> TenantStore:
    return TenantStore(database)


def claimed_one_by_one(store: JobStore, leases: Leases, count: int, ends: bool) -> Counter[str]:
    """Count the jobs of each tenant that an engine claims one by one; ends: each job ends before the next claim."""
    found: Counter[str] = Counter()
    for _ in range(count):
        (job,) = leases.claim("engine")
        found[job.tenant] += 1
        if ends:
            assert leases.complete(job, {})
    return found


def fill(store: JobStore, **counts: int) -> None:
    """Add the jobs of one tenant after those of the other: age alone would serve them in turn."""
    for tenant, count in counts.items():
        for _ in range(count):
            store.create(tenant, {}, work=10.0)


@pytest.mark.parametrize("ends", [True, False], ids=["one slot", "many slots"])
def test_claims_are_shared_by_weight(ends: bool, store: JobStore, leases: Leases, tenants: TenantStore) -> None:
    fill(store, light=16, heavy=16)
    tenants.change("heavy", {"weight": 3.0})
    assert claimed_one_by_one(store, leases, 16, ends) == {"heavy": 12, "light": 4}
    tenants.change("heavy", {"weight": None})
    tenants.change("light", {"weight": 1.0})
    shares = claimed_one_by_one(store, leases, 4, ends)
    assert shares["light"] >= 2 if ends else shares["light"] == 4  # it holds at once: three to one were running


def test_weights_of_the_environment_hold_until_the_store_has_one(
    database: Database, store: JobStore, tenants: TenantStore
) -> None:
    leases = Leases(database, weights={"heavy": 3.0})
    fill(store, light=12, heavy=12)
    assert claimed_one_by_one(store, leases, 8, True) == {"heavy": 6, "light": 2}
    tenants.change("heavy", {"weight": 1.0})
    assert claimed_one_by_one(store, leases, 8, True) == {"heavy": 4, "light": 4}


def test_a_tenant_that_was_away_does_not_catch_up(store: JobStore, leases: Leases) -> None:
    fill(store, a=10, b=10)
    assert claimed_one_by_one(store, leases, 12, True) == {"a": 6, "b": 6}
    fill(store, c=10)
    assert claimed_one_by_one(store, leases, 6, True) == {"a": 2, "b": 2, "c": 2}


def test_priority_goes_before_weight(store: JobStore, leases: Leases, tenants: TenantStore) -> None:
    tenants.change("heavy", {"weight": 100.0})
    fill(store, heavy=2)
    store.create("light", {}, priority=1)
    assert leases.claim("engine")[0].tenant == "light"


def test_a_job_that_comes_back_is_charged_once(store: JobStore, leases: Leases) -> None:
    fill(store, a=3, b=3)
    (job,) = leases.claim("engine")
    assert job.tenant == "a" and leases.release(job)
    assert leases.claim("engine")[0].tenant == "b"  # a was given its turn
    assert leases.claim("engine")[0].id == job.id


def test_settings_are_changed_one_by_one(database: Database, tenants: TenantStore) -> None:
    assert tenants.get("a") == Tenant(name="a")
    tenants.change("a", {"quota": 5}, Actor("key_1", "req_1"))
    tenants.change("a", {"weight": 2.0, "job_class": "gold"}, Actor("cli:root"))
    assert tenants.change("a", {"quota": None}) == Tenant(name="a", weight=2.0, job_class="gold")
    assert tenants.weights() == {"a": 2.0}
    rows, _ = Audit(database).page(10)
    assert [(row.actor, row.request_id, row.before, row.after) for row in rows] == [
        ("cli:root", None, {"weight": None, "class": None}, {"weight": 2.0, "class": "gold"}),
        ("key_1", "req_1", {"quota": None}, {"quota": 5}),
    ]


def test_a_scheduler_takes_new_weights_between_two_steps() -> None:
    scheduler = Scheduler(SchedulerConfig(policy="fifo", tenant_weights={"a": 2.0}))
    scheduler.weigh({"a": 2.0, "b": 4.0})
    assert scheduler.config == SchedulerConfig(policy="fifo", tenant_weights={"a": 2.0, "b": 4.0})
    with pytest.raises(ValueError, match="the weight of tenant 'c' must be a positive number, got 0"):
        scheduler.weigh({"c": 0.0})
    assert scheduler.config.tenant_weights == {"a": 2.0, "b": 4.0}
