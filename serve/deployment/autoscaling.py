"""Autoscaling policy: as many engines as clear the backlog in the time that the operator sets.

`deploy/serve.yaml` names the policy. Serve calls it ten times a second on its controller's loop, within the bounds and
delays of the deployment's `autoscaling_config`, which it applies to the answer by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from ...runtime.core.config import load_settings
from ..store.backlog import Backlog, read_backlog
from ..store.database import Database
from ..store.model_queue import ModelQueue

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

STALE_S = 30.0  # a backlog that was read longer ago says nothing about now

log = logging.getLogger(__name__)


class BacklogPolicy:
    """A policy for `autoscaling_config.policy`, with its arguments in `policy_kwargs`.

    clear_in_s: seconds of work for which one engine is added. database_url: SQLAlchemy's, as in ServeConfig; leave it
    out if it holds a password, since Serve logs these arguments: then SKYLAPSE_DATABASE_URL is used. model: the served
    name of the model whose jobs count; "": all jobs. default: this model is the first of several, to which the jobs
    that name none belong as well. canary: for a model that has one, whether its share of the jobs counts or the rest.
    """

    def __init__(
        self,
        clear_in_s: float = 60.0,
        database_url: str = "",
        poll_s: float = 1.0,
        model: str = "",
        default: bool = False,
        canary: bool | None = None,
    ) -> None:
        url = database_url or load_settings().database_url
        if not url:
            raise ValueError("the autoscaling policy needs a database_url, or SKYLAPSE_DATABASE_URL")
        if not clear_in_s > 0 or math.isinf(clear_in_s):
            raise ValueError(f"clear_in_s must be a number of seconds above 0, got {clear_in_s}")
        self.clear_in_s, self.poll_s = clear_in_s, poll_s
        self.queue = ModelQueue(model, default, canary) if model else None
        self.database = Database(url)
        self.backlog: Backlog | None = None  # None: not known
        self.polled_s = self.read_s = float("-inf")
        self.poll: asyncio.Task[None] | None = None

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of engines that there should be, and facts for Serve's status. Never waits."""
        now_s = time.monotonic()
        if now_s - self.polled_s >= self.poll_s and (self.poll is None or self.poll.done()):
            self.polled_s = now_s
            self.poll = asyncio.get_running_loop().create_task(self._read())
        if self.backlog is None or now_s - self.read_s > STALE_S:
            return ctx.target_num_replicas, {}
        told = {"backlog_jobs": self.backlog.num_jobs, "backlog_s": self.backlog.engine_s}
        return num_engines(self.backlog, self.clear_in_s), told

    async def _read(self) -> None:
        """Read the backlog once: a task that looped would keep this policy alive after a redeploy has replaced it."""
        try:
            self.backlog = await asyncio.to_thread(read_backlog, self.database, self.queue)
            self.read_s = time.monotonic()
        except SQLAlchemyError as error:  # its text would hold the URL
            if self.backlog is not None:
                log.warning("the store does not answer, so engines stay as many as they are: %s", type(error).__name__)
            self.backlog = None


def num_engines(backlog: Backlog, clear_in_s: float) -> int:
    """Return the number of engines: at least one while there is a job, and no more than jobs: a job is one engine's."""
    wanted = backlog.engine_s / clear_in_s
    return min(backlog.num_jobs, max(1, math.ceil(min(wanted, backlog.num_jobs))))
