"""The shared parts of the service: its configuration, store and artifacts, opened once in each process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.core.config import load_settings
from ..accounts.all_jobs import AllJobs
from ..accounts.keys import ENVIRONMENT, TENANT_SCOPES, KeyStore
from ..accounts.sessions import Sessions
from ..accounts.tenants import TenantStore
from ..core.config import ServeConfig
from ..core.private import make_folder
from ..store.audit import Audit
from ..store.database import Database
from ..store.jobs import JobStore
from ..store.ledger import Ledger
from ..store.processes import Processes
from ..telemetry.tracing import Tracer, open_tracer
from .artifacts import ArtifactStore

TENANT, MAX_PRIORITY = "local", 100  # of the operator's own key, SKYLAPSE_API_KEY


@dataclass(frozen=True)
class Context:
    config: ServeConfig
    database: Database
    jobs: JobStore
    keys: KeyStore
    sessions: Sessions
    processes: Processes
    artifacts: ArtifactStore
    tenants: TenantStore
    all_jobs: AllJobs
    audit: Audit
    ledger: Ledger
    tenant_weights: Mapping[str, float]  # of those for which the store has none
    tracer: Tracer | None = None  # None: no traces are wanted


def open_context(arguments: Mapping[str, Any] | ServeConfig) -> Context:
    """Open everything and bring the store's tables up to date. Raises pydantic's ValueError for a wrong configuration.

    Secrets come from the environment where the configuration, which a cluster's dashboard shows, has none.
    """
    config = with_secrets(arguments if isinstance(arguments, ServeConfig) else ServeConfig(**arguments))
    tracer = open_tracer()  # before anything is made: a variable of its may be wrong
    make_folder(config.folder)
    make_folder(config.scratch, is_ours=True)
    database = Database(config.database)
    database.migrate()
    context = stand_on(config, database, tracer)
    context.artifacts.prepare()
    if api_key := load_settings().api_key:
        context.keys.manage(ENVIRONMENT, api_key, TENANT, TENANT_SCOPES, MAX_PRIORITY)
    return context


def with_secrets(config: ServeConfig) -> ServeConfig:
    """Return the configuration with the environment's secrets filled in where it has none."""
    settings = load_settings()
    if not config.database_url and settings.database_url:
        config = config.model_copy(update={"database_url": settings.database_url})
    if not config.webhook_secret and settings.webhook_secret:
        config = config.model_copy(update={"webhook_secret": settings.webhook_secret})
    return config


def stand_on(config: ServeConfig, database: Database, tracer: Tracer | None = None) -> Context:
    """Return the context of a store that is already open; nothing is made, and nothing is changed."""
    ledger = Ledger(config.price_list)
    return Context(
        config,
        database,
        JobStore(database, ledger),
        KeyStore(database),
        Sessions(database),
        Processes(database),
        ArtifactStore(config.artifacts, **config.artifacts_options),
        TenantStore(database),
        AllJobs(database),
        Audit(database),
        ledger,
        load_settings().tenant_weights,
        tracer,
    )
