"""Response models for the OpenAPI document; `show_video` and similar functions make the bodies."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ErrorDetail(BaseModel):
    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
        "video_generation_error",
    ]
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error envelope, used for every error that the application itself answers."""

    error: ErrorDetail


class VideoError(BaseModel):
    code: str
    message: str


class Cost(BaseModel):
    """A cost. amount: decimal, as text, so that nothing is rounded."""

    amount: str
    currency: str


class VideoUsage(BaseModel):
    """The engine time and work that a video has used. Steps that were lost with an engine are not in it.

    engine_seconds: its share of the time in which engines worked. device: null if no engine has begun.
    """

    engine_seconds: float
    device: Literal["cpu", "cuda"] | None
    steps_computed: int
    steps_skipped: int
    evaluations: int
    frames: int
    cost: Cost | None


class Video(BaseModel):
    """A video: OpenAI's 13 keys, and ours."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: VideoError | None
    seed: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    cache: str
    attempts: int
    resumed_from_step: int | None
    native_size: str
    native_frames: int
    model_revision: str | None
    model_fingerprint: str | None
    usage: VideoUsage | None  # once it has ended
    inference_time_s: float | None  # from when an engine took it until it ended
    retried_from: str | None


class Preview(BaseModel):
    """A small animation of the unfinished video, as base64."""

    b64_json: str
    mime: Literal["image/webp"]
    step: int
    index: int


class VideoEvent(BaseModel):
    """The `data` of a server-sent event; the fields beside `video` depend on the type."""

    type: Literal[
        "video.queued", "video.in_progress", "video.progress", "video.preview", "video.completed", "video.failed"
    ]
    video: Video
    position: int | None = None  # video.queued: how many are before it
    stage: Literal["encode", "denoise", "decode", "finish"] | None = None  # video.progress
    step: int | None = None
    num_steps: int | None = None
    eta_s: float | None = None
    preview: Preview | None = None  # video.preview


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    revision: str | None
    tasks: list[str]
    native_sizes: list[str]
    default_size: str
    default_seconds: str
    max_seconds: float
    max_frames: int
    fps: int
    default_steps: int
    default_guidance: float
    cache_presets: list[str]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class UsageBucket(BaseModel):
    """Usage of the jobs that ended on a day, of a tenant, by a model; null where these are not told apart."""

    object: Literal["usage.bucket"]
    day: str | None
    tenant: str | None
    model: str | None
    jobs: int
    completed: int
    failed: int
    engine_seconds: float
    video_seconds: float
    cost: Cost | None


class UsageList(BaseModel):
    object: Literal["list"]
    data: list[UsageBucket]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Generated(BaseModel):
    """A finished video: `video_bytes` is base64; `video_path` is a file in the operator's directory."""

    video_id: str
    video_bytes: str | None = None
    video_path: str | None = None


class Health(BaseModel):
    status: str
    store: str
    dispatchers: int
    engines: list[dict[str, Any]]
    models: list[str]


class Ready(BaseModel):
    status: str
