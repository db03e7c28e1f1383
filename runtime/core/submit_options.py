"""How a request is served, as opposed to what it asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What `Engine.submit` takes beside the request.

    priority: higher goes first. tenant: whose share of the service it uses. deadline_s: seconds from submission, after
    which it fails. preview_every, checkpoint_every: steps; 0 is never. checkpoint_dir: where checkpoints go.
    """

    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    preview_every: int = 0
    checkpoint_every: int = 0
    checkpoint_dir: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tenant, str):
            raise ValueError(f"tenant must be a string, got {short(self.tenant)}")
        for name in ("priority", "preview_every", "checkpoint_every"):
            if not _is_a(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {short(getattr(self, name))}")
        if self.deadline_s is not None and not (_is_a(self.deadline_s, int | float) and self.deadline_s > 0):
            raise ValueError(f"deadline_s must be above 0, got {short(self.deadline_s)}")
        if isinstance(self.checkpoint_dir, str | os.PathLike):
            object.__setattr__(self, "checkpoint_dir", Path(self.checkpoint_dir))
        elif self.checkpoint_dir is not None:
            raise ValueError(f"checkpoint_dir must be a folder, got {short(self.checkpoint_dir)}")
        for name in ("preview_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.checkpoint_every and self.checkpoint_dir is None:
            raise ValueError("checkpoint_every needs a checkpoint_dir")


def _is_a(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
