"""The route that lists the models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse

from ..auth import Reader

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", operation_id="listModels")
def page(request: Request, caller: Reader) -> JSONResponse:
    """List every name that clients may use, with native sizes and greatest length."""
    return JSONResponse({"object": "list", "data": [model.show() for model in request.app.state.catalog.all()]})


@router.get("/{model:path}", operation_id="retrieveModel")
def retrieve(request: Request, caller: Reader, model: Annotated[str, Path()]) -> JSONResponse:
    return JSONResponse(request.app.state.catalog.find(model).show())
