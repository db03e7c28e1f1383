"""Parses JSON from clients, after bounding its size, nesting and number of values."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from ..wire.errors import ApiError

MAX_BYTES = 24 * 2**20  # an image of 20 MiB, as base64 within a data URL, is most of it
MAX_DEPTH = 16
# Opening brackets, quotes and commas: 24 MiB of `{},{},...` would take 608 MB as dicts. Prose has some, too, but two
# prompts of 10,000 characters fit whatever they consist of.
MAX_MARKS = 50_000
STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class JsonReader:
    """Gathers an object chunk by chunk."""

    def __init__(self) -> None:
        self._text = bytearray()

    def write(self, chunk: bytes) -> None:
        if len(self._text) + len(chunk) > MAX_BYTES:
            raise ApiError(413, f"A JSON body may have {MAX_BYTES} bytes at most.", code="request_too_large")
        self._text += chunk

    def finish(self) -> dict[str, Any]:
        return parse_object(self._text) if self._text else {}


def parse_object(text: bytes | bytearray) -> dict[str, Any]:
    """Parse an object. Raises ApiError 400 if it is none, not UTF-8, too complex, or has NaN or a key twice."""
    num_brackets = text.count(b"[") + text.count(b"{")
    has_too_many = num_brackets + text.count(b'"') + text.count(b",") > MAX_MARKS
    if has_too_many or (num_brackets > MAX_DEPTH and _depth(text) > MAX_DEPTH):
        raise ApiError(400, f"The JSON body has too many values, or more than {MAX_DEPTH} levels.", code="invalid_json")
    try:
        parsed = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except ValueError as error:  # also of bytes that are no UTF-8, and of integers beyond Python's 4300 digits
        raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, "The JSON body must be an object.", code="invalid_json")
    return parsed


def _depth(text: bytes | bytearray) -> int:
    """Return the depth of brackets outside strings: json.loads recurses, and thousands of levels may end a process."""
    depth = deepest = 0
    for match in STRING_OR_BRACKET.finditer(text):
        mark = text[match.start()]
        if mark in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in b"]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name, value in pairs:
        if name in parsed:  # which of the two counts is what parsers disagree on
            param = name[:80].encode(errors="replace").decode()
            message = f"Parameter '{param}' was given more than once."
            raise ApiError(400, message, code="duplicate_parameter", param=param)
        parsed[name] = value
    return parsed


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and infinities are not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # 1e400
        raise ValueError("beyond every float")
    return number
