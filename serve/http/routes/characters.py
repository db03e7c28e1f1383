"""Characters, which the SDKs know and this service does not make: refused with a message, not by an unknown URL."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ...intake.body import read_body
from ...wire.errors import ApiError
from ..auth import Reader, Writer

router = APIRouter(prefix="/v1/videos/characters", tags=["videos"])


@router.post("", operation_id="createCharacter")
async def create(request: Request, caller: Writer) -> JSONResponse:
    """Not supported: always refused."""
    config = request.app.state.context.config
    (await read_body(request, max_bytes=config.max_body_bytes, folder=config.scratch)).close()
    raise _unsupported()


@router.get("/{character_id}", operation_id="retrieveCharacter")
def retrieve(caller: Reader, character_id: str) -> JSONResponse:
    """Not supported: always refused."""
    raise _unsupported()


def _unsupported() -> ApiError:
    return ApiError(400, "Characters are not supported; an image goes into 'input_reference'.", code="unsupported")
