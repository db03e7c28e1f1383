"""The wire's pure parts: form fields, bodies, errors, shapes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from skylapse.runtime.core.request import ModelDefaults, ModelLimits
from skylapse.serve.intake.form_fields import MAX_FIELDS, parse_fields
from skylapse.serve.jobs.output_shape import nearest, shape_of
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases, Standing
from skylapse.serve.store.tables import IN_PROGRESS
from skylapse.serve.wire.errors import ApiError, refusal
from skylapse.serve.wire.requests import CreateVideo, show_page, show_video

# All keys of OpenAI's Video object, every one of which its document requires.
OPENAI_KEYS = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at"),
    *("prompt", "size", "seconds", "remixed_from_video_id", "error"),
}
DEFAULTS = ModelDefaults(width=64, height=64, num_frames=17, fps=8, num_inference_steps=30, guidance_scale=4.0)
LIMITS = ModelLimits(size_multiple=16, max_num_frames=33, max_pixels=96 * 96)
NATIVE = [(64, 64), (96, 64), (64, 96), (96, 96)]


@pytest.mark.parametrize(
    ("fields", "parsed"),
    [
        ([("prompt", "a star"), ("seconds", "4")], {"prompt": "a star", "seconds": "4"}),
        ([("video[id]", "video_1")], {"video": {"id": "video_1"}}),
        ([("image[url]", "u"), ("image[file_id]", "f")], {"image": {"url": "u", "file_id": "f"}}),
        ([("images[]", "a"), ("images[]", "b")], {"images": ["a", "b"]}),
        ([("keys[a][id]", "1"), ("keys[b][id]", "2")], {"keys": {"a": {"id": "1"}, "b": {"id": "2"}}}),
        ([], {}),
    ],
)
def test_fields_as_the_sdks_send_them(fields: list[tuple[str, Any]], parsed: dict[str, Any]) -> None:
    assert parse_fields(fields) == parsed


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ([("prompt", "a"), ("prompt", "b")], "duplicate_parameter"),
        ([("video", "a"), ("video[id]", "b")], "duplicate_parameter"),
        ([("video[id]", "a"), ("video", "b")], "duplicate_parameter"),
        ([("video[]", "a"), ("video[id]", "b")], "duplicate_parameter"),
        ([("video[id]", "a"), ("video[]", "b")], "duplicate_parameter"),
        ([("video[id", "a")], "invalid_field_name"),
        ([("video]", "a")], "invalid_field_name"),
        ([("", "a")], "invalid_field_name"),
        ([("[id]", "a")], "invalid_field_name"),
        ([("a[][b]", "a")], "invalid_field_name"),
        ([("a" + "[b]" * 1000, "a")], "invalid_field_name"),
        ([(f"f{k}", "a") for k in range(MAX_FIELDS + 1)], "too_many_fields"),
    ],
)
def test_fields_that_say_no_one_thing_are_refused(fields: list[tuple[str, Any]], code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_fields(fields)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_text_and_numbers_mean_the_same() -> None:
    as_form = CreateVideo.model_validate(
        {"prompt": "a star", "seconds": "4", "seed": "7", "guidance_scale": "3.5", "resize": "false"}
    )
    as_json = CreateVideo.model_validate(
        {"prompt": "a star", "seconds": 4, "seed": 7, "guidance_scale": 3.5, "resize": False}
    )
    assert as_form == as_json and as_json.seconds == "4"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("prompt", value) for value in ("", "  ", "a\0b", "a" * 10_001, None, 7, ["a"], "\ud800")),
        *(("seconds", value) for value in ("", "0", "-4", "nan", "inf", "1e3", "121", True, "4s", "４", [4])),
        *(("size", value) for value in ("64", "64x", "x64", "64X64", "0x64", "8x64", "99999x64", "64x64x64", "65x64")),
        *(("seed", value) for value in (-1, 2**63, 1.5, "1.5", "seven", float("nan"))),
        *(("guidance_scale", value) for value in (-1, "nan", float("inf"), "1e400", 101)),
        *(("num_inference_steps", value) for value in (0, 1001, "ten", 10**400)),
        *(("cache", value) for value in ("best", "easy:-1", "easy:threshold=nan", "a" * 201)),
        *(("num_frames", value) for value in (0, -3, 1026)),
        *(("fps", value) for value in (0, 121)),
        *(("priority", value) for value in (101, "high")),
        *(("partial_images", value) for value in (-1, 21)),
        ("resize", "perhaps"),
        ("promt", "a star"),
    ],
)
def test_what_is_out_of_bounds_is_a_400_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateVideo.model_validate({"prompt": "a star"} | {field: value})
    error = refusal(caught.value)
    assert (error.status, error.param) == (400, field)
    assert error.code == ("unknown_parameter" if field == "promt" else "invalid_value")
    assert set(error.body["error"]) == {"message", "type", "param", "code"} and f"'{field}'" in error.message
    assert len(error.message) < 300  # what was sent is not sent back


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        CreateVideo.model_validate({})
    assert refusal(caught.value).code == "missing_required_parameter"


def test_retrying_is_promised_within_what_the_sdks_heed_and_forbidden_for_conflicts() -> None:
    assert ApiError(429, "wait", retry_after_s=1000).headers == {"retry-after": "60"}
    assert ApiError(503, "wait", retry_after_s=0.2).headers == {"retry-after": "1"}
    assert ApiError(409, "done").headers == {"x-should-retry": "false"}
    assert ApiError(400, "no").headers == {}


def shape(**asked: Any) -> tuple[str, str, int, int, str]:
    got = shape_of(CreateVideo(prompt="a star", **asked), NATIVE, DEFAULTS, LIMITS)
    return got.size, got.native_size, got.num_frames, got.native_frames, got.seconds


def test_shapes_are_the_nearest_native_ones_with_enough_frames() -> None:
    assert shape() == ("64x64", "64x64", 17, 17, "2.125")
    assert shape(size="1280x720", seconds="4") == ("1280x720", "96x64", 32, 33, "4")
    assert shape(size="720x1280", num_frames=14) == ("720x1280", "64x96", 14, 17, "1.75")
    assert shape(size="2048x2048", num_frames=1)[1] == "96x96"
    assert shape(seconds="1.1", fps=10) == ("64x64", "64x64", 11, 13, "1.1")
    assert nearest(66, 64, NATIVE) == (64, 64) and nearest(92, 90, NATIVE) == (96, 96)


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        (dict(seconds="5"), "seconds", "at most 33 frames, 4.125 s at 8 fps"),
        (dict(num_frames=34), "num_frames", "at most 33 frames"),
        (dict(num_frames=5, seconds="1"), "num_frames", "not both"),
        (dict(size="128x128", resize=False), "size", "64x64, 96x64"),
    ],
)
def test_a_shape_beyond_the_model_is_a_400_that_names_its_bounds(asked: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        shape(**asked)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_job_is_shown_with_every_key_in_every_state(database: Database) -> None:
    store, leases = JobStore(database), Leases(database)
    request = {"prompt": "a star", "model": "demo", "size": "64x64", "seconds": "2.125", "seed": 7}
    queued = store.create("a", request)
    (claimed,) = leases.claim("engine")
    leases.report([(claimed, Standing("denoise", 15, 30))])
    running = store.get("a", queued.id)
    leases.complete(claimed, {})
    completed = store.get("a", queued.id)
    store.create("a", request)
    (doomed,) = leases.claim("engine")
    leases.fail(doomed, "crashed", "the engine died")
    shown = [show_video(job, expires_after_s=3600) for job in (queued, running, completed, store.get("a", doomed.id))]
    assert all(set(video) >= OPENAI_KEYS for video in shown)
    assert [video["status"] for video in shown] == ["queued", IN_PROGRESS, "completed", "failed"]
    assert [video["progress"] for video in shown] == [0, 50, 100, 0]
    assert [video["expires_at"] is not None for video in shown] == [False, False, True, False]
    assert shown[2]["expires_at"] == shown[2]["completed_at"] + 3600
    assert shown[3]["error"] == {"code": "crashed", "message": "the engine died"}
    page = show_page(shown, has_more=True)
    assert (page["first_id"], page["last_id"], page["has_more"]) == (shown[0]["id"], shown[3]["id"], True)
    assert show_page([], has_more=False)["last_id"] is None
