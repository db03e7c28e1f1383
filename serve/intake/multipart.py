"""multipart/form-data, read as it arrives: text parts bounded in memory, file parts straight into the spool.

Starlette's own form parsing reads the whole body first, on the disk by any number of files.
"""

from __future__ import annotations

import logging
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..wire.errors import ApiError
from .form_fields import MAX_FIELDS, parse_fields
from .spool import Arriving, Spool

FILES = ("input_reference", "video")  # the only names of file parts; a part's file name is never looked at
MAX_TEXT_BYTES = 64 * 2**10  # of a part: a prompt of 10,000 characters is 40,000 bytes at most
MAX_IMAGE_URL_BYTES = 20 * 2**20  # OpenAI's bound
MAX_TEXTS_BYTES = MAX_IMAGE_URL_BYTES + 2**20  # of all parts
PLAIN_ENCODINGS = (b"binary", b"8bit", b"7bit")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every malformed body; the client is told


class FormReader:
    """Gathers a form's fields chunk by chunk, while its files go to `spool`."""

    def __init__(self, boundary: bytes, spool: Spool) -> None:
        self._texts: list[tuple[str, str]] = []
        self._spool = spool
        self._num_parts = self._num_text_bytes = 0
        self._has_ended = False
        self._header, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._text = bytearray()
        self._file: Arriving | None = None  # None while a part is text
        self._has_file_name = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": lambda data, start, end: self._put(data[start:end]),
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _malformed() from error

    def write(self, chunk: bytes) -> None:
        """Parse a chunk on the event loop: 64 KiB of a file take 0.1 ms to parse, hash and write."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed() from error

    def finish(self) -> dict[str, Any]:
        if not self._has_ended:
            raise ApiError(400, "The form ends before its closing boundary.", code="incomplete_body")
        return parse_fields(self._texts)

    # ------------------------------------------------------------------------------- what the parser calls, in order

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise ApiError(400, f"A form may have {MAX_FIELDS} fields at most.", code="too_many_fields")
        self._headers.clear()

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed()
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in PLAIN_ENCODINGS:
            raise _malformed()
        self._name = _text(options[b"name"])
        self._text.clear()
        self._file = None
        if b"filename" in options:
            if self._name not in FILES:
                param = self._name[:80]
                raise ApiError(400, f"Unknown file: '{param}'.", code="unknown_parameter", param=param)
            if self._name in self._spool.files:
                message = f"Parameter '{self._name}' was given more than once."
                raise ApiError(400, message, code="duplicate_parameter", param=self._name)
            self._file = self._spool.create()
            self._has_file_name = options[b"filename"] != b""

    def _put(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            return
        self._num_text_bytes += len(data)
        longest = MAX_IMAGE_URL_BYTES if self._name == "input_reference[image_url]" else MAX_TEXT_BYTES
        if len(self._text) + len(data) > longest or self._num_text_bytes > MAX_TEXTS_BYTES:
            param = self._name.partition("[")[0][:80]
            message = f"Invalid '{param}': the text is too long."
            raise ApiError(400, message, code="string_above_max_length", param=param)
        self._text += data

    def _end_part(self) -> None:
        if self._file is None:
            self._texts.append((self._name, _text(self._text)))
            return
        upload = self._file.finish()
        if upload.num_bytes:
            self._spool.files[self._name] = upload
        elif self._has_file_name:  # without one it is what a browser sends for a file that nobody chose
            message = f"Invalid '{self._name}': the file is empty."
            raise ApiError(400, message, code="invalid_value", param=self._name)

    def _end(self) -> None:
        self._has_ended = True


def _text(data: bytes | bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, "The form's text must be UTF-8.", code="invalid_body") from error


def _malformed() -> ApiError:
    return ApiError(400, "The body is not a well-formed form.", code="invalid_body")
