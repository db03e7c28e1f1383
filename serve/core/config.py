"""A service's configuration: the arguments of the Serve application and of `skylapse serve`."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...runtime.core.config import load_settings
from .model_entry import (
    BOTH,
    Autoscaling,
    Canary,
    Count,
    EngineGroup,
    Fingerprint,
    ModelEntry,
    Positive,
    Revision,
    Share,
    deployment_names,
    groups_of,
    known_quantize,
)
from .prices import Prices, by_device

MIB = 2**20
ONE_MODELS = ("model", "revision", "fingerprint", "canary")  # fields that say nothing where there are several models
Price = Annotated[Decimal, Field(ge=0, le=10**6, decimal_places=9, allow_inf_nan=False)]


class ServeConfig(BaseModel):
    """The configuration. Every field has a default that suits one machine; `deploy/serve.yaml` shows a cluster's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # where things are
    data: str = Field(default_factory=lambda: str(load_settings().data))  # for whatever has no place of its own below
    database_url: str = ""  # SQLAlchemy's; "": SQLite in the folder. SKYLAPSE_DATABASE_URL where it holds a password
    artifacts_url: str = ""  # fsspec's, such as s3://bucket/prefix; "": in the folder
    artifacts_options: dict[str, Any] = {}  # of that filesystem: endpoint_url, key, secret, ...
    output_dir: str = ""  # where /v1/videos/generations may leave files for its caller; "": nowhere

    # the model, or several; what is here and not in ONE_MODELS is for those of `models` that have no value of their own
    model: str = "demo"
    revision: Revision | None = None  # of a hub's model: a branch, a tag or a commit; None: as it is at the start
    fingerprint: Fingerprint | None = None  # of the weights; engines that find others do not start
    canary: Canary | None = None  # other weights for a share of the jobs
    models: tuple[ModelEntry, ...] = ()  # the first one is the default. A list: KubeRay sorts the keys of an object
    device: Literal["cpu", "cuda"] | None = None  # None: cuda where Ray finds a GPU
    dtype: str | None = None
    quantize: str | None = None  # weights of the denoiser's blocks; None: SKYLAPSE_QUANTIZE
    offload: Literal["auto", "none", "all"] | None = None  # parts that leave a GPU; None: SKYLAPSE_OFFLOAD
    threads: Count | None = None  # of an engine on a CPU; None: as many as there are cores
    aliases: dict[str, str] = {"sora-2": "", "sora-2-pro": ""}  # name -> a served model; "": the first one
    engines: Count = 1  # engine and ingress replicas; a Serve config file's own numbers come on top
    ingresses: Count = 1
    engine_gpus: Share = 1.0  # of a GPU, that Ray counts an engine on cuda as; below 1 engines share one
    warm_up: bool | None = None  # make what first requests would wait for, at the start; None: on cuda
    gpu_health: bool = True  # engines drain when NVML reports a fault of their GPU, and do not start on a faulty one
    ignored_xids: tuple[Count, ...] = ()  # faults for which they do not: the driver's Xid numbers
    engine_slots: Count = 8  # requests that one engine works on at a time
    autoscaling: Autoscaling | None = None  # instead of so many `engines`

    # jobs
    lease_s: Positive = 6.0  # renewed every third of it; a job whose engine vanished is queued again after this long
    stage_deadline_s: Positive = 900.0  # the longest that a step, an encode, a decode or an upload may take
    checkpoint_every: Count = 5  # steps
    max_attempts: Count = 3  # solo crashes without progress after which a job fails
    retention_s: Positive = 7 * 86400.0  # of a finished job's files
    drain_s: Positive = 60.0  # an engine that is stopped finishes what fits and gives the rest back

    # what one tenant, and all of them, may ask for
    quota: Count = 500  # unfinished jobs of a tenant
    quotas: dict[str, Count] = {}  # of tenants that have one of their own
    creates_per_minute: Count = 600
    max_queued: Count = 5000  # unfinished jobs of all
    max_body_bytes: Count = 64 * MIB
    max_media_pixels: Count = 40_000_000  # of one picture or frame; telephones make 24 million
    max_media_seconds: Positive = 120.0

    # what a second of an engine costs: model, or * for all others -> a price, or one for each of cpu and cuda
    prices: dict[str, Price | dict[Literal["cpu", "cuda"], Price]] = {}
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "EUR"

    # answers
    metrics_open: bool = False  # /metrics to everybody; else it needs a key of scope operator, but on loopback
    downloads: Literal["proxy", "redirect"] = "proxy"  # redirect: 307 to a presigned URL, on a bucket alone
    session_s: Positive = 12 * 3600.0  # life of a browser's cookie

    # webhooks
    webhook_secret: str = ""  # whsec_...; "": made at the first start. SKYLAPSE_WEBHOOK_SECRET
    webhook_private: bool = False  # let them go to private addresses, for tests and clusters of one's own
    webhook_attempts: Count = 12

    @field_validator("quantize")
    @classmethod
    def _is_known(cls, word: str | None) -> str | None:
        return known_quantize(word)

    @model_validator(mode="after")
    def _fits(self) -> ServeConfig:
        if self.downloads == "redirect" and "://" not in self.artifacts_url:
            raise ValueError("downloads can only be redirected where artifacts_url is a bucket")
        given = [name for name in ONE_MODELS if name in self.model_fields_set and self.models]
        if given:
            raise ValueError(f"{given[0]} belongs into an entry of models where these are given, got both")
        if {"engines", "autoscaling"} <= self.model_fields_set and self.autoscaling is not None:
            raise ValueError(BOTH)
        names = self.model_names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models must have names of their own, got {name!r} twice")
        for alias, target in self.aliases.items():
            if target and target not in names:
                raise ValueError(f"alias {alias!r} must name a model that is served, {_one_of(names)}, got {target!r}")
            if alias in names and target not in ("", alias):
                raise ValueError(f"alias {alias!r} must not be the name of another model, got {target!r}")
            if alias in names and not target and alias != names[0]:
                raise ValueError(f"alias {alias!r} must not be the name of another model, got {names[0]!r}")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.data).expanduser().resolve()

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.folder / 'jobs.db'}"

    @property
    def artifacts(self) -> str:
        return self.artifacts_url or str(self.folder / "artifacts")

    @property
    def scratch(self) -> Path:
        """The folder for files that nobody needs after a restart."""
        return self.folder / "scratch"

    @property
    def price_list(self) -> Prices:
        return Prices(by_device(self.prices), self.currency)

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """The entry of each model, also for a service of one model."""
        return self.models or (
            ModelEntry.model_construct(
                model=self.model, revision=self.revision, fingerprint=self.fingerprint, canary=self.canary
            ),
        )

    @property
    def model_names(self) -> list[str]:
        """Names of the served models, the default first."""
        return [entry.served_name for entry in self.entries]

    @property
    def groups(self) -> list[EngineGroup]:
        """Engine groups: one deployment for each model, named `Engine` if there is one alone, and for each canary."""
        deployments = deployment_names(self.model_names) if self.models else ["Engine"]
        service = {name: getattr(self, name) for name in type(self).model_fields}
        return [
            group
            for index, (entry, deployment) in enumerate(zip(self.entries, deployments, strict=True))
            for group in groups_of(entry, service, deployment, is_default=index == 0)
        ]

    def group(self, deployment: str) -> EngineGroup:
        return next(group for group in self.groups if group.deployment == deployment)

    def model_of(self, name: str | None) -> str | None:
        """Return the served model behind a name that a client used, or None for an unknown name."""
        names = self.model_names
        if name is None or name in names:
            return name or names[0]
        return (self.aliases[name] or names[0]) if name in self.aliases else None


def _one_of(names: list[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
