"""Prints the answers of an operator's commands: one JSON object, or a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def iso(seconds: float | None) -> str:
    """Return a time in UTC as people read it; "-" for none."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_json(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns; "-" for a missing value."""
    cells = [[name.upper() for name in columns], *([_text(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print one fact a line."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_text(value)}")


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(mark if mark.isprintable() else "?" for mark in text)
