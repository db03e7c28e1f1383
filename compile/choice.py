"""What a selector chooses from and tells: an artifact that may run, what runs, and how each backend stands."""

from __future__ import annotations

from dataclasses import dataclass

from .backend import Backend
from .cache import Artifact, Key
from .footprint import Footprint
from .stream import Plan, Run


@dataclass(frozen=True)
class Choice:
    """What runs clips of a size, and why."""

    backend: str
    why: str
    run: Run
    artifact: str | None = None
    footprint: Footprint | None = None


@dataclass(frozen=True)
class Standing:
    """One backend, as `skylapse compile --status` shows it."""

    backend: str
    state: str
    detail: str
    seconds: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Candidate:
    backend: Backend
    plan: Plan
    key: Key
    artifact: Artifact
