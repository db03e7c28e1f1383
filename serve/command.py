"""`skylapse serve`: one machine's service."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event

from pydantic import ValidationError

from ..runtime.config import Settings, export
from ..runtime.doctor import check_kernels
from ..runtime.options import Parser, add_device
from .config import ServeConfig
from .context import MAX_PRIORITY, TENANT, Context, open_context
from .ready import in_words
from .store.keys import ENVIRONMENT, FILE, PREFIX, TENANT_SCOPES
from .store.processes import DISPATCHER, ENGINE

READY_S = 120.0
# Serve notices a dead proxy after 3 checks, and by default makes one in 10 s: the port would be dead for half a minute.
RAY = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "skylapse.serve.edge.middlewares",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # it binds all addresses, and ends long requests when it reloads
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none; by default, all of them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
OBJECT_STORE_BYTES = 80 * 2**20  # clips go through the artifact store: Ray carries job ids alone


def serve(arguments: Sequence[str], settings: Settings) -> int:
    """Run the service until it is told to stop."""
    options = _serve_parser().parse_args(arguments)
    config = _config(options)
    if not 0 < options.port < 65536:
        raise ValueError(f"port must be from 1 to 65535, got {options.port}")
    _check_free(options.host, options.port)
    from .catalog import Catalog

    Catalog(config).find(None)  # an unknown model is told before anything is started
    if settings.kernels:
        with ProcessPoolExecutor(1, get_context("spawn")) as child:  # this process takes no memory of the GPU
            child.submit(check_kernels, dict(settings.kernels), config.device).result()
    context = open_context(config)
    key = _local_key(context, settings.api_key)
    stopped = Event()
    _listen(stopped)
    url = f"http://{'127.0.0.1' if options.host in ('0.0.0.0', '::') else options.host}:{options.port}"
    print(f"starting the service (model {config.model}, data in {config.folder})", file=sys.stderr, flush=True)
    _start(config, settings, options.host, options.port, stopped)
    try:
        if _wait_until_ready(context, stopped):
            _say(url, key, options.host)
            stopped.wait()
    finally:
        _stop()
    return 0


# --------------------------------------------------------------------------------------------------------- the service


def _config(options: argparse.Namespace) -> ServeConfig:
    """From the file, where there is one, and the options on top of it. ValueError names what is wrong."""
    fields = {}
    if options.config is not None:
        try:
            fields = json.loads(Path(options.config).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"config must be JSON, got {options.config!r}: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"config must be an object of settings, got {options.config!r}")
    given = {name: getattr(options, name, None) for name in ServeConfig.model_fields}
    try:
        return ServeConfig(**fields | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _listen(stopped: Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())


def _start(config: ServeConfig, settings: Settings, host: str, port: int, stopped: Event) -> None:
    export(RAY)
    import ray
    from ray import serve as ray_serve

    from .app import build
    from .placement import check_gpus, cluster_gpus

    cores = max(2, os.cpu_count() or 2)
    ray.init(
        address="local",
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=True,
    )
    try:
        check_gpus(config, cluster_gpus(), settings.memory_bytes)
    except ValueError:
        ray.shutdown()
        raise
    _listen(stopped)  # Ray has put a handler in the place of ours, which aborts the process 3 s after a SIGTERM
    ray_serve.start(http_options={"host": host, "port": port})
    ray_serve.run(build(config.model_dump(exclude_defaults=True)), name="skylapse", route_prefix="/", blocking=False)


def _stop() -> None:
    import ray
    from ray import serve as ray_serve

    print("stopping", file=sys.stderr, flush=True)
    if ray.is_initialized():
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _wait_until_ready(context: Context, stopped: Event) -> bool:
    """Whether a dispatcher and an engine have given a sign; False where it was told to stop before."""
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s:
        facts = {process.kind: process.facts for process in context.processes.alive(3.0)}
        if {DISPATCHER, ENGINE} <= facts.keys():
            if "ready_s" in facts[ENGINE]:  # else it is of an earlier version, and of this folder's last service
                print(in_words(facts[ENGINE]), file=sys.stderr)
            return True
        if stopped.wait(0.2):
            return False
    raise RuntimeError(f"the service was not ready within {READY_S:g} s")


def _say(url: str, key: str, host: str) -> None:
    print(f"skylapse serves at {url}")
    print(f"key:  {key}")
    print(f'try:  curl {url}/v1/videos -H "Authorization: Bearer {key}" -F prompt="a red circle moving right"')
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: {host} is not this machine alone; put TLS in front", file=sys.stderr)
    sys.stdout.flush()


def _local_key(context: Context, wanted: str | None) -> str:
    """The key of this machine's own tenant: the operator's, or one that is made at the first start and kept."""
    if wanted is not None:  # the context has seen to it
        return wanted
    context.keys.manage(ENVIRONMENT, None, TENANT, TENANT_SCOPES)
    path = context.config.folder / "api_key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(PREFIX + secrets.token_urlsafe(32) + "\n")
    key = path.read_text().strip()
    context.keys.manage(FILE, key, TENANT, TENANT_SCOPES, MAX_PRIORITY)
    return key


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be taken: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------------------- options


def _serve_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skylapse serve", description="Serve the OpenAI Videos API on this machine.", allow_abbrev=False
    )
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    option("--port", type=int, default=8000, help="default: 8000")
    option("--data", metavar="DIR", help="jobs, keys and files (default: SKYLAPSE_DATA, or skylapse-data)")
    option("--model", help="demo (the default), a diffusers folder, or a Hugging Face id")
    add_device(parser)
    option("--engines", type=int, metavar="N", help="engine replicas, each with the model (default: 1)")
    option("--ingresses", type=int, metavar="N", help="replicas that answer requests (default: 1)")
    option("--config", metavar="FILE", help="more settings, as JSON; docs/deploy.md has them all")
    return parser
