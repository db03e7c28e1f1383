"""The law of the ledger: what jobs are charged with, and what was lost, is what the engine has worked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from skylapse.serve.core.metric_definitions import BUSY_SECONDS, ENGINE_SECONDS, JOBS_ENDED, LOST_SECONDS, STEPS
from skylapse.serve.engine import worker
from skylapse.serve.engine.job_media import finished
from skylapse.serve.store.counters import VALUE, read_counters
from skylapse.serve.store.tables import jobs, ledger

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

    from ..service import Service

STEPS_OF = {"num_inference_steps": 20}
MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"cache": "fast"},
    {"guidance_scale": 1.0},
    {"num_frames": 17, "partial_images": 2},
    {"size": "80x48", "num_frames": 9, "cache": "high"},
)


@contextmanager
def clocked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds of every tick and every finish, by a clock of the test's own."""
    worked: list[float] = []

    def by_clock(work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                worked.append(time.perf_counter() - began_s)

        return timed

    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "tick", by_clock(engine._batch.tick))
        patch.setattr(worker, "finished", by_clock(finished))
        yield worked


def counted(service: Service, metric: object) -> float:
    with service.context.database.read() as connection:
        sets = dict(read_counters(connection))[metric]  # type: ignore[index]
    return sum(parts[VALUE] for parts in sets.values())


def sums(service: Service) -> dict[str, float]:
    names = ("engine_seconds", "lost_seconds", "lost_steps", "steps_computed", "steps_skipped", "jobs")
    with service.context.database.read() as connection:
        row = connection.execute(select(*(func.sum(ledger.c[name]).label(name) for name in names))).one()
    return {name: float(value) for name, value in row._mapping.items()}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_what_jobs_are_charged_with_is_what_the_engine_has_worked(
    kind: str, demo_engine: Engine, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tenants, shapes and caches side by side; some are cancelled, deleted, drained and lose their lease on the way."""
    from ..service import SMALL, serving

    config: dict[str, Any] = {"prices": {"demo": {"cpu": "0.001"}}, "checkpoint_every": 5}
    if kind == "postgres":
        from skylapse.serve.store.database import Database
        from skylapse.serve.store.tables import metadata

        config["database_url"] = request.getfixturevalue("postgres_url")
        database = Database(config["database_url"])
        metadata.drop_all(database.engine)
        database.close()
    with clocked(demo_engine, monkeypatch) as worked, serving(tmp_path, demo_engine, **config) as service:
        keys = [service.key(tenant) for tenant in ("a", "b", "c")]
        clients = [service.client(key) for key in keys]
        made = []
        for number, fields in enumerate(MIXED * 2):
            answer = clients[number % 3].post("/v1/videos", json=SMALL | STEPS_OF | {"seed": number} | fields)
            assert answer.status_code == 200, answer.text
            made.append((number % 3, answer.json()["id"]))
        _until_stepping(service, [job_id for _, job_id in made])
        clients[0].delete(f"/v1/videos/{made[0][1]}")
        clients[1].post(f"/v1/videos/{made[1][1]}/cancel")
        _take_away(service)
        for tenant, job_id in made[2:]:
            assert service.wait(keys[tenant], job_id)["status"] == "completed"
        _until_settled(service, demo_engine)
        videos = [clients[tenant].get(f"/v1/videos/{job_id}").json() for tenant, job_id in made[1:]]
        buckets = [client.get("/v1/usage").json()["data"][0] for client in clients]
        for client in clients:
            client.close()
        time_s, found = sum(worked), sums(service)
        charged_s = found["engine_seconds"]
        assert charged_s + found["lost_seconds"] == pytest.approx(time_s, rel=0.02)
        assert found["lost_steps"] > 0 and found["jobs"] == len(made)
        # what clients, bills and Prometheus are told is the same
        assert sum(bucket["engine_seconds"] for bucket in buckets) == pytest.approx(charged_s, abs=1e-4)
        deleted_s = _seconds_of(service, made[0][1])
        assert sum(v["usage"]["engine_seconds"] for v in videos) + deleted_s == pytest.approx(charged_s, abs=1e-4)
        assert counted(service, ENGINE_SECONDS) == pytest.approx(charged_s, rel=1e-9)
        assert counted(service, LOST_SECONDS) == pytest.approx(found["lost_seconds"], rel=1e-9)
        assert counted(service, STEPS) == sum(found[n] for n in ("steps_computed", "steps_skipped", "lost_steps"))
        assert counted(service, BUSY_SECONDS) == pytest.approx(time_s, rel=0.02)
        assert counted(service, JOBS_ENDED) == len(made)
        for video in videos[1:]:
            assert video["usage"]["steps_computed"] + video["usage"]["steps_skipped"] == 20, "no step is charged twice"


def _until_stepping(service: Service, job_ids: list[str]) -> None:
    def stepping() -> int:
        query = select(func.count()).where(jobs.c.id.in_(job_ids), jobs.c.step > 1, jobs.c.ended_at.is_(None))
        with service.context.database.read() as connection:
            return connection.scalar(query) or 0

    _wait(lambda: stepping() >= 3)


def _take_away(service: Service) -> None:
    """Every lease expires that is held just now, as if the engine's node could not reach the store in time."""
    from skylapse.serve.store.leases import Leases

    leases = Leases(service.context.database, max_attempts=100, ledger=service.context.ledger)
    with service.context.database.read() as connection:
        owners = list(connection.scalars(select(jobs.c.owner).where(jobs.c.state == "in_progress")))
    assert sum(len(leases.expire(owner)) for owner in owners) >= 2


def _until_settled(service: Service, engine: Engine) -> None:
    """Wait until nothing is worked on, and the engine's last second has been told."""
    _wait(lambda: not engine.is_busy)
    busy_s = counted(service, BUSY_SECONDS)
    _wait(
        lambda: counted(service, BUSY_SECONDS) > busy_s or time.monotonic() > until_s, until_s := time.monotonic() + 2.5
    )


def _seconds_of(service: Service, job_id: str) -> float:
    query = select(func.sum(ledger.c.engine_seconds)).where(ledger.c.job_id == job_id)
    with service.context.database.read() as connection:
        return float(connection.scalar(query) or 0.0)


def _wait(condition: Callable[[], bool], until_s: float | None = None) -> None:
    until_s = (until_s or time.monotonic() + 30) + 5
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)
