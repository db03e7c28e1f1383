"""Stores for tests: SQLite in a folder, a Postgres of their own where Debian's is installed; and whole services."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from postgres import own_postgres

from skylapse.serve.intake.body import Body
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases
from skylapse.serve.wire.errors import ApiError

from .bodies import reader, refuser

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

    from .service import Service


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with own_postgres() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    from skylapse.serve.store.tables import metadata

    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/jobs.db")
    else:
        database = Database(request.getfixturevalue("postgres_url"))
        metadata.drop_all(database.engine)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database, lease_s=60.0)


@pytest.fixture(scope="session")
def demo_engine(demo_folder: Path) -> Iterator[Engine]:
    """The embedded model's engine, which all services of a test run share: it takes seconds to load."""
    from skylapse.runtime.engine.engine import Engine

    engine = Engine.from_pretrained(str(demo_folder))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """Engines of two models, `a` and `b`, that differ in their weights alone."""
    from tiny import save_small_model

    from skylapse.runtime.engine.engine import Engine

    folder = tmp_path_factory.mktemp("models")
    found = {name: Engine.from_pretrained(str(save_small_model(folder / name, seed))) for seed, name in enumerate("ab")}
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="session")
def service(demo_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that tests share; each takes a key of its own (`service.key()`), and sees no other test's videos."""
    pytest.importorskip("ray")  # whose counters a worker counts with; no part of Ray is started
    from .service import serving

    with serving(tmp_path_factory.mktemp("service"), demo_engine) as service:
        yield service


@pytest.fixture(scope="session")
def sdk_facts(
    service: Service, demo_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Facts for the programs that use OpenAI's SDKs."""
    from .sdk import sdk_facts

    with sdk_facts(service, demo_engine, tmp_path_factory.mktemp("sdk")) as facts:
        yield facts


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Body]:
    """Read a body as an ingress does."""
    return reader(tmp_path)


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., ApiError]:
    """Return the refusal that a body meets."""
    return refuser(tmp_path)
