"""Watches the service of one machine from outside: logs each fault once, and its end once.

Serve's controller tells of replicas and proxies, the store of engines' signs. A thread looks, since the controller
does not answer while it is being replaced.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from ...runtime.checkpoints.hub import Download
from ..core.model_entry import EngineGroup
from ..engine.startup import find_downloads, find_engines, find_failure
from ..store.processes import DISPATCHER, ENGINE, FAILED, Process, Processes

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview, ServeStatus

logger = logging.getLogger(__name__)
STARTING_LOOK_S, LOOK_S = 0.3, 2.0
SILENT_S = 5.0  # engines and dispatchers give a sign every second
FORGOTTEN_S = 60.0  # after which a silent one is not spoken of any more
TELL_EVERY_S = 15.0  # while it starts
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit|NotFound)): ?(.*)$", re.MULTILINE)
MISTAKES = ("ValueError", "FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "PermissionError")


@dataclass(frozen=True)
class StartFailure:
    """The reason that a part cannot be started, in one line; is_mistake: whether its configuration is at fault."""

    part: str
    reason: str
    is_mistake: bool

    def __str__(self) -> str:
        return f"{self.part} cannot be started: {self.reason}"


def failure_in(part: str, message: str) -> StartFailure | None:
    """Return the error that a replica's constructor raised, from Serve's message with its traceback, or None."""
    found = RAISED.findall(message)
    if not found:
        return None
    kind, reason = found[-1]
    told = " ".join(reason.split()) or "no reason was given"
    return StartFailure(part, told if kind in MISTAKES else f"{kind}: {told}", kind in MISTAKES)


class StatusWatch:
    """Watches the service: a thread of its own calls `look` from `start` on; any thread may read the attributes."""

    def __init__(
        self,
        ask: Callable[[], ServeStatus],
        processes: Processes,
        application: str,
        groups: Sequence[EngineGroup],
    ) -> None:
        """Prepare the watch. groups: of engines; those that have some from the start are waited for."""
        self.ask, self.processes, self.application, self.groups = ask, processes, application, groups
        self.is_ready = False
        self.failure: StartFailure | None = None
        self.engines: Mapping[str, Mapping[str, Any]] = {}  # group -> facts of its first engine that was ready
        self._before = {process.id for process in processes.alive(FORGOTTEN_S)}  # of a service that is no more
        self._told: dict[str, str] = {}  # subject -> what was last said of it
        self._began_s = self._waiting_told_s = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skylapse-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop, without waiting for a look that waits for an answer."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S if self.is_ready else STARTING_LOOK_S):
            self.look()

    def look(self) -> None:
        application: ApplicationStatusOverview | None = None
        try:
            status = self.ask()
        except Exception as error:  # whatever Ray raises while its controller is away
            self._tell("controller", f"Serve's controller does not answer ({type(error).__name__})")
        else:
            self._tell("controller", None)
            self._look_at_proxies(status)
            application = status.applications.get(self.application)
        if application is not None:
            self._look_at(application)
        try:
            alive = [process for process in self.processes.alive(FORGOTTEN_S) if process.id not in self._before]
        except SQLAlchemyError as error:
            self._tell("store", f"the store does not answer ({type(error).__name__})")
        else:
            self._tell("store", None)
            self._look_at_signs(alive)
            if not self.is_ready and application is not None:
                self._look_at_start(application, alive)

    # --- what is looked at ----------------------------------------------------------------------------------------

    def _look_at_proxies(self, status: ServeStatus) -> None:
        bad = sorted({str(state.value) for state in status.proxies.values()} - {"HEALTHY", "STARTING"})
        is_away = self.is_ready and (bad or not status.proxies)
        self._tell("proxy", f"the HTTP proxy is {', '.join(bad).lower() or 'away'}" if is_away else None)

    def _look_at(self, application: ApplicationStatusOverview) -> None:
        for name, deployment in application.deployments.items():
            states = {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items()}
            is_bad = deployment.status.value in ("UNHEALTHY", "DEPLOY_FAILED")
            running = f"{states.get('RUNNING', 0)} of {sum(states.values()) - states.get('STOPPING', 0)} run"
            if not self.is_ready and self.failure is None:
                self.failure = failure_in(name, deployment.message)
                if self.failure is None and deployment.status.value == "DEPLOY_FAILED":
                    self.failure = StartFailure(name, " ".join(deployment.message.split())[:300], False)
            self._tell(name, f"{name} is unhealthy: {running}" if is_bad else None)

    def _look_at_signs(self, alive: Sequence[Process]) -> None:
        for process in alive:
            what = f"{process.kind} {process.id}"
            has_failed = process.facts.get("state") == FAILED
            is_silent = process.silent_s > SILENT_S and not has_failed
            self._tell(what, f"{what} has given no sign for more than {SILENT_S:g} s" if is_silent else None)
        for what in [*self._told]:
            if what.partition(" ")[0] in (ENGINE, DISPATCHER) and what not in {f"{p.kind} {p.id}" for p in alive}:
                del self._told[what]  # it has left, or is forgotten

    def _look_at_start(self, application: ApplicationStatusOverview, alive: Sequence[Process]) -> None:
        fresh = [process for process in alive if process.silent_s < SILENT_S]
        engines = find_engines(self.groups, fresh)
        has_dispatcher = any(process.kind == DISPATCHER for process in fresh)
        if application.status.value == "RUNNING" and has_dispatcher and engines is not None:
            self.engines, self.is_ready = engines, True
            return
        if self.failure is None and (error := find_failure(fresh)) is not None:
            self.failure = StartFailure("Engine", str(error), isinstance(error, ValueError))
        now_s = time.monotonic()
        if now_s - self._waiting_told_s >= TELL_EVERY_S:
            self._waiting_told_s = now_s
            logger.info("waiting for %s, for %.0f s so far", _waited_for(application), now_s - self._began_s)
            for model, progress in find_downloads(fresh).items():
                logger.info("downloading %s of %s", Download(model, *progress), model)

    # --- what is said ---------------------------------------------------------------------------------------------

    def _tell(self, subject: str, wrong: str | None) -> None:
        """Log once what is wrong with a subject, and once that it no longer is."""
        before = self._told.get(subject)
        if wrong is not None and wrong != before:
            self._told[subject] = wrong
            if self.is_ready or subject in ("controller", "store"):
                logger.warning("%s", wrong)
        elif wrong is None and before is not None:
            del self._told[subject]
            if self.is_ready:
                logger.info("%s is well again", subject)


def _waited_for(application: ApplicationStatusOverview) -> str:
    """Return the names of the parts that do not run yet."""
    names = [name for name, deployment in application.deployments.items() if deployment.status.value != "HEALTHY"]
    return " and ".join(names) or "a first sign of life"
