"""Autoscaling: engines for the seconds of work that wait, none for none, and no change while the store is away."""

from __future__ import annotations

import asyncio
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import OperationalError

from skylapse.serve.deployment import autoscaling
from skylapse.serve.deployment.autoscaling import BacklogPolicy, num_engines
from skylapse.serve.store.backlog import Backlog, read_backlog
from skylapse.serve.store.database import Database, now
from skylapse.serve.store.tables import jobs


def add(database: Database, work: float, **values: Any) -> None:
    with database.write() as connection:
        sequence = len(connection.execute(jobs.select()).all()) + 1
        row = dict(id=f"video_{sequence}", sequence=sequence, tenant="a", request={}, created_at=now(), work=work)
        connection.execute(insert(jobs).values({**row, **values}))


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def context(target: int = 0) -> Any:
    return SimpleNamespace(target_num_replicas=target, current_num_replicas=target)


async def polled(policy: BacklogPolicy) -> None:
    assert policy.poll is not None
    await policy.poll


async def decide(policy: BacklogPolicy, target: int = 0) -> tuple[int, dict[str, Any]]:
    """Return the policy's answer after a poll that begins now has ended."""
    policy.polled_s = float("-inf")
    policy(context(target))
    await polled(policy)
    return policy(context(target))


@pytest.fixture
def policy(database: Database) -> Any:
    policy = BacklogPolicy(clear_in_s=10.0, database_url=url_of(database), poll_s=3600.0)
    yield policy
    policy.database.close()


def test_the_backlog_is_what_unfinished_jobs_have_left(database: Database) -> None:
    assert read_backlog(database) == Backlog(0, 0.0)
    add(database, 8.0)
    add(database, 10.0, state="in_progress", step=15, num_steps=20)
    add(database, 10.0, state="in_progress")  # its steps are not known yet
    add(database, 10.0, step=15, checkpoint_step=10, num_steps=20)  # waits again, from its checkpoint
    add(database, 99.0, state="completed", step=20, num_steps=20)
    add(database, 99.0, state="failed")
    assert read_backlog(database) == Backlog(4, pytest.approx(8.0 + 2.5 + 10.0 + 5.0))


@pytest.mark.parametrize(
    ("num_jobs", "engine_s", "wanted"),
    [(0, 0.0, 0), (1, 0.01, 1), (1, 0.0, 1), (5, 10.0, 1), (5, 10.1, 2), (5, 49.0, 5), (3, 1e9, 3), (2, 1e400, 2)],
)
def test_engines_are_as_many_as_clear_the_backlog_in_time(num_jobs: int, engine_s: float, wanted: int) -> None:
    assert num_engines(Backlog(num_jobs, engine_s), 10.0) == wanted


def test_from_none_to_some_and_back(database: Database, policy: BacklogPolicy) -> None:
    async def run() -> None:
        assert (await decide(policy))[0] == 0
        for _ in range(5):
            add(database, 5.0)
        assert await decide(policy) == (3, {"backlog_jobs": 5, "backlog_s": 25.0})
        with database.write() as connection:
            connection.execute(update(jobs).values(state="completed"))
        assert (await decide(policy, target=3))[0] == 0

    asyncio.run(run())


def test_before_the_first_answer_nothing_changes(policy: BacklogPolicy) -> None:
    async def run() -> None:
        assert policy(context(4)) == (4, {})
        await polled(policy)

    asyncio.run(run())


def test_while_the_store_is_away_nothing_changes_and_the_log_says_so_once(
    database: Database, policy: BacklogPolicy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(database: Database, queue: Any) -> Backlog:
        raise OperationalError("select", {}, Exception("connection to postgresql://a:secret@host refused"))

    async def run() -> None:
        add(database, 95.0)
        assert (await decide(policy))[0] == 1
        monkeypatch.setattr(autoscaling, "read_backlog", away)
        with caplog.at_level(logging.WARNING):
            for target in (7, 7, 0):
                assert await decide(policy, target) == (target, {})
        assert len(caplog.messages) == 1 and "OperationalError" in caplog.text and "secret" not in caplog.text
        monkeypatch.undo()
        assert (await decide(policy, 7))[0] == 1

    asyncio.run(run())


def test_a_store_that_hangs_is_asked_once_and_what_it_said_long_ago_counts_no_more(
    database: Database, policy: BacklogPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, asked = threading.Event(), []

    def hangs(database: Database, queue: Any) -> Backlog:
        asked.append(database)
        release.wait()
        return Backlog(0, 0.0)

    async def run() -> None:
        add(database, 95.0)
        assert (await decide(policy, 5))[0] == 1
        monkeypatch.setattr(autoscaling, "read_backlog", hangs)
        for _ in range(3):
            policy.polled_s = float("-inf")
            assert policy(context(5))[0] == 1  # what is known is not old
        policy.read_s -= autoscaling.STALE_S + 1
        assert policy(context(5)) == (5, {})
        release.set()
        await polled(policy)
        assert len(asked) == 1

    asyncio.run(run())


def test_polls_keep_their_distance(policy: BacklogPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(database: Database, queue: Any) -> Backlog:
        reads.append(database)
        return Backlog(0, 0.0)

    monkeypatch.setattr(autoscaling, "read_backlog", read)

    async def run() -> None:
        for _ in range(50):
            policy(context())
            await asyncio.sleep(0)
        await polled(policy)

    asyncio.run(run())
    assert len(reads) == 1


def test_the_url_comes_from_the_environment_where_the_arguments_have_none(
    monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    monkeypatch.delenv("SKYLAPSE_DATABASE_URL", raising=False)
    with pytest.raises(ValueError, match="SKYLAPSE_DATABASE_URL"):
        BacklogPolicy()
    monkeypatch.setenv("SKYLAPSE_DATABASE_URL", url_of(database))
    policy = BacklogPolicy()
    assert asyncio.run(decide(policy))[0] == 0
    policy.database.close()


@pytest.mark.parametrize("clear_in_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(clear_in_s: float) -> None:
    with pytest.raises(ValueError, match="clear_in_s"):
        BacklogPolicy(clear_in_s, "sqlite://")


@pytest.mark.parametrize("module", ["deployment.autoscaling", "autoscaling"])
def test_serve_takes_it_by_name_as_it_takes_its_own(module: str, database: Database) -> None:
    """Use it as the controller does: pickled by value, made with its arguments, called with Serve's own context.

    Manifests of earlier releases give the second name."""
    config = pytest.importorskip("ray.serve.config")
    state = pytest.importorskip("ray.serve._private.autoscaling_state")
    wrapped = pytest.importorskip("ray.serve.autoscaling_policy")._apply_autoscaling_config
    kwargs = {"clear_in_s": 10.0, "database_url": url_of(database), "poll_s": 3600.0}
    named = config.AutoscalingPolicy(policy_function=f"skylapse.serve.{module}:BacklogPolicy", policy_kwargs=kwargs)
    scaling = config.AutoscalingConfig(min_replicas=0, max_replicas=8, upscale_delay_s=0, downscale_delay_s=0)
    policy = state._resolve_policy_callable(named)
    serves = wrapped(policy)

    def serve_context(target: int) -> Any:
        fields = dict.fromkeys(("deployment_id", "app_name", "last_scale_up_time", "last_scale_down_time"))
        return config.AutoscalingContext(
            **fields,
            deployment_name="Engine",
            current_num_replicas=target,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=8,
            policy_state={},
            current_time=None,
            config=scaling,
        )

    async def run() -> None:
        for _ in range(4):
            add(database, 10.0)
        assert serves(serve_context(0))[0] == 0
        await polled(policy)
        assert serves(serve_context(0))[0] == 4
        assert serves(serve_context(6))[0] == 4

    asyncio.run(run())
    policy.database.close()
