"""What every part of the service stands on: its configuration, store and artifacts, opened once a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.config import load_settings
from .artifacts import ArtifactStore
from .config import ServeConfig
from .store.database import Database
from .store.jobs import JobStore
from .store.keys import SCOPES, KeyStore
from .store.processes import Processes
from .store.sessions import Sessions
from .tracing import Tracer, open_tracer

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
    tracer: Tracer | None  # None: no traces are wanted


def open_context(arguments: Mapping[str, Any] | ServeConfig) -> Context:
    """ValueError (pydantic's) for what is no configuration; the store's tables are brought up to date.

    Secrets come from the environment where the configuration, which a cluster's dashboard shows, has none.
    """
    config = arguments if isinstance(arguments, ServeConfig) else ServeConfig(**arguments)
    settings = load_settings()
    if not config.database_url and settings.database_url:
        config = config.model_copy(update={"database_url": settings.database_url})
    if not config.webhook_secret and settings.webhook_secret:
        config = config.model_copy(update={"webhook_secret": settings.webhook_secret})
    config.folder.mkdir(parents=True, exist_ok=True)
    database = Database(config.database)
    database.migrate()
    keys = KeyStore(database)
    if settings.api_key:
        keys.ensure(TENANT, settings.api_key, SCOPES, MAX_PRIORITY)
    artifacts = ArtifactStore(config.artifacts, **config.artifacts_options)
    return Context(
        config,
        database,
        JobStore(database),
        keys,
        Sessions(database),
        Processes(database),
        artifacts,
        open_tracer(),
    )
