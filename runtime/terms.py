"""How a request is served, as opposed to what it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {self.deadline_s}")
        for name in ("preview_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.checkpoint_every and self.checkpoint_dir is None:
            raise ValueError("checkpoint_every needs a checkpoint_dir")
