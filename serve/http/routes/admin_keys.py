"""Operators' routes for keys of all tenants: list, create, change, rotate, revoke."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from ...accounts.keys import KeyNotFound
from ...jobs.services import Context
from ...wire.admin_requests import ChangeKey, CreateKey, RotateKey, show_key
from ...wire.errors import ApiError
from ...wire.requests import show_page
from ..auth import Caller, Operator
from .admin import After, Limit, actor, read_json, refusing

router = APIRouter(prefix="/v1/admin/keys", tags=["operators"])
KEY_ID = re.compile("key_[0-9a-f]{16}")
KeyId = Annotated[str, Path(description="A key's id, which is not its text.")]


@router.get("", operation_id="listKeys")
def page(request: Request, caller: Operator, limit: Limit = 20, after: After = None) -> JSONResponse:
    """List every key that was ever made, the newest first, without its text."""
    try:
        keys, has_more = request.app.state.context.keys.page(limit, after)
    except KeyNotFound:
        message = "Invalid 'after': there is no such key."
        raise ApiError(400, message, code="invalid_value", param="after") from None
    return JSONResponse(show_page([show_key(key) for key in keys], has_more))


@router.post("", operation_id="createKey")
async def create(request: Request, caller: Operator) -> JSONResponse:
    """Create a key; its text is in this answer alone."""
    asked = await read_json(request, CreateKey)
    return await run_in_threadpool(_create, request, caller, asked)


def _create(request: Request, caller: Caller, asked: CreateKey) -> JSONResponse:
    context: Context = request.app.state.context
    with refusing():
        key, text = context.keys.create(**dict(asked), by=actor(request, caller))
    return JSONResponse(show_key(key, text))


@router.patch("/{key_id}", operation_id="changeKey")
async def change(request: Request, caller: Operator, key_id: KeyId) -> JSONResponse:
    """Name a valid key, or set its end."""
    asked = await read_json(request, ChangeKey)
    return await run_in_threadpool(_change, request, caller, key_id, asked)


def _change(request: Request, caller: Caller, key_id: str, asked: ChangeKey) -> JSONResponse:
    context: Context = request.app.state.context
    with _of_a_valid_key(key_id):
        key = context.keys.change(key_id, asked.model_dump(exclude_unset=True), actor(request, caller))
    return JSONResponse(show_key(key))


@router.post("/{key_id}/rotate", operation_id="rotateKey")
async def rotate(request: Request, caller: Operator, key_id: KeyId) -> JSONResponse:
    """Replace a key, which ends after `overlap_s`, by a new one of the same rights, whose text only this answer has."""
    asked = await read_json(request, RotateKey)
    return await run_in_threadpool(_rotate, request, caller, key_id, asked)


def _rotate(request: Request, caller: Caller, key_id: str, asked: RotateKey) -> JSONResponse:
    context: Context = request.app.state.context
    with _of_a_valid_key(key_id):
        key, text = context.keys.rotate(key_id, asked.overlap_s, actor(request, caller))
    return JSONResponse(show_key(key, text))


@router.delete("/{key_id}", operation_id="revokeKey")
def revoke(request: Request, caller: Operator, key_id: KeyId) -> JSONResponse:
    """End a valid key at once, and the sessions of browsers that were opened with it."""
    if not KEY_ID.fullmatch(key_id) or not request.app.state.context.keys.revoke(key_id, actor(request, caller)):
        raise _no_key()
    return JSONResponse({"id": key_id, "object": "key.deleted", "deleted": True})


@contextmanager
def _of_a_valid_key(key_id: str) -> Iterator[None]:
    """Answer 404 if the store has no valid key of this id."""
    if not KEY_ID.fullmatch(key_id):
        raise _no_key()
    try:
        with refusing():
            yield
    except KeyNotFound:
        raise _no_key() from None


def _no_key() -> ApiError:
    return ApiError(404, "There is no valid key of this id.", code="key_not_found", param="key_id")
