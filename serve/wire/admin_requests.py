"""Request and response bodies of the operators' API: tenants, jobs, engines, keys and the audit.

A prompt is shown only to its own tenant.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..accounts.keys import MAX_NAME_CHARACTERS, MAX_OVERLAP_S, ApiKey
from ..accounts.tenants import DEFAULT_CLASS, MAX_COUNT, MAX_WEIGHT, Load, Tenant
from ..jobs.services import TENANT, Context
from ..store.audit import Entry
from ..store.jobs import Job
from ..store.processes import Process
from ..store.tables import FAILED

Setting = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Time = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AdminBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChangeTenant(AdminBody):
    """Body of PATCH /v1/admin/tenants/{tenant}; null resets a setting to the configuration's."""

    quota: Setting | None = None
    creates_per_minute: Setting | None = None
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT, allow_inf_nan=False)] | None = None
    job_class: Annotated[str, StringConstraints(max_length=32)] | None = Field(default=None, alias="class")


class ChangeJob(AdminBody):
    """Body of PATCH /v1/admin/jobs/{job_id}."""

    priority: Priority


class CreateKey(AdminBody):
    """Body of POST /v1/admin/keys."""

    tenant: Annotated[str, StringConstraints(min_length=1, max_length=64)] = TENANT
    scopes: Annotated[list[str], Field(min_length=1, max_length=8)] = ["read", "write"]
    name: Name | None = None
    max_priority: Priority = 0
    expires_at: Time | None = None


class ChangeKey(AdminBody):
    """Body of PATCH /v1/admin/keys/{key_id}; null removes the name or the end."""

    name: Name | None = None
    expires_at: Time | None = None


class RotateKey(AdminBody):
    """Body of POST /v1/admin/keys/{key_id}/rotate; overlap_s: seconds that the old key stays valid too."""

    overlap_s: Annotated[float, Field(ge=0, le=MAX_OVERLAP_S, allow_inf_nan=False)] = 0.0


def show_tenant(context: Context, tenant: Tenant, load: Load) -> dict[str, Any]:
    """Return a tenant's effective settings; `overrides` are the settings that differ from the configuration's."""
    config, name = context.config, tenant.name
    overrides = {
        "quota": tenant.quota,
        "creates_per_minute": tenant.creates_per_minute,
        "weight": tenant.weight,
        "class": tenant.job_class,
    }
    return {
        "id": name,
        "object": "tenant",
        "quota": tenant.quota or config.quotas.get(name, config.quota),
        "creates_per_minute": tenant.creates_per_minute or config.creates_per_minute,
        "weight": tenant.weight or context.tenant_weights.get(name, 1.0),
        "class": tenant.job_class or DEFAULT_CLASS,
        "overrides": [word for word, value in overrides.items() if value is not None],
        "queued": load.queued,
        "in_progress": load.in_progress,
    }


def show_job(job: Job) -> dict[str, Any]:
    """Return a job without its prompt and files."""
    request = job.request
    error = {"code": job.error_code, "message": job.error_message or job.error_code} if job.state == FAILED else None
    return {
        "id": job.id,
        "object": "job",
        "tenant": job.tenant,
        "state": job.state,
        "model": request.get("model"),
        "kind": request.get("kind"),
        "size": request.get("size"),
        "seconds": request.get("seconds"),
        "priority": job.priority,
        "work_s": round(job.work, 3),
        "created_at": int(job.created_at),
        "started_at": whole(job.started_at),
        "ended_at": whole(job.ended_at),
        "stage": job.stage,
        "step": job.step,
        "num_steps": job.num_steps,
        "eta_s": job.eta_s,
        "owner": job.owner,
        "attempts": job.attempts,
        "resumed_from_step": job.resumed_from_step,
        "error": error,
        "retried_from": request.get("retried_from"),
    }


def show_engine(engine: Process) -> dict[str, Any]:
    """Return an engine and all the facts that it reports of itself."""
    is_draining = engine.drain_asked or bool(engine.facts.get("draining"))
    return {
        "id": engine.id,
        "object": "engine",
        "state": "draining" if is_draining else "ready",
        "silent_s": round(engine.silent_s, 3),
        "model": engine.facts.get("model"),
        "running": engine.facts.get("running"),
        "slots": engine.facts.get("slots"),
        "facts": engine.facts,
    }


def show_key(key: ApiKey, text: str | None = None) -> dict[str, Any]:
    """Return a key; its text is included only in the answer that creates it."""
    shown = {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "max_priority": key.max_priority,
        "state": state_of(key),
        "created_at": int(key.created_at),
        "last_used_at": whole(key.last_used_at),
        "expires_at": whole(key.expires_at),
        "revoked_at": whole(key.revoked_at),
        "managed_by": key.managed_by,
    }
    return shown if text is None else {**shown, "key": text}


def state_of(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.expires_at is None or key.expires_at > time.time() else "expired"


def show_entry(entry: Entry) -> dict[str, Any]:
    """Return a row of the audit."""
    return {
        "id": entry.id,
        "object": "audit.entry",
        "created_at": int(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "before": entry.before,
        "after": entry.after,
        "request_id": entry.request_id,
    }


def whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
