"""Response models of the operators' API, and the other parts of the OpenAPI document for its routes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .admin_requests import ChangeJob, ChangeKey, ChangeTenant, CreateKey, RotateKey
from .responses import VideoError


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdminTenant(Shape):
    id: str
    object: Literal["tenant"]
    quota: int
    creates_per_minute: int
    weight: float
    job_class: str = Field(alias="class")
    overrides: list[Literal["quota", "creates_per_minute", "weight", "class"]]
    queued: int
    in_progress: int


class AdminJob(Shape):
    """A job of any tenant, without its prompt and files."""

    id: str
    object: Literal["job"]
    tenant: str
    state: Literal["queued", "in_progress", "completed", "failed"]
    model: str | None
    kind: str | None
    size: str | None
    seconds: str | None
    priority: int
    work_s: float
    created_at: int
    started_at: int | None
    ended_at: int | None
    stage: str | None
    step: int
    num_steps: int
    eta_s: float | None
    owner: str | None
    attempts: int
    resumed_from_step: int | None
    error: VideoError | None
    retried_from: str | None


class AdminEngine(Shape):
    id: str
    object: Literal["engine"]
    state: Literal["ready", "draining"]
    silent_s: float
    model: str | None
    running: int | None
    slots: int | None
    facts: dict[str, Any]


class AdminKey(Shape):
    """A key. Its text, `key`, is included only in the answer that creates it."""

    id: str
    object: Literal["key"]
    name: str | None
    tenant: str
    scopes: list[Literal["read", "write", "admin", "operator"]]
    max_priority: int
    state: Literal["valid", "expired", "revoked"]
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    revoked_at: int | None
    managed_by: Literal["environment", "file"] | None


class AdminNewKey(AdminKey):
    key: str


class AdminKeyDeleted(Shape):
    id: str
    object: Literal["key.deleted"]
    deleted: Literal[True]


class AuditEntry(Shape):
    id: int
    object: Literal["audit.entry"]
    created_at: int
    actor: str
    action: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    request_id: str | None


class AdminList(Shape):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdminTenantList(AdminList):
    data: list[AdminTenant]


class AdminJobList(AdminList):
    data: list[AdminJob]


class AdminEngineList(AdminList):
    data: list[AdminEngine]


class AdminKeyList(AdminList):
    data: list[AdminKey]


class AuditList(Shape):
    object: Literal["list"]
    data: list[AuditEntry]
    first_id: int | None
    last_id: int | None
    has_more: bool


ADMIN_BODIES: dict[str, type[BaseModel]] = {  # operation -> its fields
    "changeTenant": ChangeTenant,
    "changeJob": ChangeJob,
    "createKey": CreateKey,
    "changeKey": ChangeKey,
    "rotateKey": RotateKey,
}
ADMIN_ANSWERS: dict[str, type[BaseModel]] = {
    "listTenants": AdminTenantList,
    "changeTenant": AdminTenant,
    "listJobs": AdminJobList,
    **dict.fromkeys(("retrieveJob", "changeJob", "cancelJob", "retryJob"), AdminJob),
    "listEngines": AdminEngineList,
    "drainEngine": AdminEngine,
    "listKeys": AdminKeyList,
    **dict.fromkeys(("createKey", "rotateKey"), AdminNewKey),
    "changeKey": AdminKey,
    "revokeKey": AdminKeyDeleted,
    "listAudit": AuditList,
}
ALWAYS = ("401", "403", "503")
BODY = ("400", "408", "413", "415")
ADMIN_ERRORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("listTenants", "listJobs", "listKeys", "listAudit"), ("400", *ALWAYS)),
    "listEngines": ALWAYS,
    **dict.fromkeys(("changeTenant", "createKey"), (*BODY, *ALWAYS)),
    **dict.fromkeys(("changeJob", "changeKey", "rotateKey"), (*BODY, "404", *ALWAYS)),
    "retryJob": ("400", "404", *ALWAYS),
    **dict.fromkeys(("retrieveJob", "cancelJob", "drainEngine", "revokeKey"), ("404", *ALWAYS)),
}
