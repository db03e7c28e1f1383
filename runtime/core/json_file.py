"""Read JSON files of a checkpoint as objects, or as dataclasses whose fields have the types that they name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
SHOWN = 60  # characters of a wrong value
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
}


def read_json(path: Path, name: str | None = None) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file where it is not one.

    name: what the file is called in a message, by default its folder's name and its own.
    """
    name = name or f"{path.parent.name}/{path.name}"
    check_no_pointer(path, name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{name} is missing") from error
    except (ValueError, OSError, RecursionError) as error:  # one of bytes, syntax, or a number of too many digits
        raise ValueError(f"{name} is not readable JSON: {_unreadable(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {shown(value)}")
    return value


def _unreadable(error: ValueError | OSError | RecursionError) -> str:
    """Describe the mistake without the parser's words."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8"
    if isinstance(error, OSError):
        return str(error.strerror or type(error).__name__)
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def check_no_pointer(path: Path, name: str) -> None:
    """Raise ValueError for the pointer that `git clone` leaves of a large file without Git LFS."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
    except OSError:
        return
    if beginning == LFS_POINTER:
        raise ValueError(f"{name} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the folder")


def shown(value: object) -> str:
    """Return a value as JSON writes it, on one line and never long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def typed(config_class: type[Config], fields: Mapping[str, Any], file: str) -> Config:
    """Return a dataclass of the fields of a JSON file that it has; its own `check` is called where it has one.

    ValueError names the file and the field whose value is of another type or out of its bounds.
    """
    hints = hints_of(config_class)
    given = {name: value for name, value in fields.items() if name in hints and value is not None}
    try:
        config = config_class(**{name: typed_value(name, value, hints[name]) for name, value in given.items()})
        if (check := getattr(config, "check", None)) is not None:
            check()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def typed_value(name: str, value: Any, hint: Any) -> Any:
    """Return a JSON value as a field of this type holds it, lists as tuples; ValueError says what it must be."""
    if get_origin(hint) in (Union, UnionType):  # with None, which stands for a field that is not there
        (hint,) = [choice for choice in get_args(hint) if choice is not NoneType]
    if (origin := get_origin(hint)) is None:
        if not _is(value, hint):
            raise ValueError(f"{name} must be {WORDS[hint][0]}, got {shown(value)}")
        return value
    assert issubclass(origin, Sequence), hint
    items = get_args(hint)
    length = len(items) if origin is tuple and Ellipsis not in items else None
    if (
        not isinstance(value, list | tuple)
        or length not in (None, len(value))
        or not all(_is(item, items[0]) for item in value)
    ):
        count = "a list of" if length is None else str(length)
        raise ValueError(f"{name} must be {count} {WORDS[items[0]][1]}, got {shown(value)}")
    return tuple(value)


def within(config: object, low: int, high: int, *names: str, even: bool = False) -> None:
    """Raise ValueError unless each of these fields, and each item of a tuple, is None or from `low` to `high`."""
    for name in names:
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not (low <= item <= high and not (even and item % 2)):
                raise ValueError(
                    f"{name} must be {'even and ' if even else ''}from {low} to {high}, got {shown(value)}"
                )


def hints_of(config_class: type[Any]) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields_of(config_class)}


def _is(value: Any, kind: type[Any]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)
