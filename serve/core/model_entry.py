"""A model's entry in a service's configuration, and the groups of engines made from it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from ...runtime.core.config import QUANTIZE
from ..store.model_queue import ModelQueue

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\w][\w./-]*$")]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # `skylapse models download` tells it
Device = Literal["cpu", "cuda"]
Offload = Literal["auto", "none", "all"]
BOTH = "engines must be left out where autoscaling says how many there are, got both"
OPTIONS = (  # fields that an entry takes from the service where it has none of its own
    "device", "dtype", "quantize", "offload", "threads", "engines", "engine_gpus", "engine_slots", "warm_up",
    "autoscaling",
)  # fmt: skip


class Autoscaling(BaseModel):
    """Scales engines by the work that waits; see `BacklogPolicy`. The delays are Serve's, in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: Annotated[int, Field(ge=0)] = 0
    max_replicas: Count = 1
    clear_in_s: Positive = 60.0  # one engine more for every so many seconds of work
    upscale_delay_s: Seconds = 10.0
    downscale_delay_s: Seconds = 300.0  # longer than an engine takes to load

    @model_validator(mode="after")
    def _fits(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas must be at most max_replicas, {self.max_replicas}, got {self.min_replicas}")
        return self


class Canary(BaseModel):
    """Other weights of a model, for a share of its jobs, with engines of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    share: Annotated[float, Field(gt=0, lt=1)]  # of jobs, by a hash of the job's id
    model: Name | None = None  # None: the same folder or id, of another revision
    revision: Revision | None = None
    fingerprint: Fingerprint | None = None
    engines: Count = 1

    @model_validator(mode="after")
    def _differs(self) -> Canary:
        if self.model is None and self.revision is None:
            raise ValueError("a canary needs a model or a revision that differs from the stable one's")
        return self


class ModelEntry(BaseModel):
    """One of `models`. A field that is None has the value of the service's own field of this name."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: Name | None = None  # what clients ask for; None: `model`
    model: Name  # demo, a diffusers folder, or a hub id
    revision: Revision | None = None
    fingerprint: Fingerprint | None = None
    device: Device | None = None
    dtype: str | None = None
    quantize: str | None = None
    offload: Offload | None = None
    threads: Count | None = None
    engines: Count | None = None
    engine_gpus: Share | None = None
    engine_slots: Count | None = None
    warm_up: bool | None = None
    autoscaling: Autoscaling | None = None
    canary: Canary | None = None

    @field_validator("quantize")
    @classmethod
    def _is_known(cls, word: str | None) -> str | None:
        return known_quantize(word)

    @model_validator(mode="after")
    def _fits(self) -> ModelEntry:
        if self.engines is not None and self.autoscaling is not None:
            raise ValueError(BOTH)
        return self

    @property
    def served_name(self) -> str:
        return self.name or self.model


def known_quantize(word: str | None) -> str | None:
    if word is not None and word not in QUANTIZE:
        raise ValueError(f"must be {' or '.join(QUANTIZE)}")
    return word


@dataclass(frozen=True, kw_only=True)
class EngineGroup:
    """Engines with the same weights and options: one deployment of Ray Serve's."""

    deployment: str
    name: str  # of the model, as jobs have it
    model: str
    revision: str | None
    fingerprint: str | None
    device: Device | None
    dtype: str | None
    quantize: str | None
    offload: Offload | None
    threads: int | None
    engines: int
    engine_gpus: float
    engine_slots: int
    warm_up: bool | None
    autoscaling: Autoscaling | None
    queue: ModelQueue

    @property
    def is_canary(self) -> bool:
        return self.queue.canary is True

    @property
    def min_engines(self) -> int:
        return self.engines if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def max_engines(self) -> int:
        return self.engines if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def facts(self) -> dict[str, Any]:
        """The group's facts in an engine's heartbeat."""
        return {"model": self.name, "canary": self.is_canary, "revision": self.revision}


def groups_of(entry: ModelEntry, service: dict[str, Any], deployment: str, is_default: bool) -> list[EngineGroup]:
    """Return the engine groups of a model and of its canary; service: the fields that the whole service has."""
    options = {name: service[name] if getattr(entry, name) is None else getattr(entry, name) for name in OPTIONS}
    if entry.engines is not None and entry.autoscaling is None:
        options["autoscaling"] = None  # the entry's own number, not the service's scaling
    has_canary = entry.canary is not None

    def queue(canary: bool | None) -> ModelQueue:
        return ModelQueue(entry.served_name, is_default, canary)

    stable = EngineGroup(
        deployment=deployment,
        name=entry.served_name,
        model=entry.model,
        revision=entry.revision,
        fingerprint=entry.fingerprint,
        queue=queue(False if has_canary else None),
        **options,
    )
    if entry.canary is None:
        return [stable]
    options |= {"engines": entry.canary.engines, "autoscaling": None}
    canary = EngineGroup(
        deployment=f"{deployment}-canary",
        name=entry.served_name,
        model=entry.canary.model or entry.model,
        revision=entry.canary.revision,
        fingerprint=entry.canary.fingerprint,
        queue=queue(True),
        **options,
    )
    return [stable, canary]


def deployment_names(names: list[str]) -> list[str]:
    """Return a unique `Engine-NAME` for each of several models, with letters, digits, '.', '_' and '-' alone."""
    found: list[str] = []
    for name in names:
        base = "Engine-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
        found.append(base if base not in found else f"{base}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    return found


def is_of_canary(job_id: str, share: float) -> bool:
    """Return whether a job is of the canary's share; every process gives the same answer."""
    return int(hashlib.sha256(job_id.encode()).hexdigest()[:8], 16) / 2**32 < share
