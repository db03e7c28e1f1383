"""The server under load: where it is, which fields it takes, and whether it tells of previews."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from ..sheet import OutOfTime

OPENAI = frozenset({"prompt", "model", "seconds", "size"})  # what OpenAI's own service took
OFTEN = OPENAI | {"negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"}
SYNCHRONOUS = OFTEN | {"guidance_scale_2", "boundary_ratio"}  # TensorRT-LLM's /v1/videos/generations
DETECT_S = 10.0
CREATE, EVENTS = "/v1/videos", "/v1/videos/{video_id}/events"


class GaveUp(OutOfTime):
    """The server is not there, or has gone: the run ends, and what there is of it is kept."""


@dataclass(frozen=True)
class Target:
    """accepts: names of fields that are sent; others of a workload are left out, since servers may refuse them.

    timeout_s: from when a request is due; http_timeout_s: of one HTTP exchange, after which the server hangs.
    poll_share: a request is asked after when so much more of its age has passed; poll_rate: of all requests together.
    """

    url: str
    key: str | None = None
    accepts: frozenset[str] = OPENAI
    form: bool = False
    endpoint: Literal["videos", "generations"] = "videos"
    model: str | None = None
    has_events: bool = False
    engine: str = "unknown"
    previews: int = 0
    fetch: bool = False
    timeout_s: float = 600.0
    http_timeout_s: float = 30.0
    poll_share: float = 0.05
    poll_least_s: float = 0.02
    poll_most_s: float = 2.0
    poll_rate: float = 100.0

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def body(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Of one request, in the server's terms: seconds where it knows no frames."""
        asked = dict(fields)
        if self.model is not None:
            asked["model"] = self.model
        if "num_frames" in asked and "num_frames" not in self.accepts:
            asked["seconds"] = f"{asked['num_frames'] / asked.get('fps', 16):.3f}".rstrip("0").rstrip(".")
        if self.previews and "partial_images" in self.accepts:
            asked["partial_images"] = self.previews
        if self.endpoint == "generations":
            return {name: value for name, value in asked.items() if name in SYNCHRONOUS | {"seconds", "model"}}
        return {name: value for name, value in asked.items() if name in self.accepts}

    def dropped(self, fields: Mapping[str, Any]) -> list[str]:
        """Which fields the server is not told; those that `seconds` stands for do not count."""
        sent = set(self.body(fields)) | ({"num_frames", "fps"} if "num_frames" not in self.accepts else set())
        return sorted(set(fields) - sent)


def checked_url(text: str) -> str:
    """ValueError where it is no http URL; without the /v1 that SDKs' base URLs end with."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"url must begin with http:// or https:// and name a host, got {text!r}")
    return text.rstrip("/").removesuffix("/v1")


async def detect(target: Target, fields: Literal["auto", "openai", "all"] = "auto") -> Target:
    """With what the server's own OpenAPI document says it takes. GaveUp where nothing answers at all."""
    timeout = aiohttp.ClientTimeout(total=min(DETECT_S, target.http_timeout_s))
    document: Any = None
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=target.headers) as session,
            session.get(f"{target.url}/openapi.json") as response,
        ):
            text = await response.read()
            document = _object(text) if response.status == 200 else None
    except TimeoutError:
        raise GaveUp(f"{target.url} does not answer within {timeout.total:g} s") from None
    except aiohttp.ClientConnectorError as error:
        raise GaveUp(f"nothing answers at {target.url}: {error.strerror or error}") from None
    except aiohttp.ClientError:
        document = None  # it answers, if not to this
    found = _described(target, document)
    if fields == "openai":
        return replace(found, accepts=OPENAI)
    if fields == "all":
        return replace(found, accepts=found.accepts | OFTEN)
    return found


def _object(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None


def _described(target: Target, document: Any) -> Target:
    """Anything may stand in a document of somebody else's: what is not as expected tells us nothing."""
    try:
        operation = document["paths"][CREATE]["post"]
        contents = operation["requestBody"]["content"]
        names: set[str] = set()
        for content in contents.values():
            names |= _properties(content["schema"], document, 4)
        engine = str(document["info"]["title"])[:80]
        has_events = EVENTS in document["paths"]
    except (KeyError, TypeError, AttributeError):
        return target
    if "prompt" not in names:
        return replace(target, engine=engine)
    form = "application/json" not in contents
    return replace(target, accepts=frozenset(names), form=form, has_events=has_events, engine=engine)


def _properties(schema: Any, document: Any, depth: int) -> set[str]:
    if depth and "$ref" in schema:
        return _properties(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document, depth - 1)
    names = set(schema.get("properties", {}))
    for part in [*schema.get("allOf", []), *schema.get("anyOf", []), *schema.get("oneOf", [])] if depth else []:
        names |= _properties(part, document, depth - 1)
    return names


def detected(target: Target, fields: Literal["auto", "openai", "all"] = "auto") -> Target:
    return asyncio.run(detect(target, fields))
