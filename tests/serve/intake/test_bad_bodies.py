"""Forms and JSON that say nothing, or no one thing: each a 400 with a code of its own."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from skylapse.serve.intake.body import Body
from skylapse.serve.intake.strict_json import MAX_DEPTH
from skylapse.serve.wire.errors import ApiError

from ..bodies import FORM, JSON, field, file, form, part

BAD_FORMS = {
    "unknown_file": (form(file("mask")), "unknown_parameter", "mask"),
    "file_by_a_path": (form(file("../../x")), "unknown_parameter", "../../x"),
    "file_in_brackets": (form(file("video[id]")), "unknown_parameter", "video[id]"),
    "text_for_a_file": (form(field("input_reference")), "invalid_value", "input_reference"),
    "text_for_a_video": (form(field("video", b"video_1")), "invalid_value", "video"),
    "file_twice": (form(file("video"), file("video")), "duplicate_parameter", "video"),
    "file_and_id": (form(file("video"), field("video[id]")), "duplicate_parameter", "video"),
    "file_and_url": (
        form(file("input_reference"), field("input_reference[image_url]")),
        "duplicate_parameter",
        "input_reference",
    ),
    "text_twice": (form(field("prompt"), field("prompt")), "duplicate_parameter", "prompt"),
    "empty_file": (form(file("video", b"")), "invalid_value", "video"),
    "fields": (form(*(field(f"f{k}") for k in range(5000))), "too_many_fields", None),
    "empty_files": (form(*(file("video", b"", "") for _ in range(5000))), "too_many_fields", None),
    "long_text": (form(field("prompt", b"x" * 70_000)), "string_above_max_length", "prompt"),
    "long_name": (form(field("x" * 5000)), "invalid_body", None),
    "no_name": (form(part("filename=x")), "invalid_body", None),
    "no_disposition": (b"--b\r\n\r\nx\r\n--b--\r\n", "invalid_body", None),
    "attachment": (form(field("a")).replace(b"form-data", b"attachment"), "invalid_body", None),
    "base64_part": (form(part('name="a"', more="Content-Transfer-Encoding: base64\r\n")), "invalid_body", None),
    "headers": (form(part('name="a"', more="X: y\r\n" * 100)), "invalid_body", None),
    "long_header": (form(part('name="a"', more=f"X: {'y' * 9000}\r\n")), "invalid_body", None),
    "other_boundary": (form(field("a")).replace(b"--b", b"--c"), "invalid_body", None),
    "no_end": (form(field("prompt"), end=b""), "incomplete_body", None),
    "cut_in_a_file": (form(file("video", b"x" * 1000))[:-500], "incomplete_body", None),
    "cut_in_a_header": (b"--b\r\nContent-Dispo", "incomplete_body", None),
    "newlines": (b"\r\n" * 100_000, "incomplete_body", None),
    "noise": (b"\xde\xad\xbe\xef" * 100, "invalid_body", None),
    "no_utf8": (form(field("prompt", b"\xff\xfe")), "invalid_body", None),
    "overlong_utf8": (form(field("prompt", b"\xc0\xaf")), "invalid_body", None),
    "surrogate": (form(field("prompt", b"\xed\xa0\x80")), "invalid_body", None),
    "null": (form(field("prompt", b"a\0b")), "invalid_value", "prompt"),
    "null_in_name": (form(field("a\0b")), "invalid_field_name", None),
    "deep": (form(field("a" + "[b]" * 500)), "invalid_field_name", None),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_bad_forms_are_400_and_leave_nothing(name: str, refuse: Callable[..., ApiError]) -> None:
    body, code, param = BAD_FORMS[name]
    error = refuse(FORM, body)
    assert (error.status, error.code, error.param) == (400, code, param)


BAD_JSON = {
    "list": b"[]",
    "text": b'"prompt"',
    "null": b"null",
    "half": b'{"prompt": "a',
    "two": b"{}{}",
    "comma": b'{"a": 1,}',
    "nan": b'{"guidance_scale": NaN}',
    "infinity": b'{"guidance_scale": -Infinity}',
    "beyond_floats": b'{"guidance_scale": 1e999}',
    "long_integer": b'{"seed": ' + b"9" * 100_000 + b"}",
    "bom": b"\xef\xbb\xbf{}",
    "utf16": '{"prompt": "a"}'.encode("utf-16"),
    "no_utf8": b'{"prompt": "\xff"}',
    "encoded_surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "deep_lists": b"[" * 500_000,
    "deep_objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "just_too_deep": b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
    "deep_behind_a_quote": b'{"a": "\\\\", "b": ' + b"[" * 60 + b"]" * 60 + b"}",
    "wide": b'{"a": [' + b"{}," * 100_000 + b"{}]}",
    "quotes": b'{"a": "' + b'\\"' * 100_000 + b'"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_400(name: str, refuse: Callable[..., ApiError]) -> None:
    error = refuse(JSON, BAD_JSON[name])
    assert (error.status, error.code) == (400, "invalid_json")


def test_json_may_nest_up_to_its_bound_and_have_brackets_in_its_text(read: Callable[..., Body]) -> None:
    nested = b'{"a":' * MAX_DEPTH + b'"' + b"[{" * 500 + b'\\"]"' + b"}" * MAX_DEPTH
    assert read(JSON, nested).fields == json.loads(nested)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_parameter", "prompt"),
        (b'{"a": {"\\ud800": 1, "\\ud800": 2}}', "duplicate_parameter", "?"),
        (b'{"prompt": "a\\u0000b"}', "invalid_value", "prompt"),
        (b'{"prompt": "\\ud800"}', "invalid_value", "prompt"),
        (b'{"prompt": ["a", {"b": "\\udfff\\ud800"}]}', "invalid_value", "prompt"),
        (b'{"\\ud800": 1}', "invalid_field_name", None),
        (b'{"a\\u0000": 1}', "invalid_field_name", None),
        (b'{"video": "video_1"}', "invalid_value", "video"),
        (b'{"video": ["video_1"]}', "invalid_value", "video"),
        (b'{"input_reference": "data:image/png;base64,AA=="}', "invalid_value", "input_reference"),
        (b'{"input_reference": {}}', "invalid_value", "input_reference"),
        (b'{"input_reference": {"image_url": 7}}', "invalid_value", "input_reference"),
        (b'{"input_reference": {"image_url": "data:,a", "file_id": "f"}}', "invalid_value", "input_reference"),
        (b'{"input_reference": {"file_id": "file_1"}}', "unsupported", "input_reference"),
    ],
)
def test_json_that_says_no_one_thing_is_refused(
    body: bytes, code: str, param: str | None, refuse: Callable[..., ApiError]
) -> None:
    error = refuse(JSON, body)
    assert (error.status, error.code, error.param) == (400, code, param)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        *(
            (url, "unsupported")
            for url in ("http://169.254.169.254/", "https://example.com/a.png", "file:///etc/passwd")
        ),
        *((url, "unsupported") for url in ("//example.com/a.png", "/etc/passwd", "", "gopher://x", " data:,x")),
        *(
            (f"data:{rest}", "invalid_value")
            for rest in ("", ",", "image/png,abc", "image/png;base64,", "image/png;base64")
        ),
        *(
            (f"data:image/png;base64,{text}", "invalid_value")
            for text in ("A", "AA=", "AA==AA", "A A=", "AA==\n", "AA-_", "é=")
        ),
    ],
)
def test_image_urls_are_strict_data_urls_and_never_fetched(
    url: str, code: str, refuse: Callable[..., ApiError]
) -> None:
    error = refuse(JSON, json.dumps({"input_reference": {"image_url": url}}).encode())
    assert (error.status, error.code, error.param) == (400, code, "input_reference")
    assert code != "unsupported" or "not fetched" in error.message
    assert refuse(FORM, form(field("input_reference[image_url]", url.encode()))).code == code


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        *((kind, 415) for kind in (None, "", "é", "text/plain", "application/xml", "application/jsonl", "video/mp4")),
        *((kind, 415) for kind in ("multipart/mixed; boundary=b", "application/octet-stream")),
        *((f"multipart/form-data{rest}", 400) for rest in ("", "; boundary=", f"; boundary={'b' * 300}")),
    ],
)
def test_other_content_types_are_refused(
    content_type: str | None, status: int, refuse: Callable[..., ApiError]
) -> None:
    assert refuse(content_type, form(field("prompt"))).status == status


@pytest.mark.parametrize(
    "body", [b"a&b", b"a=%ff", b"a=1&a=2", b"=x", b"&".join(b"f=%d" % k for k in range(500)), b"\xff=1"]
)
def test_bad_urlencoded_forms_are_400(body: bytes, refuse: Callable[..., ApiError]) -> None:
    assert refuse("application/x-www-form-urlencoded", body).status == 400
