"""Makes a durable job of a client's request: checked against the model, its files stored first, its row last."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...runtime.core.request import VideoRequest
from ..http.auth import Caller
from ..store.jobs import Bounds, IdempotencyConflict, Job, QuotaExceeded, RateExceeded, StoreFull, new_job_id
from ..wire.errors import ApiError
from ..wire.requests import CreateVideo, ExtendVideo, RemixVideo, Sampling
from .artifacts import ArtifactStore
from .job_request import EXTEND, GENERATE, extend, input_key
from .output_shape import shape_of
from .safe_http import check_url
from .served_models import ServedModel
from .services import Context
from .source_video import Source

TOKENS_PER_S = 4000.0  # of an engine that has not told yet: the demo model on two CPU cores
MAX_KEY_CHARACTERS = 255


@dataclass
class Draft:
    """A job that is about to be made: `request` as its row will have it, and the files that it shows the model."""

    kind: str
    model: ServedModel
    request: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)  # name -> contents
    digests: dict[str, str] = field(default_factory=dict)  # of what the client sent, for idempotency
    job_id: str = field(default_factory=new_job_id)


def draft_video(asked: CreateVideo, model: ServedModel) -> Draft:
    """Draft a job for POST /v1/videos. Raises ApiError 400 for what the model cannot make."""
    shape = shape_of(asked, model.native_sizes, model.defaults, model.limits)
    return _draft(GENERATE, asked, model, shape.describe(), shape.native_frames)


def draft_remake(kind: str, asked: RemixVideo, model: ServedModel, source: Source) -> Draft:
    """Draft a remix or an edit: of the source's size and length, made anew from its noised frames."""
    if model.needs_image:
        raise ApiError(400, "This model makes no video from another one.", code="unsupported", param="video")
    shape = source.shape_for(model)
    draft = _draft(kind, asked, model, shape.describe(), shape.native_frames)
    draft.request["strength"] = asked.strength
    return draft


def draft_extension(asked: ExtendVideo, model: ServedModel, source: Source) -> Draft:
    """Draft an extension: the source, and more seconds that the model makes from the source's last frames."""
    if not model.takes_image:
        raise ApiError(400, "This model goes on from no given frames.", code="unsupported", param="video")
    shape = source.shape_for(model, whole=False)
    new_frames = max(1, round(float(asked.seconds) * source.fps))
    plan = extend(source.num_frames, new_frames, model.limits)
    if plan is None:
        longest = (model.limits.max_num_frames - 1) / source.fps
        message = f"Invalid 'seconds': this model adds at most {longest:.4g} s at a time at {source.fps} fps."
        raise ApiError(400, message, code="invalid_value", param="seconds")
    total = source.num_frames + new_frames
    facts = shape.describe() | {
        "num_frames": total,
        "seconds": f"{total / source.fps:g}",
        "native_frames": plan.native_frames,
        "context": plan.context,
    }
    return _draft(EXTEND, asked, model, facts, plan.native_frames)


def make_job(
    context: Context,
    caller: Caller,
    draft: Draft,
    asked: Sampling,
    key: str | None,
    route: str,
    traceparent: str | None = None,
) -> Job:
    """Store the draft's files, then its row; from then on the job is not lost.

    key: the client's Idempotency-Key. traceparent: its header of this name. Raises ApiError for a priority above the
    key's, a quota, a rate, a conflict.
    """
    if asked.priority > caller.key.max_priority:
        message = f"Invalid 'priority': this key's highest is {caller.key.max_priority}."
        raise ApiError(400, message, code="invalid_value", param="priority")
    if asked.webhook_url is not None:
        check_url(asked.webhook_url, context.config.webhook_private)
    idempotency = None
    if key is not None:
        if not 0 < len(key) <= MAX_KEY_CHARACTERS:
            message = f"An Idempotency-Key has 1 to {MAX_KEY_CHARACTERS} characters."
            raise ApiError(400, message, code="invalid_idempotency_key", param="Idempotency-Key")
        idempotency = (route, key, _digest(draft, asked))
    for name, data in draft.files.items():
        context.artifacts.write(input_key(draft.job_id, name), data)
    variant, revision = draft.model.assign(draft.job_id)
    try:
        job = context.jobs.create(
            caller.tenant,
            draft.request | {"inputs": sorted(draft.files)},
            job_id=draft.job_id,
            priority=asked.priority,
            work=_work(context, draft),
            bounds=_bounds(context, caller.tenant),
            idempotency_key=idempotency,
            webhook_url=asked.webhook_url,
            model=draft.model.served,
            variant=variant,
            revision=revision,
            trace=None if context.tracer is None else context.tracer.begin(draft.job_id, traceparent),
            job_class=context.tenants.class_of(caller.tenant),
        )
    except (QuotaExceeded, RateExceeded, StoreFull, IdempotencyConflict) as error:
        _forget(context.artifacts, draft)
        raise _refusal(error) from None
    if job.id != draft.job_id:  # the same key made it before
        _forget(context.artifacts, draft)
    return job


# -------------------------------------------------------------------------------------------------- what they use


def _draft(kind: str, asked: Sampling, model: ServedModel, facts: Mapping[str, Any], native_frames: int) -> Draft:
    """Make a draft. Raises ApiError 400 for numbers that the model refuses."""
    defaults = model.defaults
    width, height = (int(side) for side in facts["native_size"].split("x"))
    request = {
        "kind": kind,
        "model": model.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "seed": secrets.randbelow(2**31) if asked.seed is None else asked.seed,
        "num_inference_steps": asked.num_inference_steps or defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        "cache": asked.cache or defaults.cache,
        "partial_images": asked.partial_images,
        **facts,
    }
    try:
        VideoRequest(
            prompt=asked.prompt, width=width, height=height, num_frames=native_frames, fps=request["fps"]
        ).resolved(defaults, model.limits)
    except ValueError as error:
        raise ApiError(400, f"Invalid request: {error}.", code="invalid_value") from None
    branches = 2 if request["guidance_scale"] > 1 else 1
    tokens = model.tokens(width, height, native_frames)
    request["tokens"] = tokens * request["num_inference_steps"] * branches
    return Draft(kind, model, request)


def _digest(draft: Draft, asked: Sampling) -> str:
    """Return a digest of canonical fields and files: SDKs rebuild a form's boundaries when they send it again."""
    fields = asked.model_dump(mode="json", exclude_none=True)
    canonical = json.dumps([draft.kind, fields, draft.digests], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _work(context: Context, draft: Draft) -> float:
    """Return the estimated seconds of one engine, from the speed that the model's engines report."""
    told = [process.facts for process in context.processes.alive() if "tokens_per_s" in process.facts]
    speeds = [float(facts["tokens_per_s"]) for facts in told if facts.get("model") == draft.model.served]
    share = draft.request.get("strength", 1.0)
    return max(0.05, share * draft.request["tokens"] / (sum(speeds) / len(speeds) if speeds else TOKENS_PER_S))


def _bounds(context: Context, name: str) -> Bounds:
    """Read the tenant's bounds from the store for each job: an operator's change holds from the next one on."""
    tenant, config = context.tenants.get(name), context.config
    quota = tenant.quota or config.quotas.get(name, config.quota)
    per_minute = tenant.creates_per_minute or config.creates_per_minute
    return Bounds(quota=quota, per_minute=per_minute, max_queued=config.max_queued)


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, IdempotencyConflict):
        return ApiError(409, "This Idempotency-Key was used for another request.", code="idempotency_conflict")
    codes: dict[type[Exception], str] = {QuotaExceeded: "quota_exceeded", RateExceeded: "rate_limit_exceeded"}
    code = codes.get(type(error), "queue_full")
    wait_s = 20 if isinstance(error, RateExceeded) else 10
    message = f"{str(error)[:1].upper()}{str(error)[1:]}; try again later."
    return ApiError(429, message, code=code, type="rate_limit_error", retry_after_s=wait_s)


def _forget(artifacts: ArtifactStore, draft: Draft) -> None:
    if draft.files:
        artifacts.remove(f"jobs/{draft.job_id}")
