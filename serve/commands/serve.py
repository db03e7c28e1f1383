"""`skylapse serve`: runs the service of one machine."""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing import get_context
from threading import Event
from typing import Any

from ...runtime.commands.kernels import check_kernels
from ...runtime.commands.options import Parser, add_device
from ...runtime.core.config import Settings, our_variables
from ..accounts.keys import ENVIRONMENT, FILE, PREFIX, TENANT_SCOPES
from ..core.config import ServeConfig
from ..core.config_source import add_options, load_config
from ..core.logs import JsonLines, as_text
from ..deployment.local_service import APPLICATION, LocalService, RayLines
from ..deployment.log_following import LogFollower
from ..deployment.ray_session import open_session
from ..deployment.status_watch import StatusWatch
from ..engine.startup import in_words
from ..jobs.services import MAX_PRIORITY, TENANT, Context, open_context
from .config_check import effective_lines, problems

logger = logging.getLogger(__name__)
LOG_FORMATS = ("json", "text")
LOOK_S = 0.2
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def serve(arguments: Sequence[str], settings: Settings) -> int:
    """Run the service until it is told to stop."""
    options = _serve_parser().parse_args(arguments)
    effective = load_config(options, our_variables())
    if options.print_config:
        print("\n".join(effective_lines(effective)))
        return 0
    from ..jobs.served_models import check_models, pin_revisions

    config = effective.config
    checks: dict[str, Callable[[], object]] = {
        "port": lambda: _check_port(options.host, options.port),
        "models": lambda: check_models(pin_revisions(config)),  # an unknown one is told before anything is started
        "kernels": lambda: _check_kernels(config, settings),
    }
    if options.check:
        found = [*problems(effective, settings, checks)]
        for problem in found:
            print(f"skylapse: error: {problem}", file=sys.stderr)
        if not found:
            print("a service can be started with these settings")
        return 2 if found else 0
    for check in checks.values():
        check()
    config = pin_revisions(config)
    context = open_context(config)
    key = _local_key(context, settings.api_key)
    url = f"http://{'127.0.0.1' if options.host in ('0.0.0.0', '::') else options.host}:{options.port}"
    names = ", ".join(config.model_names)
    of = f"models {names}" if config.models else f"model {names}"
    print(f"starting the service ({of}, data in {config.folder})", file=sys.stderr, flush=True)
    stopped, session = Event(), open_session()
    write = _writer(options.log_format or ("text" if sys.stdout.isatty() else "json"))
    follower = LogFollower(session.logs, write)
    with _logging(write, settings):
        try:
            return _run(LocalService(config, settings, session), context, options, (url, key), stopped)
        finally:
            follower.close()
            if settings.debug:
                print(f"what Ray wrote is kept in {session.folder}", file=sys.stderr)
            else:
                session.remove()


# --------------------------------------------------------------------------------------------------------- the service


def _run(
    service: LocalService, context: Context, options: argparse.Namespace, told: tuple[str, str], stopped: Event
) -> int:
    """Run until the service is told to stop or cannot be started; return the exit code."""
    logger.info("the service starts")
    watch = StatusWatch(service.status, context.processes, APPLICATION, context.config.groups)
    _listen(stopped)
    try:
        service.start(options.host, options.port)
        _listen(stopped)  # Ray has put a handler in the place of ours, which aborts the process 3 s after a SIGTERM
        watch.start()
        is_said = False
        while not stopped.wait(LOOK_S):
            if watch.failure is not None:
                if watch.failure.is_mistake:
                    raise ValueError(str(watch.failure))
                print(f"skylapse: failed: {watch.failure}", file=sys.stderr)
                return 1
            if watch.is_ready and not is_said:
                is_said = True
                _say(*told, options.host, watch.engines)
    finally:
        watch.close()
        logger.info("the service stops")
        print("stopping", file=sys.stderr, flush=True)
        service.stop()
    return 0


def _listen(stopped: Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())


def _writer(log_format: str) -> Callable[[str], None]:
    """Return a function that prints a line of the log; a line that nobody reads is lost, and the service goes on."""
    stdout = sys.stdout

    def write(line: str) -> None:
        with suppress(BrokenPipeError):
            print(as_text(line) if log_format == "text" else line, file=stdout, flush=True)

    return write


@contextmanager
def _logging(write: Callable[[str], None], settings: Settings) -> Iterator[None]:
    """Send this process's own log lines the same way as those of the other processes."""
    handler = Printed(write)
    handler.setFormatter(JsonLines("service"))
    ours = logging.getLogger("skylapse")
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(settings.log_level.upper())
    ours.propagate = False
    try:
        with redirect_stdout(RayLines()):
            yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate = before


class Printed(logging.Handler):
    """Log handler that passes each record's line to `write`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))


def _say(url: str, key: str, host: str, engines: Mapping[str, Mapping[str, Any]]) -> None:
    """Print address and key on stderr, for whoever started the service: the log, which others read, has no key."""
    logger.info("the service is ready", extra={"facts": {"url": url}})
    for facts in engines.values():
        whose = f"{facts['model']}: " if len(engines) > 1 else ""
        print(f"{whose}{in_words(facts)}", file=sys.stderr)
    print(f"skylapse serves at {url}", file=sys.stderr)
    print(f"key:  {key}", file=sys.stderr)
    example = f'curl {url}/v1/videos -H "Authorization: Bearer {key}" -F prompt="a red circle moving right"'
    print(f"try:  {example}", file=sys.stderr)
    if host not in LOOPBACK_HOSTS:
        print(f"note: {host} is not this machine alone; put TLS in front", file=sys.stderr)
    sys.stderr.flush()


def _local_key(context: Context, wanted: str | None) -> str:
    """Return the key of this machine's own tenant: the operator's, or one that is made at the first start and kept."""
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


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"port must be from 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be taken: {error.strerror}") from None


def _check_kernels(config: ServeConfig, settings: Settings) -> None:
    if settings.kernels:
        with ProcessPoolExecutor(1, get_context("spawn")) as child:  # this process takes no memory of the GPU
            child.submit(check_kernels, dict(settings.kernels), config.device).result()


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
    option("--config", metavar="FILE", help="settings as YAML or JSON; docs/deploy.md has them all")
    option("--log-format", choices=LOG_FORMATS, help="of stdout's lines (default: text on a terminal, else json)")
    option("--check", action="store_true", help="say whether a service could start so, and start none")
    option("--print-config", action="store_true", help="print all settings, and where each comes from")
    add_options(parser, but=frozenset(action.dest for action in parser._actions))
    return parser
