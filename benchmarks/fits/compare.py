"""Compare a table that was made now with the committed one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .table import ModelTable, Record

TOLERANCE = 0.03  # of a peak, either way
AGAIN = "`skylapse bench fits` makes the table again"
NAMES = {"parts": ("quantize",), "peaks": ("quantize", "width", "height", "num_frames")}
ROW = ("quantize", "width", "height", "num_frames", "card_gb")
DECIDED = ("resident", "moved", "guidance", "decode_chunk", "tiles", "blocked_by")


@dataclass(frozen=True)
class Change:
    """A difference. worse: more memory is taken, or something fits no more; else the table is only out of date."""

    words: str
    worse: bool

    def __str__(self) -> str:
        return self.words


def changes(old: ModelTable, new: ModelTable) -> Iterator[Change]:
    """Yield the changes that matter; a peak may move by the tolerance."""
    if _but_torch(old.assumptions) != _but_torch(new.assumptions):
        yield Change(f"{new.model}: the assumptions are {new.assumptions}, not {old.assumptions}", worse=False)
    for part, names in NAMES.items():
        before, after = _keyed(getattr(old, part), names), _keyed(getattr(new, part), names)
        yield from _missing(new.model, part, before, after)
        for key in (key for key in after if key in before):
            place = f"{new.model} {_words(key)}"
            for name, count in _numbers(after[key]):
                was = dict(_numbers(before[key])).get(name, 0)
                if abs(count - was) > TOLERANCE * was:
                    grew = "grew" if count > was else "shrank"
                    told = f"{place}: {name} {grew} from {_gb(was)} to {_gb(count)} ({_percent(count, was)})"
                    yield Change(told, worse=count > was)
    before, after = _keyed(old.rows, ROW), _keyed(new.rows, ROW)
    yield from _missing(new.model, "rows", before, after)
    for key in (key for key in after if key in before):
        yield from _of_row(f"{new.model} {_words(key)}", before[key], after[key])


def _of_row(place: str, old: Record, new: Record) -> Iterator[Change]:
    if old["fits"] != new["fits"]:
        told = "fits now" if new["fits"] else f"fits no longer: blocked by {new['blocked_by']}"
        yield Change(f"{place}: {told}", worse=old["fits"])
    elif moved := [name for name in DECIDED if old[name] != new[name]]:
        told = ", ".join(f"{name} is {new[name]!r}, not {old[name]!r}" for name in moved)
        yield Change(f"{place}: {told}", worse=False)


def _missing(model: str, part: str, old: dict[Any, Record], new: dict[Any, Record]) -> Iterator[Change]:
    for key in (key for key in new if key not in old):
        yield Change(f"{model} {_words(key)}: not in the table's {part}", worse=False)
    for key in (key for key in old if key not in new):
        yield Change(f"{model} {_words(key)}: in the table's {part}, and made no more", worse=True)


def _keyed(records: list[Record], names: tuple[str, ...]) -> dict[tuple[Any, ...], Record]:
    return {tuple(record[name] for name in names): record for record in records}


def _words(key: tuple[Any, ...]) -> str:
    """Name a key: (None, 1280, 720, 81, 80) -> bf16 1280x720x81 on 80 GB."""
    quantize, *size = key
    words = [quantize or "bf16"]
    if size:
        words.append("x".join(map(str, size[:3])))
    if len(size) > 3:
        words.append(f"on {size[3]} GB")
    return " ".join(words)


def _numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield every figure of a record, with a name such as "step together", without those of the record's key."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int) and name not in ROW:
            yield f"{prefix}{name}", value


def _but_torch(assumptions: Record) -> Record:
    return {name: value for name, value in assumptions.items() if name != "torch"}


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count > 1e6 else str(count)


def _percent(count: int, was: int) -> str:
    return f"{100 * (count / was - 1):+.1f} %" if was else "from nothing"
