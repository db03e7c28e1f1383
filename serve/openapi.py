"""What the OpenAPI document says beyond what FastAPI sees: bodies, answers, errors, keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .answers import Error, Generated, Health, Model, ModelList, Ready, Video, VideoDeleted, VideoList
from .schema import VIDEO_ID, CreateVideo, EditVideo, ExtendVideo, Generation, RemixVideo

BODIES: dict[str, tuple[type[BaseModel], str | None]] = {  # operation -> (its fields, the name of its file)
    "createVideo": (CreateVideo, "input_reference"),
    "editVideo": (EditVideo, "video"),
    "extendVideo": (ExtendVideo, "video"),
    "remixVideo": (RemixVideo, None),
    "generateVideo": (Generation, "input_reference"),
}
ANSWERS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("createVideo", "retrieveVideo", "cancelVideo", "editVideo", "extendVideo", "remixVideo"), Video),
    "listVideos": VideoList,
    "deleteVideo": VideoDeleted,
    "listModels": ModelList,
    "retrieveModel": Model,
    "health": Health,
    "ready": Ready,
}
OTHERS: dict[str, dict[str, tuple[str, ...]]] = {  # operation -> status -> media types
    "downloadVideo": {
        "200": ("video/mp4", "image/webp"),
        "206": ("video/mp4", "image/webp"),
        "304": (),
        "307": (),
    },
    "streamVideoEvents": {"200": ("text/event-stream",)},
    "metrics": {"200": ("text/plain",)},
}
REASONS = {
    "400": "Something of the request is wrong; `param` names it.",
    "401": "No valid key.",
    "403": "The key may not do this.",
    "404": "There is none such.",
    "408": "The body took too long to arrive.",
    "409": "The Idempotency-Key was used for another request.",
    "413": "The body is too large.",
    "415": "The body is neither a form nor JSON.",
    "416": "The range is not one within the file.",
    "429": "A quota or a rate is used up; `Retry-After` tells when to come back.",
    "500": "The video could not be made.",
    "503": "The store does not answer; `Retry-After` tells when to come back.",
}
ALWAYS = ("401", "403", "503")
CREATES = ("400", "404", "408", "409", "413", "415", "429")
ERRORS = {
    **dict.fromkeys(("createVideo", "editVideo", "extendVideo", "remixVideo"), (*CREATES, *ALWAYS)),
    "generateVideo": (*CREATES, *ALWAYS, "500"),
    "createCharacter": ("400", "408", "413", "415", *ALWAYS),
    "retrieveCharacter": ("400", *ALWAYS),
    "listVideos": ("400", *ALWAYS),
    "downloadVideo": ("400", "404", "416", *ALWAYS),
    **dict.fromkeys(("retrieveVideo", "cancelVideo", "deleteVideo", "streamVideoEvents"), ("404", *ALWAYS)),
    "retrieveModel": ("404", *ALWAYS),
    "listModels": ALWAYS,
    "health": (),
    "ready": ("503",),
    "metrics": ("503",),
}
LINKS = {"createVideo": ("retrieveVideo", "cancelVideo", "deleteVideo", "streamVideoEvents", "downloadVideo")}


def describe_api(app: FastAPI) -> None:
    """Let `app.openapi()` give the whole document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    answers: list[type[BaseModel]] = sorted({Error, Generated, *ANSWERS.values()}, key=_name)
    bodies = sorted({schema for schema, _ in BODIES.values()}, key=_name)
    template = "#/components/schemas/{model}"
    _, shown = models_json_schema([(model, "serialization") for model in answers], ref_template=template)
    _, asked = models_json_schema([(model, "validation") for model in bodies], ref_template=template)
    document["components"] = {
        "schemas": {**shown["$defs"], **asked["$defs"]},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation, document["components"]["schemas"])
    return document


def _complete(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    name = operation["operationId"]
    if path.startswith("/v1/"):
        operation["security"] = [{"key": []}]
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "video_id":
            parameter["schema"] = {"type": "string", "pattern": f"^{VIDEO_ID.pattern}$"}
    if name in BODIES:
        schema, file = BODIES[name]
        reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
        form = reference if file is None else _open(schemas[schema.__name__], file)
        operation["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "application/json": {"schema": reference}},
        }
    responses: dict[str, Any] = {}
    if name in ANSWERS:
        responses["200"] = _json(ANSWERS[name], "As asked.")
    elif name == "generateVideo":
        responses["200"] = _json(Generated, "The video, or where it is.")
        responses["200"]["content"]["video/mp4"] = {"schema": {"type": "string", "format": "binary"}}
    for status, types in OTHERS.get(name, {}).items():
        binary = {"schema": {"type": "string", "format": "binary"}}
        responses[status] = {"description": "As asked."} | ({"content": dict.fromkeys(types, binary)} if types else {})
    for status in ERRORS[name]:
        responses[status] = _json(Ready if name == "ready" else Error, REASONS[status])
    for other in LINKS.get(name, ()):
        link = {"operationId": other, "parameters": {"video_id": "$response.body#/id"}}
        responses["200"].setdefault("links", {})[other] = link
    operation["responses"] = responses


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _open(schema: dict[str, Any], file: str) -> dict[str, Any]:
    """The fields, with the file among them."""
    properties = {**schema["properties"], file: {"type": "string", "format": "binary"}}
    return {**schema, "properties": properties}


def _json(model: type[BaseModel], description: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}
