"""The Serve application: ingress, dispatcher, engines. `build` is what `deploy/serve.yaml` imports."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from ..runtime.config import load_settings
from .api import create_app
from .config import ServeConfig
from .context import open_context
from .dispatcher import Dispatcher
from .logs import log_as_json
from .loopback import stay_on_loopback
from .placement import check_gpus, cluster_gpus, gpus_per_engine
from .replica import EngineReplica

logger = logging.getLogger(__name__)
STREAMS = 1000  # open event streams and requests of one ingress; Serve's default of 5 would be used up by five watchers


def build(arguments: dict[str, Any], engine: type[EngineReplica] = EngineReplica) -> Application:
    """The application for a `ServeConfig`'s fields; a config file's deployment options come on top."""
    config = ServeConfig(**arguments)
    asked = config.model_dump(exclude_defaults=True)
    settings, num_gpus = load_settings(), cluster_gpus()
    checked: dict[str, Any] = dict(health_check_period_s=1, health_check_timeout_s=settings.health_timeout_s)
    try:
        check_gpus(config, num_gpus, settings.memory_bytes)
    except ValueError as error:  # `skylapse serve` has refused by now, while a cluster may grow or say more
        logger.warning("%s; engines without room wait for it", error)
    engines = serve.deployment(
        name="Engine",
        num_replicas=config.engines,
        max_ongoing_requests=config.engine_slots,
        graceful_shutdown_timeout_s=config.drain_s,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": gpus_per_engine(config, num_gpus)},
        **checked,
    )(engine).bind(asked)
    dispatcher = serve.deployment(
        name="Dispatcher", graceful_shutdown_timeout_s=5, ray_actor_options={"num_cpus": 0.1}, **checked
    )(Dispatcher).bind(asked, engines)

    def answers() -> ASGIApp:
        """Made in each ingress replica; the store is all that it needs."""
        log_as_json("ingress")
        stay_on_loopback()
        return create_app(open_context(asked), behind_proxy=True)

    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.ingresses,
        max_ongoing_requests=STREAMS,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": 0.1},
        **checked,
    )(serve.ingress(answers)())
    return ingress.bind(dispatcher)  # an application is what hangs together: nothing is asked of the dispatcher
