"""The served model that makes a job, for metrics and the ledger, whatever name its client used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func
from sqlalchemy.sql.elements import ColumnElement

from .tables import jobs

UNKNOWN = "unknown"


def model_of(model: str | None, request: Mapping[str, Any]) -> str:
    """Return the label of a job's model; a release that served one model kept the client's name for it alone."""
    return str(model or request.get("model") or UNKNOWN)


def model_column() -> ColumnElement[str]:
    """Return the same label as an expression for queries."""
    return func.coalesce(jobs.c.model, jobs.c.request["model"].as_string(), UNKNOWN)
