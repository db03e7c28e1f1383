"""A request's body, read as it arrives: form or JSON, bounded, its files on disk and gone with the request.

with await read_body(request, max_bytes=config.max_body_bytes, folder=config.scratch) as body:
    ...  # body.fields for the schema, body.files["input_reference"].path for serve/intake/media.py
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import parse_qsl

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from ..wire.errors import ApiError
from .form_fields import MAX_FIELDS, parse_fields
from .multipart import FILES, MAX_IMAGE_URL_BYTES, FormReader
from .spool import Spool, Upload
from .strict_json import JsonReader

__all__ = ["Body", "Unread", "Upload", "read_body"]

TIMEOUT_S = 300.0  # for a whole body: 64 MiB at 2 Mbit/s
MAX_URLENCODED_BYTES = 2**20
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Body:
    """A client's fields and the files that it sent, which are removed when the block is left."""

    fields: dict[str, Any]
    files: dict[str, Upload]
    _spool: Spool

    def close(self) -> None:
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unread(ApiError):
    """A refusal before the body's end, which closes the connection: without the header, uvicorn reads on."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            error.status,
            error.message,
            code=error.code,
            param=error.param,
            type=error.type,
            retry_after_s=error.retry_after_s,
        )

    @property
    def headers(self) -> dict[str, str]:
        return super().headers | {"connection": "close"}


async def read_body(request: Request, *, max_bytes: int, folder: Path) -> Body:
    """Read a request's fields and files. Raises ApiError 4xx for a malformed, too large or cut body, and keeps no file.

    An image within a data URL becomes a file like any other: `input_reference` is never among the fields.
    """
    spool = Spool(folder)
    try:
        reader = _reader(request, spool)
        await _receive(request, reader, max_bytes)
        # In a thread: an image of 15 MiB within JSON takes 0.3 s, for which other requests should not have to wait.
        fields, image = await asyncio.to_thread(_understand, reader, spool.files)
        if image is not None:
            file = spool.create()
            file.write(image)
            spool.files["input_reference"] = file.finish()
        return Body(fields, spool.files, spool)
    except OSError as error:
        spool.close()
        message = "Uploads cannot be stored at the moment."
        refusal = ApiError(503, message, code="storage_unavailable", type="server_error", retry_after_s=5)
        raise Unread(refusal) from error
    except BaseException:  # a request that is cancelled leaves nothing behind either
        spool.close()
        raise


# ------------------------------------------------------------------------------------------------------- receiving


class Reader(Protocol):
    """A reader of one content type."""

    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> dict[str, Any]: ...


class UrlencodedReader:
    """Reads the form that `curl -d` sends."""

    def __init__(self) -> None:
        self._text = bytearray()

    def write(self, chunk: bytes) -> None:
        if len(self._text) + len(chunk) > MAX_URLENCODED_BYTES:
            raise ApiError(413, f"Such a form may have {MAX_URLENCODED_BYTES} bytes at most.", code="request_too_large")
        self._text += chunk

    def finish(self) -> dict[str, Any]:
        try:
            pairs = parse_qsl(
                self._text.decode(),
                keep_blank_values=True,
                strict_parsing=True,
                errors="strict",
                max_num_fields=MAX_FIELDS,
            )
        except ValueError as error:
            raise ApiError(400, "The body is not a well-formed form.", code="invalid_body") from error
        return parse_fields(pairs)


class NothingReader:
    """Reads a body of an unknown content type: it may only be empty."""

    def write(self, chunk: bytes) -> None:
        if chunk:
            message = "The body must be multipart/form-data or application/json."
            raise ApiError(415, message, code="unsupported_media_type")

    def finish(self) -> dict[str, Any]:
        return {}


def _reader(request: Request, spool: Spool) -> Reader:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if request.headers.get("content-encoding", "identity").lower() != "identity":  # nothing is unpacked here
        return NothingReader()
    if kind == b"multipart/form-data":
        return FormReader(options.get(b"boundary", b""), spool)
    if kind == b"application/x-www-form-urlencoded":
        return UrlencodedReader()
    return JsonReader() if kind == b"application/json" else NothingReader()


async def _receive(request: Request, reader: Reader, max_bytes: int) -> None:
    """Read the body, to its end, into the reader. Raises Unread before the end."""
    too_large = ApiError(413, f"A request may have {max_bytes} bytes at most.", code="request_too_large")
    promised = request.headers.get("content-length")
    try:
        if promised is not None and not re.fullmatch("[0-9]{1,18}", promised):
            raise ApiError(400, "Content-Length must be a number.", code="invalid_body")
        if promised is not None and int(promised) > max_bytes:
            raise too_large
        num_bytes = 0
        async with asyncio.timeout(TIMEOUT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large
                reader.write(chunk)
        if promised is not None and num_bytes != int(promised):
            raise _cut_short()
    except ApiError as error:
        raise Unread(error) from error
    except ClientDisconnect as error:
        raise Unread(_cut_short()) from error
    except TimeoutError as error:
        raise Unread(ApiError(408, "The body took too long to arrive.", code="timeout")) from error


def _cut_short() -> ApiError:
    return ApiError(400, "The body is shorter than its Content-Length.", code="incomplete_body")


# ------------------------------------------------------------------------------------------------ what has arrived


def _understand(reader: Reader, files: Mapping[str, Upload]) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields, and the image that came within `input_reference`, which is then not among them."""
    fields = reader.finish()
    _check_texts(fields)
    for name in FILES:
        if name in files and name in fields:
            raise ApiError(400, f"Parameter '{name}' was given more than once.", code="duplicate_parameter", param=name)
    if not isinstance(fields.get("video"), dict | None):
        raise _invalid("video", "must be a file, or an object with the id of a video")
    reference = fields.pop("input_reference", None)
    return fields, None if reference is None else _image_of(reference, "input_reference")


def _check_texts(fields: dict[str, Any]) -> None:
    """Refuse what could be neither stored nor sent back: null characters and halves of surrogate pairs."""
    for name, value in fields.items():
        if not _is_clean(name):
            raise ApiError(400, "A parameter's name has characters that are not allowed.", code="invalid_field_name")
        if not _is_clean(value):
            raise _invalid(name[:80], "must be valid Unicode without null characters")


def _is_clean(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_clean(key) and _is_clean(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_clean, value))
    return not isinstance(value, str) or ("\0" not in value and (value.isascii() or not SURROGATE.search(value)))


def _image_of(reference: Any, name: str) -> bytes:
    if not isinstance(reference, dict) or {*reference} not in ({"image_url"}, {"file_id"}):
        raise _invalid(name, "must be a file, or an object with an image_url")
    if "file_id" in reference:
        raise ApiError(400, f"'{name}.file_id' is not supported: send the file itself.", code="unsupported", param=name)
    return _data_of(reference["image_url"], name)


def _data_of(url: Any, name: str) -> bytes:
    if not isinstance(url, str) or len(url) > MAX_IMAGE_URL_BYTES:
        raise _invalid(name, f"image_url must be a string of at most {MAX_IMAGE_URL_BYTES} characters")
    if url[:5].lower() != "data:":
        message = f"'{name}.image_url' must be a data: URL: other URLs are not fetched."
        raise ApiError(400, message, code="unsupported", param=name)
    head, _, data = url.partition(",")
    if not head.lower().endswith(";base64") or not data:  # its media type is not looked at: the bytes say what they are
        raise _invalid(name, "image_url must be data:image/...;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise _invalid(name, "image_url is not valid base64") from error


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}': {message}.", code="invalid_value", param=param)
