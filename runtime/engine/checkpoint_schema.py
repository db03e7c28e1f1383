"""What a checkpoint's state.json must look like, field by field: it may be damaged, or written by somebody else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from reprlib import repr as short
from typing import Any

VERSION = 2
INDEX = "state.json"
STAGES = {"encode", "denoise", "decode"}


def read_record(folder: Path) -> dict[str, Any]:
    """The record, every field of its kind; ValueError names the first that is not."""
    try:
        record = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"it cannot be read: {INDEX} must hold a JSON object, got {short(record)}")
    if record.get("version") != VERSION:
        raise ValueError(f"it has version {short(record.get('version'))}, and this engine reads {VERSION}")
    for name, (kind, is_one) in FIELDS.items():
        if name not in record:
            raise ValueError(f"{INDEX} has no {name}")
        if not is_one(record[name]):
            raise ValueError(f"{name} must be {kind}, got {short(record[name])}")
    return record


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(value: object, is_one: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_one, value))


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tensors": ("state-K.safetensors", lambda v: _is_text(v) and bool(re.fullmatch(r"state-\d+\.safetensors", v))),
    "sha256": ("text", _is_text),
    "weights": ("text", _is_text),
    "device": ("text", _is_text),
    "dtype": ("text", _is_text),
    "request": ("an object", _is_object),
    "terms": ("an object", _is_object),
    "solver": ("an object", _is_object),
    "frame_is_given": ("a list of true and false", lambda v: _is_list_of(v, lambda flag: isinstance(flag, bool))),
    "trace": ("0 or 1 for each step taken", lambda v: _is_text(v) and set(v) <= {"0", "1"}),
    "close_calls": ("a list of steps", lambda v: _is_list_of(v, _is_count)),
    "peak_state_bytes": ("a whole number", _is_count),
    "timings_s": (
        "the seconds of encode, denoise and decode",
        lambda v: _is_object(v) and v.keys() == STAGES and all(map(_is_duration, v.values())),
    ),
}
