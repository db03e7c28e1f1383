"""Rows of launches as they are written: new ones among those of an architecture, each with what it was measured on.

A row is {fields..., "launch": {...}}. Its lists (dtypes, ops, kinds) say whom it serves, its numbers how wide and how
long a call may be (null: any); of the rows that serve a call the first is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def merged(rows: Sequence[Row], found: Sequence[Row], asked: Sequence[str] = ()) -> list[Row]:
    """`rows`, with `found` in the place of what serves the same calls; the narrower and the shorter come first.

    asked: entries of a launch that callers ask for: rows that differ in them do not replace each other.
    """
    single = {_calls(one, asked): one for row in (*rows, *found) for one in _split(row)}
    kinds = [*dict.fromkeys(_kind(one, asked) for one in single.values())]
    served = [*dict.fromkeys(json.dumps(_lists(one)) for one in single.values())]
    joined: list[Row] = [*single.values()]
    for name in reversed([*dict.fromkeys(name for one in joined for name in _lists(one))]):
        joined = _joined(joined, name)

    def place(row: Row) -> tuple[Any, ...]:
        first = min(served.index(json.dumps(_lists(one))) for one in _split(row))
        return kinds.index(_kind(row, asked)), first, bounds(row)

    return sorted(joined, key=place)


def serving(rows: Iterable[Row], row: Row, asked: Sequence[str] = ()) -> Row | None:
    """The first of `rows` that serves all that `row` does."""
    for one in rows:
        lists = all({*values} <= {*one[name]} for name, values in _lists(row).items() if name in one)
        wide = all(side <= bound for side, bound in zip(bounds(row), bounds(one), strict=True))
        if lists and wide and _kind(one, asked) == _kind(row, asked):
            return one
    return None


def bounds(row: Row) -> list[float]:
    """How wide and how long."""
    numbers = [value for value in row.values() if value is None or isinstance(value, int)]
    return [math.inf if number is None else number for number in numbers]


def rewrite(path: Path, arch: int, found: Sequence[Row], asked: Sequence[str] = ()) -> None:
    """The rows of one architecture, all of them or none; the others stay as they are."""
    table = json.loads(path.read_text())
    write(path, table | {str(arch): merged(table.get(str(arch), []), found, asked)})


def write(path: Path, table: Mapping[str, Sequence[Row]]) -> None:
    """A row a line, into a file beside it first."""
    parts = [
        f' "{arch}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]" for arch, rows in table.items()
    ]
    beside = path.with_suffix(".part")
    beside.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    beside.replace(path)


def _lists(row: Row) -> dict[str, list[str]]:
    return {name: value for name, value in row.items() if isinstance(value, list)}


def _split(row: Row) -> Iterable[dict[str, Any]]:
    """A row for each that it serves."""
    lists = _lists(row)
    for values in product(*lists.values()):
        yield dict(row) | {name: [value] for name, value in zip(lists, values, strict=True)}


def _joined(rows: Iterable[Row], name: str) -> list[Row]:
    """Rows that differ in this list alone are one."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        same = json.dumps({key: value for key, value in row.items() if key != name})
        group = groups.setdefault(same, dict(row) | ({name: []} if name in row else {}))
        group.update({name: [*group[name], *row[name]]} if name in row else {})
    return [*groups.values()]


def _kind(row: Row, asked: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row["launch"].get(name, False) for name in asked)


def _calls(row: Row, asked: Iterable[str]) -> str:
    """What a row of one value a list serves."""
    fields = {name: value for name, value in row.items() if name not in ("launch", "measured")}
    return json.dumps([fields, _kind(row, asked)], sort_keys=True)
