"""Requests that have brought servers down, or might: data for tests against a running service.

    client = Client(url, key)
    for case in CASES:
        assert case.problem(case.send(client, mine=..., theirs=...)) is None

`mine`: the id of a finished video of the key's tenant; `theirs`: one of another tenant's. Without them, ids that nobody
has are sent: all is refused then, too, if for another reason. Webhooks must not be allowed private addresses, and a
request not more than 64 MiB, which are the defaults.
"""

from __future__ import annotations

import gzip

from .bad_case import (
    BODIES,
    EDITS,
    EXTENSIONS,
    GENERATIONS,
    MIB,
    VIDEOS,
    Case,
    as_file,
    as_form,
    as_json,
    data_url,
    plain,
    shorter,
    without_end,
)
from .bad_media import media
from .bodies import FORM, JSON, file, form, part
from .bodies import field as text

SIZES, NUMBERS, MEDIA, BOMBS, PATHS, TENANTS, RANGES, TEXTS, DEEP, SSRF, ROUTES = (
    *("sizes and counts", "NaN and infinities", "wrong or truncated media", "decompression bombs", "path traversal"),
    *("other tenants' ids", "many ranges", "unicode and nulls", "deep JSON", "SSRF", "routes and keys"),
)
CLASSES = (SIZES, NUMBERS, BODIES, MEDIA, BOMBS, PATHS, TENANTS, RANGES, TEXTS, DEEP, SSRF, ROUTES)

CASES: list[Case] = [
    # ------------------------------------------------------------------------------------------------ sizes and counts
    *(
        as_json(f"{name}_{value}"[:60], SIZES, {name: value}, code="invalid_value")
        for name, values in {
            "size": (
                "0x0",
                "1x1",
                "64x",
                "65x64",
                "99999x99999",
                "4098x64",
                "64x64x64",
                "-64x64",
                "\u0664x64",
                [64, 64],
            ),
            "seconds": ("0", "-4", "99999999", "121", "1e9", "", True, [4]),
            "num_frames": (0, -1, 1026, 10**30),
            "num_inference_steps": (0, 1001, 10**18, "many"),
            "fps": (0, 121),
            "partial_images": (-1, 1000),
            "guidance_scale": (-1, 1e9),
            "priority": (101, -101),
            "seed": (-1, 2**64, 1.5),
            "cache": ("easy:-1", "x" * 500),
        }.items()
        for value in values
    ),
    as_json("prompt_too_long", SIZES, {"prompt": "a" * 10_001}, code="invalid_value"),
    as_json("prompt_empty", SIZES, {"prompt": ""}, code="invalid_value"),
    as_json("prompt_missing", SIZES, b"{}", code="missing_required_parameter"),
    as_json("a_thousand_at_once", SIZES, {"n": 1000}, code="unknown_parameter"),
    as_json("frames_beyond_the_model", SIZES, {"num_frames": 1025}, code="invalid_value"),
    as_form("5000_fields", SIZES, lambda: [text(f"f{k}") for k in range(5000)], code="too_many_fields"),
    *(plain(f"limit_{value}"[:40], SIZES, f"{VIDEOS}?limit={value}", 400) for value in ("-1", "101", "9" * 40, "x")),
    # ---------------------------------------------------------------------------------------------- NaN and infinities
    *(
        as_json(f"guidance_scale_{value}", NUMBERS, b'{"prompt": "a", "guidance_scale": %s}' % value.encode())
        for value in ("NaN", "Infinity", "-Infinity", "1e999")
    ),
    *(
        as_form(f"{name}_form_{value.decode()}", NUMBERS, lambda name=name, value=value: [text(name, value)])  # type: ignore[misc]
        for name, value in (
            *(("guidance_scale", value) for value in (b"nan", b"inf", b"-inf", b"1e400")),
            *(("seconds", b"nan"), ("seed", b"inf"), ("num_frames", b"NaN"), ("fps", b"infinity")),
        )
    ),
    as_json("strength_nan", NUMBERS, b'{"prompt": "a", "video": {"id": "{mine}"}, "strength": NaN}', EDITS),
    plain("limit_nan", NUMBERS, f"{VIDEOS}?limit=nan", 400),
    # ----------------------------------------------------------------------------------------- huge and endless bodies
    plain(
        "promised_10_gib", BODIES, VIDEOS, 413, "POST", [("Content-Type", FORM)], num_bytes=10 * 2**30, may_hang_up=True
    ),
    plain(
        "promised_10_gib_of_json",
        BODIES,
        EDITS,
        413,
        "POST",
        [("Content-Type", JSON)],
        num_bytes=10 * 2**30,
        may_hang_up=True,
    ),
    without_end("endless_file", FORM, file("input_reference")[:-2], bytes(MIB), frozenset({413})),
    without_end("endless_prompt", FORM, text("prompt")[:-2], b"a" * MIB, frozenset({400, 413})),
    without_end("endless_parts", FORM, b"", text("prompt"), frozenset({400, 413})),
    without_end("endless_header", FORM, b'--b\r\nContent-Disposition: form-data; name="', b"a" * MIB, frozenset({400})),
    without_end("endless_newlines", FORM, b"", b"\r\n" * 2**19, frozenset({413})),
    without_end("endless_epilogue", FORM, form(text("prompt")), b"\0" * MIB, frozenset({413})),
    without_end("endless_json", JSON, b'{"prompt": "', b"a" * MIB, frozenset({413})),
    without_end("endless_json_list", JSON, b'{"prompt": [', b"0," * 2**19, frozenset({413})),
    without_end("endless_urlencoded", "application/x-www-form-urlencoded", b"prompt=", b"a" * MIB, frozenset({413})),
    shorter("cut_json", JSON, b'{"prompt": "a st'),
    shorter("cut_form", FORM, form(text("prompt", b"a star"), file("input_reference", bytes(100_000)))[:50_000]),
    shorter("cut_edit", FORM, form(text("prompt", b"a"), file("video", bytes(100_000)))[:-4], EDITS),
    as_form("no_closing_boundary", BODIES, lambda: [b"--b\r\n\r\n"], code="invalid_body"),
    as_json("form_without_boundary", BODIES, b"--x\r\n", code="invalid_json"),
    # uvicorn on h11 refuses such headers; on httptools, which Ray brings, serve/deployment/proxy_middleware.py does
    *(
        plain(name, BODIES, VIDEOS, {400, 431}, headers=headers, by_proxy=True, may_hang_up=True)
        for name, headers in {
            "header_of_a_megabyte": [("X", "a" * MIB)],
            "10000_headers": [("X", "a" * 50)] * 10_000,
        }.items()
    ),
    plain("target_of_a_megabyte", BODIES, f"/{'a' * MIB}", {400, 404, 414, 431}, by_proxy=True, may_hang_up=True),
    # ---------------------------------------------------------------------------------------- wrong or truncated media
    *as_file(
        MEDIA,
        "text gif bmp jpeg2000 svg playlist heic gif_then_png mp4 png_cut png_head png_crc jpeg_cut webp_cut "
        "png_then_mp4 apng webp_animation pixel line",
        code="invalid_image",
        prefix="image",
    ),
    *as_file(MEDIA, "text gif png playlist heic mp4_cut mp4_head mp4_noise png_then_mp4", EDITS, "invalid_video"),
    *as_file(MEDIA, "mp4_cut mp4_noise jpeg", EXTENSIONS, "invalid_video"),
    *as_file(MEDIA, "nothing", code="invalid_value"),
    as_form("image_url_cut", MEDIA, data_url("png_cut"), code="invalid_image"),
    as_json("image_url_no_base64", MEDIA, {"input_reference": {"image_url": "data:image/png;base64,%%%"}}),
    as_form("video_as_text", MEDIA, lambda: [text("video", b"video")], EDITS, code="invalid_value"),
    as_form("file_of_another_name", MEDIA, lambda: [file("mask", media("png"))], code="unknown_parameter"),
    as_form("video_for_a_create", MEDIA, lambda: [file("video", media("mp4"))], code="unknown_parameter"),
    # --------------------------------------------------------------------------------------------- decompression bombs
    *as_file(BOMBS, "bomb bigger_bomb webp_bomb wide", code="file_too_large", prefix="image"),
    *as_file(BOMBS, "profile_bomb", code="file_too_large", prefix="image"),
    *as_file(BOMBS, "mp4_long mp4_wide", EDITS, "file_too_large"),
    as_form("bomb_in_a_url", BOMBS, data_url("bomb"), code="file_too_large"),
    Case(
        "gzip_of_json",
        BOMBS,
        "POST",
        VIDEOS,
        [("Content-Type", JSON), ("Content-Encoding", "gzip")],
        lambda: gzip.compress(b'{"prompt": "' + b"a" * 100 * MIB + b'"}', 1),
        frozenset({415}),
    ),
    # -------------------------------------------------------------------------------------------------- path traversal
    *as_file(PATHS, "text", file_name="../../../../tmp/evil.png", prefix="name_up"),
    *as_file(PATHS, "text", file_name="/etc/cron.d/evil", prefix="name_root"),
    *as_file(PATHS, "text", file_name="..\\\\..\\\\evil", prefix="name_back"),
    as_form("part_by_a_path", PATHS, lambda: [file("../../evil", media("png"))], code="unknown_parameter"),
    as_json("source_by_a_path", PATHS, {"video": {"id": "../../etc/passwd"}}, EDITS, code="invalid_value"),
    as_json("model_by_a_path", PATHS, {"model": "../../etc/passwd"}, status=404),
    as_json("latents_by_a_path", PATHS, {"latent_path": "/etc/passwd"}, GENERATIONS),
    as_json("latents_up", PATHS, {"latent_path": "../../../etc/passwd"}, GENERATIONS),
    as_json("output_by_a_path", PATHS, {"response_format": "video_path"}, GENERATIONS),
    *(
        plain(f"id_{number}", PATHS, f"/v1/videos/{id}", {400, 404})
        for number, id in enumerate(
            (
                *("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fjobs.db", "..%5c..%5cjobs.db"),
                *(
                    "{mine}%2f..%2f..%2fjobs.db",
                    "%252e%252e%252fjobs.db",
                    "{mine}/content/../../../jobs.db",
                    "..;/jobs.db",
                ),
                *("video_../../jobs.db", "{mine}%00.mp4/content", "{mine}/content?variant=../../jobs.db"),
            )
        )
    ),
    plain("delete_by_a_path", PATHS, "/v1/videos/..%2f..", 404, "DELETE"),
    plain("after_by_a_path", PATHS, f"{VIDEOS}?after=../../jobs.db", 400),
    plain("page_file_by_a_path", PATHS, "/page/../../config.py", {400, 404}),
    # ---------------------------------------------------------------------------------------------- other tenants' ids
    *(
        plain(f"their_{name}", TENANTS, f"/v1/videos/{{theirs}}{rest}", 404, method)
        for name, method, rest in (
            *(
                ("video", "GET", ""),
                ("file", "GET", "/content"),
                ("head", "HEAD", "/content"),
                ("events", "GET", "/events"),
            ),
            *(
                ("thumbnail", "GET", "/content?variant=thumbnail"),
                ("cancel", "POST", "/cancel"),
                ("delete", "DELETE", ""),
            ),
        )
    ),
    as_json("their_remix", TENANTS, {}, "/v1/videos/{theirs}/remix", 404),
    as_json("their_edit", TENANTS, {"video": {"id": "{theirs}"}}, EDITS, 404),
    as_json("their_extension", TENANTS, {"seconds": "1", "video": {"id": "{theirs}"}}, EXTENSIONS, 404),
    as_form("their_edit_by_form", TENANTS, lambda: [text("video[id]", b"{theirs}")], EDITS, 404),
    plain("after_theirs", TENANTS, f"{VIDEOS}?after={{theirs}}", 400),
    # ----------------------------------------------------------------------------------------------------- many ranges
    *(
        plain(f"ranges_{name}", RANGES, "/v1/videos/{mine}/content", {404, 416}, headers=[("Range", value)])
        for name, value in {
            "100": "bytes=" + ",".join(["0-0"] * 100),
            "1000_that_overlap": "bytes=" + ",".join(f"{k}-" for k in range(1000)),
            "open": "bytes=" + ",".join("-1" for _ in range(500)),
            "beyond_the_end": "bytes=999999999999-",
            "backwards": "bytes=9-1",
            "of_no_bytes": "bytes=-0",
            "of_a_huge_number": "bytes=" + "9" * 500 + "-",
            "of_blanks": "bytes=" + " " * 2000 + "x",
        }.items()
    ),
    plain(
        "ranges_100000",
        RANGES,
        "/v1/videos/{mine}/content",
        {400, 404, 416, 431},
        headers=[("Range", "bytes=" + "0-0," * 100_000)],
        by_proxy=True,
        may_hang_up=True,
    ),
    # ----------------------------------------------------------------------------------------------- unicode and nulls
    *(
        as_json(f"prompt_{name}", TEXTS, b'{"prompt": "a%s"}' % value)
        for name, value in {
            "null": b"\\u0000",
            "raw_null": b"\0",
            "half_pair": b"\\ud800",
            "pair_reversed": b"\\udc00\\ud800",
            "no_utf8": b"\xff",
            "overlong": b"\xc0\x80",
            "encoded_half_pair": b"\xed\xa0\x80",
            "control": b"\x1b[2J",
        }.items()
    ),
    as_json("json_utf16", TEXTS, '{"prompt": "a star"}'.encode("utf-16"), code="invalid_json"),
    as_json("json_bom", TEXTS, b'\xef\xbb\xbf{"prompt": "a"}', code="invalid_json"),
    as_json("model_null", TEXTS, {"model": "demo\0"}, code="invalid_value"),
    as_json("name_half_pair", TEXTS, b'{"prompt": "a", "\\ud800": 1}', code="invalid_field_name"),
    as_json("only_blanks", TEXTS, {"prompt": " \n\t\u3000"}, code="invalid_value"),
    as_form("form_null", TEXTS, lambda: [text("negative_prompt", b"a\0b")], code="invalid_value"),
    as_form("form_no_utf8", TEXTS, lambda: [text("negative_prompt", b"\xfe\xff")], code="invalid_body"),
    as_form("form_name_null", TEXTS, lambda: [text("a\0")], code="invalid_field_name"),
    as_form("form_name_no_utf8", TEXTS, lambda: [part("name=N").replace(b"N", b"\xff")], code="invalid_body"),
    plain("id_null", TEXTS, "/v1/videos/video%00", 404),
    plain("id_no_utf8", TEXTS, "/v1/videos/%ff%fe", 404),
    plain("id_raw", TEXTS, b"/v1/videos/\xff\xfe", {400, 404}, by_proxy=True, may_hang_up=True),
    plain("query_null", TEXTS, f"{VIDEOS}?after=%00", 400),
    plain("header_null", TEXTS, VIDEOS, 400, headers=[("X", b"a\0b")], by_proxy=True, may_hang_up=True),
    plain("key_no_ascii", TEXTS, VIDEOS, 401, headers=[("Authorization", b"Bearer \xff\xfe")]),
    # ------------------------------------------------------------------------------------------------------- deep JSON
    as_json("100000_lists", DEEP, b"[" * 100_000, code="invalid_json"),
    as_json("100000_objects", DEEP, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, code="invalid_json"),
    as_json("deep_in_a_field", DEEP, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", code="invalid_json"),
    as_json(
        "deep_source",
        DEEP,
        b'{"prompt": "a", "video": ' + b'{"id":' * 900 + b"1" + b"}" * 901,
        EDITS,
        400,
        "invalid_json",
    ),
    as_json("a_million_values", DEEP, b'{"a": [' + b"0," * 10**6 + b"0]}", code="invalid_json"),
    as_json("200000_keys", DEEP, b"{" + b",".join(b'"%d":0' % k for k in range(200_000)) + b"}", code="invalid_json"),
    as_json("key_twice", DEEP, b'{"prompt": "a", "prompt": "b"}', code="duplicate_parameter"),
    as_json("integer_of_100000_digits", DEEP, b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", code="invalid_json"),
    as_json("a_list", DEEP, b"[]", code="invalid_json"),
    as_json("null", DEEP, b"null", code="invalid_json"),
    as_json("no_json", DEEP, b"prompt=a", code="invalid_json"),
    as_form("deep_field", DEEP, lambda: [text("a" + "[b]" * 1000)], code="invalid_field_name"),
    # ------------------------------------------------------------------------------------------------------------ SSRF
    *(
        as_json(f"webhook_{number}", SSRF, {"webhook_url": url})
        for number, url in enumerate(
            (
                *(
                    "http://127.0.0.1:8265/",
                    "https://127.0.0.1/",
                    "https://localhost/",
                    "https://[::1]/",
                    "https://0.0.0.0/",
                ),
                *(
                    "https://169.254.169.254/latest/meta-data/",
                    "https://10.0.0.1/",
                    "https://192.168.1.1/",
                    "https://[fe80::1]/",
                ),
                *(
                    "https://2130706433/",
                    "https://0x7f.1/",
                    "https://127.1/",
                    "https://[::ffff:127.0.0.1]/",
                    "https://017700000001/",
                ),
                *(
                    "file:///etc/passwd",
                    "gopher://127.0.0.1:6379/_FLUSHALL",
                    "ftp://example.com/",
                    "//example.com/",
                    "javascript:1",
                ),
                *(
                    "https://user:pass@127.0.0.1/",
                    "https://example.com\\@127.0.0.1/",
                    "https://a\r\nb/",
                    "https://",
                    "x",
                    "",
                ),
                "https://example.com/" + "a" * 3000,
            )
        )
    ),
    *(
        as_json(f"image_url_{number}", SSRF, {"input_reference": {"image_url": url}}, code="unsupported")
        for number, url in enumerate(
            (
                *(
                    "http://169.254.169.254/latest/",
                    "https://example.com/a.png",
                    "file:///etc/passwd",
                    "http://127.0.0.1:8265/",
                ),
                *("//example.com/a.png", "ftp://example.com/a.png", "", "DATA/../../etc/passwd"),
            )
        )
    ),
    as_json("file_id", SSRF, {"input_reference": {"file_id": "file_1"}}, code="unsupported"),
    as_form("image_url_form", SSRF, lambda: [text("input_reference[image_url]", b"http://[::1]/")], code="unsupported"),
    # ------------------------------------------------------------------------------------------------- routes and keys
    plain("no_key", ROUTES, VIDEOS, 401, headers=[("Authorization", "")]),
    plain("unknown_key", ROUTES, VIDEOS, 401, headers=[("Authorization", "Bearer sk-nobody")]),
    plain(
        "key_of_100_kb",
        ROUTES,
        VIDEOS,
        {400, 401, 431},
        headers=[("Authorization", "Bearer " + "a" * 50_000)],
        by_proxy=True,
        may_hang_up=True,
    ),
    plain("no_route", ROUTES, "/v1/nothing", 404),
    plain("no_method", ROUTES, VIDEOS, 405, "PUT"),
    plain("no_variant", ROUTES, "/v1/videos/{mine}/content?variant=spritesheet", {400, 404}),
    plain("unknown_model", ROUTES, "/v1/models/nothing", 404),
    as_json("unknown_parameter", ROUTES, {"promt": "a"}, code="unknown_parameter"),
    as_json("model_unknown", ROUTES, {"model": "nothing"}, status=404),
    Case("xml", ROUTES, "POST", VIDEOS, [("Content-Type", "text/xml")], lambda: b"<a/>", frozenset({415})),
    Case(
        "idempotency_key_of_10_kb",
        ROUTES,
        "POST",
        VIDEOS,
        [("Content-Type", JSON), ("Idempotency-Key", "k" * 10_000)],
        lambda: b'{"prompt": "a"}',
    ),
]
