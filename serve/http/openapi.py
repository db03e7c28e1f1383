"""The OpenAPI document: adds the bodies, answers, errors and keys that FastAPI does not see."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..jobs.create import MAX_KEY_CHARACTERS
from ..wire.admin_responses import ADMIN_ANSWERS, ADMIN_BODIES, ADMIN_ERRORS
from ..wire.requests import VIDEO_ID, CreateVideo, EditVideo, ExtendVideo, Generation, ImageReference, RemixVideo
from ..wire.responses import (
    Error,
    Generated,
    Health,
    Model,
    ModelList,
    Ready,
    UsageList,
    Video,
    VideoDeleted,
    VideoEvent,
    VideoList,
)

BODIES: dict[str, tuple[type[BaseModel], str | None]] = {  # operation -> (its fields, the name of its file)
    "createVideo": (CreateVideo, "input_reference"),
    "editVideo": (EditVideo, "video"),
    "extendVideo": (ExtendVideo, "video"),
    "remixVideo": (RemixVideo, None),
    "generateVideo": (Generation, "input_reference"),
}
MAKES = ("createVideo", "editVideo", "extendVideo", "remixVideo")
ANSWERS: dict[str, type[BaseModel]] = {
    **dict.fromkeys((*MAKES, "retrieveVideo", "cancelVideo"), Video),
    "listVideos": VideoList,
    "deleteVideo": VideoDeleted,
    "listModels": ModelList,
    "retrieveModel": Model,
    "getUsage": UsageList,
    "health": Health,
    "ready": Ready,
    **ADMIN_ANSWERS,
}
BINARY = {"type": "string", "format": "binary"}
EVENT = {  # one of a stream
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "Where to go on from, as Last-Event-ID."},
        "event": {"type": "string", "description": "The type once more."},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/VideoEvent"},
        },
        "retry": {"type": "integer"},
    },
}
FILE = {"video/mp4": BINARY, "image/webp": BINARY}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {  # operation -> status -> media type -> its schema
    "downloadVideo": {"200": FILE, "206": FILE, "304": {}, "307": {}},
    "streamVideoEvents": {"200": {"text/event-stream": EVENT}},
    "metrics": {"200": {"text/plain": {"type": "string"}}},
}
PARAMETERS: dict[str, dict[str, Any]] = {  # what FastAPI does not know of them
    "video_id": {"type": "string", "pattern": f"^{VIDEO_ID.pattern}$"},
    "job_id": {"type": "string", "pattern": f"^{VIDEO_ID.pattern}$"},
    "Idempotency-Key": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
}
HEADERS: dict[str, dict[str, Any]] = {
    "x-request-id": {"description": "Names the request in the logs.", "required": True, "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds, 60 at most.", "required": True, "schema": {"type": "integer"}},
    "openai-poll-after-ms": {
        "description": "When to ask again; not there once the video has ended.",
        "schema": {"type": "integer"},
    },
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
    "503": "The store, or a decoder for uploads, cannot be had; `Retry-After` tells when to come back.",
}
ALWAYS = ("401", "403", "503")
CREATES = ("400", "404", "408", "409", "413", "415", "429")
ERRORS = {
    **dict.fromkeys(MAKES, (*CREATES, *ALWAYS)),
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
    "getUsage": ("400", *ALWAYS),
    "metrics": ALWAYS,
    **ADMIN_ERRORS,
}
LINKS = ("retrieveVideo", "cancelVideo", "remixVideo", "deleteVideo", "streamVideoEvents", "downloadVideo")


def describe_api(app: FastAPI) -> None:
    """Make `app.openapi()` return the whole document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    schemas = _schemas()
    document["components"] = {
        "schemas": schemas,
        "headers": HEADERS,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation, schemas)
    return document


def _schemas() -> dict[str, Any]:
    """Return the schemas of all bodies and answers, by name."""
    answers: list[type[BaseModel]] = sorted({Error, Generated, VideoEvent, *ANSWERS.values()}, key=_name)
    videos = (schema for schema, _ in BODIES.values())
    bodies: list[type[BaseModel]] = sorted({ImageReference, *videos, *ADMIN_BODIES.values()}, key=_name)
    template = "#/components/schemas/{model}"
    _, shown = models_json_schema([(model, "serialization") for model in answers], ref_template=template)
    _, asked = models_json_schema([(model, "validation") for model in bodies], ref_template=template)
    for schema, file in BODIES.values():
        if file == "input_reference":  # it has become a file before the fields are looked at
            asked["$defs"][_name(schema)]["properties"][file] = _reference(ImageReference)
    return {**shown["$defs"], **asked["$defs"]}


def _complete(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    name = operation["operationId"]
    if path.startswith("/v1/"):
        operation["security"] = [{"key": []}]
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = PARAMETERS.get(parameter["name"], parameter["schema"])
    if name in BODIES:
        operation["requestBody"] = {"required": True, "content": _bodies(*BODIES[name], schemas)}
    if name in ADMIN_BODIES:
        content = {"application/json": {"schema": _reference(ADMIN_BODIES[name])}}
        operation["requestBody"] = {"required": name != "rotateKey", "content": content}
    responses: dict[str, Any] = {}
    if name in ANSWERS:
        responses["200"] = _response("As asked.", {"application/json": _reference(ANSWERS[name])})
    elif name == "generateVideo":
        types = {"application/json": _reference(Generated), "video/mp4": BINARY}
        responses["200"] = _response("The video, or where it is.", types)
    for status, types in OTHERS.get(name, {}).items():
        responses[status] = _response("As asked.", types)
    for status in ERRORS[name]:
        model = Ready if name == "ready" else Error
        headers = ("retry-after",) if status in ("429", "503") else ()
        responses[status] = _response(REASONS[status], {"application/json": _reference(model)}, *headers)
    if ANSWERS.get(name) is Video:
        responses["200"]["headers"] |= _headers("openai-poll-after-ms")
    if name in MAKES:
        link = {"parameters": {"video_id": "$response.body#/id"}}
        responses["200"]["links"] = {other: {"operationId": other, **link} for other in LINKS if other != name}
    operation["responses"] = responses


def _bodies(schema: type[BaseModel], file: str | None, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return a body as JSON and as a form, in which objects are named like `video[id]` and the file may be a part."""
    form: dict[str, Any] = {"schema": _reference(schema)}
    types = {"application/json": {"schema": _reference(schema)}, "application/x-www-form-urlencoded": form}
    if file is None:
        return {**types, "multipart/form-data": form}
    form["encoding"] = {file: {"style": "deepObject", "explode": True}}
    fields = schemas[_name(schema)]
    parts = {**fields["properties"], file: {"anyOf": [BINARY, fields["properties"][file]]}}
    return {**types, "multipart/form-data": {**form, "schema": {**fields, "properties": parts}}}


def _response(description: str, types: dict[str, Any], *headers: str) -> dict[str, Any]:
    response: dict[str, Any] = {"description": description, "headers": _headers("x-request-id", *headers)}
    if types:
        response["content"] = {kind: {"schema": schema} for kind, schema in types.items()}
    return response


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{_name(model)}"}


def _name(model: type[BaseModel]) -> str:
    return model.__name__
