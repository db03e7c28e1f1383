"""The bodies of the Videos API: a client's requests, and the answers about its jobs.

Source: OpenAI's OpenAPI document (2026-08-21) and its SDKs as they behave. All 13 keys of a video are always there;
ours come on top, which the SDKs keep. Numbers may come as text, since forms have nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
)

from ...runtime.cache.spec import check_cache
from ..core.prices import Cost
from ..intake.multipart import MAX_IMAGE_URL_BYTES
from ..store.jobs import Job
from ..store.tables import COMPLETED, FAILED

MAX_PROMPT_CHARACTERS = 10_000  # OpenAI's bound is 32,000; a text encoder reads 512 tokens
MAX_SIDE, MAX_SECONDS = 4096, 120.0


def _text(value: Any) -> Any:
    """Return a number as the text that the SDKs' types ask for: seconds=4 as "4"."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_a_size(value: str) -> str:
    if not all(16 <= int(side) <= MAX_SIDE and not int(side) % 2 for side in value.split("x")):
        raise ValueError(f"width and height must be even and from 16 to {MAX_SIDE}")
    return value


def _is_a_length(value: str) -> str:
    if not 0 < float(value) <= MAX_SECONDS:
        raise ValueError(f"must be above 0 and at most {MAX_SECONDS:g}")
    return value


Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[
    str,
    StringConstraints(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$"),
    AfterValidator(_is_a_size),
    Field(examples=["1280x720"]),
]
VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")
VideoId = Annotated[str, StringConstraints(pattern=rf"^{VIDEO_ID.pattern}$"), Field(examples=["video_" + 32 * "0"])]
Strength = Annotated[Real, Field(gt=0, le=1)]
SECONDS = r"^[0-9]{1,3}(\.[0-9]{1,3})?$"
Seconds = Annotated[
    str,
    BeforeValidator(_text),
    StringConstraints(pattern=SECONDS),
    AfterValidator(_is_a_length),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": SECONDS},
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
            ]
        }
    ),
]


class Sampling(BaseModel):
    """The fields of every request that makes a clip beside OpenAI's; None: the model's own, or the source's.

    Unknown fields are refused: a mistyped one costs a job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Prompt
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)] = ""
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None  # None: drawn when the job is made
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[Real, Field(ge=0, le=100)] | None = None
    cache: Annotated[str, StringConstraints(max_length=200)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    partial_images: Annotated[int, Field(ge=0, le=20)] = 0  # previews on the way
    webhook_url: Annotated[str, StringConstraints(min_length=1, max_length=2048)] | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, value: str, info: Any) -> str:
        if "\0" in value:
            raise ValueError("must not contain null characters")
        if info.field_name == "prompt" and not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("cache")
    @classmethod
    def _is_a_cache(cls, value: str | None) -> str | None:
        if value is not None:
            check_cache(value)
        return value


class CreateVideo(Sampling):
    """Body of POST /v1/videos; the first frame may come as the file `input_reference`."""

    seconds: Seconds | None = None
    size: Size | None = None
    num_frames: Annotated[int, Field(ge=1, le=1025)] | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    resize: bool = True  # False: refuse a size that is not the model's own


class ImageReference(BaseModel):
    """A picture within the request, where it is not sent as a file; `read_body` makes a file of it either way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_url: Annotated[
        str,
        StringConstraints(pattern="^data:", max_length=MAX_IMAGE_URL_BYTES),
        Field(examples=["data:image/png;base64,..."]),
    ]


class VideoReference(BaseModel):
    """A finished video of the same tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: VideoId


class RemixVideo(Sampling):
    """Body of POST /v1/videos/{id}/remix: the clip again, by another prompt; strength: how much of it is made anew."""

    strength: Strength = 0.8


class EditVideo(RemixVideo):
    """Body of POST /v1/videos/edits: a remix of a clip that is named or sent, as the file `video`."""

    video: VideoReference | None = None


class ExtendVideo(Sampling):
    """Body of POST /v1/videos/extensions: `seconds` more of a clip that is named or sent, as the file `video`."""

    seconds: Seconds
    video: VideoReference | None = None


class Generation(Sampling):
    """Body of POST /v1/videos/generations, as TensorRT-LLM and MLPerf's load generator speak it: the client waits."""

    size: Size | None = None
    seconds: Seconds | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=1025)] | None = None
    guidance_scale_2: Annotated[Real, Field(ge=0, le=100)] | None = None
    boundary_ratio: Annotated[Real, Field(ge=0, le=1)] | None = None  # only the checkpoint's own
    latent_path: Annotated[str, StringConstraints(max_length=1024)] | None = None
    output_format: Literal["mp4", "auto"] = "auto"
    response_format: Literal["video_bytes", "video_path", "raw"] = "video_bytes"

    @property
    def video(self) -> CreateVideo:
        """Return the same as a request for POST /v1/videos."""
        mine = {"guidance_scale_2", "boundary_ratio", "latent_path", "output_format", "response_format"}
        return CreateVideo(**self.model_dump(exclude=mine))


SETTINGS = ("negative_prompt", "num_inference_steps", "guidance_scale", "cache")  # with these it can be made again


def show_video(job: Job, expires_after_s: float | None = None) -> dict[str, Any]:
    """Return a job as a Video object; expires_after_s: how long artifacts are kept once it has completed."""
    request, has_completed = job.request, job.state == COMPLETED
    ended_at = int(job.ended_at) if has_completed and job.ended_at is not None else None
    error = {"code": job.error_code, "message": job.error_message or job.error_code} if job.state == FAILED else None
    return {
        "id": job.id,
        "object": "video",
        "model": request["model"],
        "status": job.state,
        "progress": percent(job),
        "created_at": int(job.created_at),
        "completed_at": ended_at,
        "expires_at": None if ended_at is None or expires_after_s is None else ended_at + int(expires_after_s),
        "prompt": request["prompt"],
        "size": request["size"],
        "seconds": request["seconds"],
        "remixed_from_video_id": request.get("remixed_from_video_id"),
        "error": error,
        "seed": request["seed"],
        **{name: request.get(name) for name in SETTINGS},
        "attempts": job.attempts,
        "resumed_from_step": job.resumed_from_step,
        "native_size": request.get("native_size"),
        "native_frames": request.get("native_frames"),
        "retried_from": request.get("retried_from"),
        "model_revision": job.revision,
        "model_fingerprint": job.fingerprint,
        "usage": None if job.usage is None else _show_used(job.usage),
        "inference_time_s": None if job.ended_at is None or job.started_at is None else job.ended_at - job.started_at,
    }


def _show_used(usage: dict[str, Any]) -> dict[str, Any]:
    """Return a job's whole use of engines from its row."""
    nanos, currency = usage["cost_nanos"], usage["currency"]
    return {
        "engine_seconds": round(usage["engine_seconds"], 6),
        **{name: usage[name] for name in ("device", "steps_computed", "steps_skipped", "evaluations", "frames")},
        "cost": None if nanos is None else Cost(nanos, currency).show(),
    }


def percent(job: Job) -> int:
    """Return the percentage of steps that are done; 100 only once the file is there."""
    if job.state == COMPLETED:
        return 100
    return min(99, 100 * job.step // job.num_steps) if job.num_steps else 0


def show_page(videos: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return a list; without `last_id` the SDKs' pagination would end behind the first page."""
    first, last = (videos[0]["id"], videos[-1]["id"]) if videos else (None, None)
    return {"object": "list", "data": list(videos), "first_id": first, "last_id": last, "has_more": has_more}
