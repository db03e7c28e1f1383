"""The Serve application: ingress, dispatcher, engines. `build` is what `deploy/serve.yaml` imports."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from ..runtime.core.config import load_settings
from .core.config import ServeConfig
from .core.logs import log_as_json
from .core.model_entry import EngineGroup
from .core.placement import check_gpus, cluster_gpus, gpus_per_engine
from .deployment.autoscaling import BacklogPolicy
from .deployment.dispatcher import Dispatcher
from .deployment.loopback import stay_on_loopback
from .deployment.replica import EngineReplica
from .http.app import create_app
from .jobs.served_models import pin_revisions
from .jobs.services import open_context

logger = logging.getLogger(__name__)
POLICY = f"{BacklogPolicy.__module__}:{BacklogPolicy.__name__}"
ENGINE_CPUS, OTHERS_CPUS = 0.5, 0.1
STREAMS = 1000  # open event streams and requests of one ingress; Serve's default of 5 would be used up by five watchers


def build(arguments: dict[str, Any]) -> Application:
    """Build the application from a `ServeConfig`'s fields; a config file's deployment options override its own.

    Ray refuses a builder of more than one parameter, with a default or without.
    """
    return application(arguments, EngineReplica)


def application(arguments: dict[str, Any], engine: type[EngineReplica]) -> Application:
    """Build the application with engines of the given class."""
    config = pin_revisions(ServeConfig(**arguments))
    asked = config.model_dump(exclude_defaults=True)
    settings, num_gpus = load_settings(), cluster_gpus()
    checked: dict[str, Any] = dict(health_check_period_s=1, health_check_timeout_s=settings.health_timeout_s)
    try:
        check_gpus(config, num_gpus, settings.memory_bytes)
    except ValueError as error:  # `skylapse serve` has refused by now, while a cluster may grow or say more
        logger.warning("%s; engines without room wait for it", error)
    engines = {
        group.deployment: serve.deployment(
            name=group.deployment,
            max_ongoing_requests=group.engine_slots,
            graceful_shutdown_timeout_s=config.drain_s,
            ray_actor_options={"num_cpus": ENGINE_CPUS, "num_gpus": gpus_per_engine(group, num_gpus)},
            **_replicas(config, group),
            **checked,
        )(engine).bind(asked, group.deployment)
        for group in config.groups
    }
    dispatcher = serve.deployment(
        name="Dispatcher", graceful_shutdown_timeout_s=5, ray_actor_options={"num_cpus": OTHERS_CPUS}, **checked
    )(Dispatcher).bind(asked, engines)

    def answers() -> ASGIApp:
        """Create the HTTP application in each ingress replica; it needs only the store."""
        log_as_json("ingress")
        stay_on_loopback()
        return create_app(open_context(asked), behind_proxy=True)

    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.ingresses,
        max_ongoing_requests=STREAMS,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": OTHERS_CPUS},
        **checked,
    )(serve.ingress(answers)())
    return ingress.bind(dispatcher)  # an application is what hangs together: nothing is asked of the dispatcher


def cpus_of(config: ServeConfig) -> float:
    """Return the most CPUs that all parts together ask Ray for; with fewer, some parts would wait for ever."""
    engines = sum(group.max_engines for group in config.groups)
    return ENGINE_CPUS * engines + OTHERS_CPUS * (config.ingresses + 1)


def _replicas(config: ServeConfig, group: EngineGroup) -> dict[str, Any]:
    """Return the deployment options for a fixed number of engines, or for as many as the backlog needs."""
    scaling = group.autoscaling
    if scaling is None:
        return {"num_replicas": group.engines}
    queue = group.queue
    kwargs = {"clear_in_s": scaling.clear_in_s, "model": queue.model, "default": queue.is_default}
    kwargs["canary"] = queue.canary
    if not load_settings().database_url:  # which holds a password, and Serve logs these arguments
        kwargs["database_url"] = config.database
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "policy": {"policy_function": POLICY, "policy_kwargs": kwargs},
        }
    }
