"""Form fields as OpenAI's SDKs send them: `video[id]` is an object's key, `images[]` an item of a list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..wire.errors import ApiError

MAX_FIELDS = 200
MAX_DEPTH = 4  # keys behind the name; the SDKs' own fields have one
NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
KEY = re.compile(r"\[([^\[\]]*)\]")


def parse_fields(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return nested objects and lists of (name, value) pairs, in the order in which they came.

    Raises ApiError 400 for a malformed or too deeply nested name, one used as a value and as an object, or twice, or
    for too many names.
    """
    parsed: dict[str, Any] = {}
    for number, (name, value) in enumerate(fields):
        if number >= MAX_FIELDS:
            raise ApiError(400, f"A form may have {MAX_FIELDS} fields at most.", code="too_many_fields")
        match = NAME.fullmatch(name)
        keys = KEY.findall(match[2]) if match else []
        if match is None or len(keys) > MAX_DEPTH or "" in keys[:-1]:
            raise ApiError(400, f"Malformed field name: {name[:80]!r}.", code="invalid_field_name")
        _put(parsed, [match[1], *keys], value, name)
    return parsed


def _put(parsed: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    is_item = path[-1] == ""
    *parents, last = path[:-1] if is_item else path
    place = parsed
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise _twice(name)
    if is_item:
        items = place.setdefault(last, [])
        if not isinstance(items, list):
            raise _twice(name)
        items.append(value)
    elif last in place:
        raise _twice(name)
    else:
        place[last] = value


def _twice(name: str) -> ApiError:
    param = name.partition("[")[0][:80]
    return ApiError(400, f"Parameter '{param}' was given more than once.", code="duplicate_parameter", param=param)
