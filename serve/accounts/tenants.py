"""Settings of tenants: quota, rate, weight and class, which operators change while the service runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select, union, update

from ..store.audit import Actor, record
from ..store.database import Database
from ..store.tables import IN_PROGRESS, QUEUED, api_keys, jobs, tenants

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
CLASS = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
DEFAULT_CLASS = "default"
MAX_CLASSES = 8  # a class is a label of metrics, and each one multiplies their number
MAX_COUNT, MAX_WEIGHT = 10**6, 1000.0
FIELDS = ("quota", "creates_per_minute", "weight", "job_class")
LOCK = "tenants"


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """The settings of a tenant; None: as the configuration has it."""

    name: str
    quota: int | None = None
    creates_per_minute: int | None = None
    weight: float | None = None
    job_class: str | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """A tenant's unfinished jobs."""

    queued: int = 0
    in_progress: int = 0


class TenantStore:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def get(self, name: str) -> Tenant:
        """Return the settings of this tenant, which may be unknown."""
        with self.database.read() as connection:
            return _get(connection, name)

    def class_of(self, name: str) -> str:
        """Return the label that metrics give to this tenant's jobs."""
        return self.get(name).job_class or DEFAULT_CLASS

    def weights(self) -> dict[str, float]:
        """Return the weights of the tenants for which one is set."""
        with self.database.read() as connection:
            rows = connection.execute(select(tenants.c.name, tenants.c.weight).where(tenants.c.weight.is_not(None)))
            return {row.name: row.weight for row in rows}

    def page(self, limit: int, after: str | None = None) -> tuple[list[tuple[Tenant, Load]], bool]:
        """Return every tenant with a key, a job or a setting, by name, from behind `after`, and whether more follow."""
        found = union(select(api_keys.c.tenant.label("name")), select(jobs.c.tenant), select(tenants.c.name)).subquery()
        query = select(found.c.name).order_by(found.c.name).limit(limit + 1)
        if after is not None:
            query = query.where(found.c.name > after)
        with self.database.read() as connection:
            names = list(connection.scalars(query))
            shown = names[:limit]
            settings = {row.name: _to_tenant(row) for row in connection.execute(select(tenants).where(_in(shown)))}
            load = _loads(connection, shown)
        return [(settings.get(name, Tenant(name=name)), load[name]) for name in shown], len(names) > limit

    def load(self, name: str) -> Load:
        with self.database.read() as connection:
            return _loads(connection, [name])[name]

    def change(self, name: str, changes: Mapping[str, Any], by: Actor | None = None) -> Tenant:
        """Set some of FIELDS, None for the configuration's. The ValueError names the fault, and nothing is changed."""
        check_name(name)
        check_settings(changes)
        with self.database.write() as connection:
            self.database.lock(connection, LOCK)
            before = _get(connection, name)
            if changes.get("job_class") is not None:
                _check_class(connection, name, changes["job_class"])
            self.database.insert_missing(connection, tenants, name=name)
            if changes:
                connection.execute(update(tenants).where(tenants.c.name == name).values(**changes))
            after = _get(connection, name)
            told = [{_word(field): getattr(tenant, field) for field in changes} for tenant in (before, after)]
            record(connection, by, "tenant.update", name, *told)
            return after


def check_name(name: str) -> None:
    """Raise ValueError for an invalid tenant's name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"tenant must be letters, digits, '-', '_' and '.', at most 64, got {name[:80]!r}")


def check_settings(changes: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting that is invalid."""
    for field in ("quota", "creates_per_minute"):
        value = changes.get(field)
        if value is not None and not 1 <= value <= MAX_COUNT:
            raise ValueError(f"{field} must be from 1 to {MAX_COUNT}, got {value}")
    weight = changes.get("weight")
    if weight is not None and not (0 < weight <= MAX_WEIGHT and math.isfinite(weight)):
        raise ValueError(f"weight must be above 0 and at most {MAX_WEIGHT:g}, got {weight}")
    word = changes.get("job_class")
    if word is not None and not CLASS.fullmatch(word):
        raise ValueError(f"class must be lower-case letters, digits, '-' and '_', at most 32, got {word[:80]!r}")


def _check_class(connection: Connection, name: str, wanted: str) -> None:
    """Raise ValueError for one class too many; the class of tenants that are given none counts too."""
    used = set(connection.scalars(select(tenants.c.job_class).where(tenants.c.name != name).distinct()))
    known = (used - {None}) | {DEFAULT_CLASS}
    if wanted not in known and len(known) >= MAX_CLASSES:
        raise ValueError(f"class must be one of {', '.join(sorted(known))}: there are {MAX_CLASSES}, got {wanted!r}")


def _get(connection: Connection, name: str) -> Tenant:
    row = connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()
    return Tenant(name=name) if row is None else _to_tenant(row)


def _to_tenant(row: Row[Any]) -> Tenant:
    return Tenant(name=row.name, **{field: getattr(row, field) for field in FIELDS})


def _loads(connection: Connection, names: list[str]) -> dict[str, Load]:
    counted = select(jobs.c.tenant, jobs.c.state, func.count()).where(jobs.c.tenant.in_(names))
    counted = counted.where(jobs.c.state.in_((QUEUED, IN_PROGRESS))).group_by(jobs.c.tenant, jobs.c.state)
    counts = {(tenant, state): count for tenant, state, count in connection.execute(counted)}
    return {
        name: Load(queued=counts.get((name, QUEUED), 0), in_progress=counts.get((name, IN_PROGRESS), 0))
        for name in names
    }


def _in(names: list[str]) -> Any:
    return tenants.c.name.in_(names)


def _word(field: str) -> str:
    """Return a field's name as the API has it."""
    return "class" if field == "job_class" else field
