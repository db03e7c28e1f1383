"""Ray and the Serve application of one machine: started on the loopback, asked for their status, stopped."""

from __future__ import annotations

import io
import logging
import math
import os
import re
from typing import TYPE_CHECKING

from ...runtime.core.config import Settings, export
from ..core.config import ServeConfig
from .ray_session import RaySession

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

APPLICATION = "skylapse"
OBJECT_STORE_BYTES = 80 * 2**20  # clips go through the artifact store: Ray carries job ids alone

# The images and pods set the same (tests/serve/deployment/test_manifests.py). A process that has died is noticed at its
# next check, whatever the timeout: a proxy is replaced after 3 of them, which Serve by default makes every 10 s. A
# timeout is for one that lives and does not answer, as on a machine with 14 runnable threads a core: 2 s killed it.
RAY = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "skylapse.serve.deployment.proxy_middleware.middlewares",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # it binds all addresses, and ends long requests when it reloads
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none; by default, all of them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: a neighbour takes 28 times as much of a core as who answers clients
    "RAY_health_check_failure_threshold": "20",  # of a node, every 3 s; 5 by default
    "RAY_worker_register_timeout_seconds": "300",  # 60 by default: imports of torch on a starved machine take longer
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOOPBACK = "127.0.0.1"
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: Ray takes 127.0.0.1 for its node's address
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # its chatter stays in Ray's folder; what counts comes by our own lines
}


class LocalService:
    """The service. Ray is imported by `start`, since that takes seconds."""

    def __init__(self, config: ServeConfig, settings: Settings, session: RaySession) -> None:
        self.config, self.settings, self.session = config, settings, session

    def start(self, host: str, port: int) -> None:
        """Begin the start; `status` tells its progress. Raises ValueError if the engines do not fit the machine."""
        export(RAY | ONE_MACHINE | self.session.variables)
        import ray
        from ray import serve

        from ..app import build, cpus_of
        from ..core.placement import check_gpus, cluster_gpus

        quieten()
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 2, math.ceil(cpus_of(self.config))),  # counted: they share what there is
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(self.session.folder),
        )
        check_gpus(self.config, cluster_gpus(), self.settings.memory_bytes)
        serve.start(http_options={"host": host, "port": port}, logging_config={"enable_access_log": False})
        application = build(self.config.model_dump(exclude_defaults=True))
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def status(self) -> ServeStatus:
        """Return the controller's status of application, deployments and proxies; raises while it is away."""
        from ray import serve

        return serve.status()

    def stop(self) -> None:
        """End all processes, and remove what Ray has written."""
        import ray
        from ray import serve

        logging.getLogger("ray").setLevel(logging.CRITICAL)  # that what is ended has ended
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def quieten() -> None:
    """Let Ray's loggers in this process report warnings and errors only, as lines of our log."""
    ours = logging.getLogger("skylapse")
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers = list(ours.handlers)
        logger.propagate = False
        logger.setLevel(logging.WARNING)


class RayLines(io.TextIOBase):
    """A stream that logs what Ray prints, such as that it killed a process for want of memory."""

    def write(self, text: str) -> int:
        logger = logging.getLogger("ray")
        for line in COLOUR.sub("", text).splitlines():
            if line.strip():
                logger.warning("%s", line.strip())
        return len(text)
