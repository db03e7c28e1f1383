"""Login for the page: exchanges a key for a cookie, which scripts cannot read and other sites cannot send.

SameSite=Strict keeps other sites from using the cookie. The origin is checked on top, since "same site" is wider than
"same host": a neighbour on another port or subdomain is of the same site.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from ...accounts.keys import ApiKey
from ...accounts.sessions import for_browsers
from ...wire.errors import ApiError, refusal

COOKIE = "skylapse_session"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
MAX_BODY_BYTES = 4096  # whoever logs in is nobody yet: little is read of what they send


class Login(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Failures:
    """Failed logins of an address within the last minute, in this process alone.

    Keys cannot be guessed; this keeps those who try from keeping the database busy. Behind a proxy that hides its
    clients they all share one count, so the bound is wide.
    """

    def __init__(self, limit: int = 20, window_s: float = 60.0, max_addresses: int = 1000) -> None:
        self.limit, self.window_s, self.max_addresses = limit, window_s, max_addresses
        self.times: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise ApiError 429 for an address with too many failures."""
        times, oldest = self.times.get(address, deque()), time.monotonic() - self.window_s
        while times and times[0] <= oldest:
            times.popleft()
        if len(times) >= self.limit:
            wait_s = times[0] - oldest
            raise ApiError(
                429, "Too many failed logins; wait a little.", code="rate_limit_exceeded", retry_after_s=wait_s
            )

    def count(self, address: str) -> None:
        self.times.setdefault(address, deque(maxlen=self.limit)).append(time.monotonic())
        self.times.move_to_end(address)
        if len(self.times) > self.max_addresses:
            self.times.popitem(last=False)


failures = Failures()
router = APIRouter(prefix="/session", include_in_schema=False)  # the page's own, no part of the API


def check_origin(request: Request) -> None:
    """Raise ApiError 403 for a change that was not sent by a page of this host; anyone may read.

    Browsers say who sends a request and let no script say otherwise. `Sec-Fetch-Site` is enough where there is one
    (https and localhost), since a proxy may have rewritten the host; elsewhere `Origin` has to name the host that was
    asked. A client that sends neither is no browser of today, and has an Authorization header to use instead.
    """
    if request.method in SAFE_METHODS:
        return
    site, host = request.headers.get("sec-fetch-site"), request.headers.get("host", "")
    if site is not None:
        is_own = site == "same-origin"
    else:
        is_own = host != "" and _host(request.headers.get("origin", "")) == host.lower()
    if not is_own:
        raise ApiError(403, "A session's cookie is for the page of this server alone.", code="wrong_origin")


@router.post("")
async def log_in(request: Request) -> Response:
    """Open a session for {"key": ...}; an older one of the same browser ends."""
    check_origin(request)
    context, address = request.app.state.context, request.client.host if request.client else ""
    failures.check(address)
    login = await _read_login(request)
    key: ApiKey | None = await asyncio.to_thread(context.keys.find, login.key)
    if key is None:
        failures.count(address)
        raise ApiError(401, "This key is not known here, or is no longer valid.", code="invalid_api_key", param="key")
    key = for_browsers(key)
    if not key.scopes:
        message = "This key is for operators alone, and no browser is given their scope: send it with each request."
        raise ApiError(403, message, code="insufficient_permissions", param="key", type="permission_error")
    if old := request.cookies.get(COOKIE):
        await asyncio.to_thread(context.sessions.close, old)
    valid_s = context.config.session_s
    token = await asyncio.to_thread(context.sessions.open, key, valid_s)
    response = _answer(key)
    response.set_cookie(COOKIE, token, max_age=int(valid_s), **_attributes(request))
    return response


@router.delete("", status_code=204)
def log_out(request: Request) -> Response:
    """End the session, if there is one."""
    check_origin(request)
    if token := request.cookies.get(COOKIE):
        request.app.state.context.sessions.close(token)
    response = Response(status_code=204, headers={"cache-control": "no-store"})
    response.delete_cookie(COOKIE, **_attributes(request))
    return response


@router.get("")
def current(request: Request) -> Response:
    """Return the tenant that is logged in, or null if none is, which is no error."""
    token = request.cookies.get(COOKIE)
    return _answer(request.app.state.context.sessions.find(token) if token else None)


async def _read_login(request: Request) -> Login:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, 'Log in with JSON: {"key": ...}.', code="unsupported_media_type")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "That is too much for a key.", code="body_too_large")
    try:
        return Login.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, Login) from None


def _answer(key: ApiKey | None) -> JSONResponse:
    tenant, scopes = (None, ()) if key is None else (key.tenant, key.scopes)
    body = {"object": "session", "tenant": tenant, "scopes": list(scopes)}
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _attributes(request: Request) -> dict[str, Any]:
    """Return the cookie's attributes. The proxy that ended https says so in a header; a lie hurts only the liar."""
    proxied = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    return dict(path="/", httponly=True, samesite="strict", secure=(proxied or request.url.scheme) == "https")


def _host(origin: str) -> str:
    """Return the host and port of an origin; "" for "null" and for an invalid one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
