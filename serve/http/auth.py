"""Authenticates callers by a key in the Authorization header, or by the cookie that a browser got for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ..accounts.keys import OPERATOR, ApiKey
from ..wire.errors import ApiError
from .client_address import is_from_loopback
from .routes.session import COOKIE, check_origin


@dataclass(frozen=True)
class Caller:
    """An authenticated caller: the tenant owns jobs, files and quotas; the key decides what may be done with them."""

    tenant: str
    key: ApiKey


def _may(scope: str) -> Callable[[Request], Caller]:
    def find(request: Request) -> Caller:
        key = _key(request)
        if scope not in key.scopes and (scope == OPERATOR or "admin" not in key.scopes):
            message = f"This key may not {'administer the service' if scope == OPERATOR else scope}."
            raise ApiError(403, message, code="insufficient_permissions", type="permission_error")
        return Caller(key.tenant, key)

    return find


def _key(request: Request) -> ApiKey:
    """Return the caller's key. Raises ApiError 401, which repeats neither what was sent nor why it is wrong."""
    context = request.app.state.context
    kind, _, text = request.headers.get("authorization", "").partition(" ")
    if kind:
        key = context.keys.find(text.strip()) if kind.lower() == "bearer" else None
    elif cookie := request.cookies.get(COOKIE):
        check_origin(request)
        key = context.sessions.find(cookie)
    else:
        key = None
    if key is None:
        message = "Incorrect API key provided, or none: it goes into the header 'Authorization: Bearer ...'."
        raise ApiError(401, message, code="invalid_api_key", type="authentication_error")
    assert isinstance(key, ApiKey)
    request.app.state.key_use.note(key.id)
    return key


def is_operator(request: Request, key: ApiKey) -> bool:
    """Return whether this key sees all tenants: by its scope alone, which a browser's cookie never carries."""
    return "operator" in key.scopes and "authorization" in request.headers


def _reads_usage(request: Request) -> Caller:
    key = _key(request)
    if is_operator(request, key):
        return Caller(key.tenant, key)
    return _may("read")(request)


def check_scrapes(request: Request) -> None:
    """Let everybody on loopback read /metrics, others only with a key of scope operator. Raises ApiError 401, 403."""
    if request.app.state.context.config.metrics_open or is_from_loopback(request):
        return
    if not is_operator(request, _key(request)):
        message = "Metrics need a key of scope operator, or metrics_open in the service's configuration."
        raise ApiError(403, message, code="insufficient_permissions", type="permission_error")


Reader = Annotated[Caller, Depends(_may("read"))]
Writer = Annotated[Caller, Depends(_may("write"))]
Operator = Annotated[Caller, Depends(_may(OPERATOR))]  # of all tenants; a cookie never has the scope
UsageReader = Annotated[Caller, Depends(_reads_usage)]
