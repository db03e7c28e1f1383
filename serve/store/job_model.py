"""The canonical id of the model that makes a job, for metrics and the ledger, whatever name its client used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func
from sqlalchemy.sql.elements import ColumnElement

from .tables import jobs

MODEL_ID = "model_id"  # in a request; jobs of earlier releases have the client's name alone
UNKNOWN = "unknown"


def model_of(request: Mapping[str, Any]) -> str:
    """Of a job's request."""
    return str(request.get(MODEL_ID) or request.get("model") or UNKNOWN)


def model_column() -> ColumnElement[str]:
    """The same, for queries."""
    names = (jobs.c.request[name].as_string() for name in (MODEL_ID, "model"))
    return func.coalesce(*names, UNKNOWN)
