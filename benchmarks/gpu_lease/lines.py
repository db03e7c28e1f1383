"""The lines that a case of a lease gives, as JSON and back: figures, checks, notes, failures and absences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..harness import Turns, ratios, spread_of
from ..kernels.apart import Limits
from ..record import Better, Check, Comparison, Contestant, Label, Measurement, Row, Spread


@dataclass(frozen=True, kw_only=True)
class Note:
    """A fact that is no figure, such as the doctor's report or a run's model. It stands in the report's settings."""

    name: str
    value: Any  # of JSON


@dataclass(frozen=True, kw_only=True)
class Failed:
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A thing that this machine lacks, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A row for `kernels/NAME.json` that was found on the device; `asked` as in `kernels.search.Search`."""

    name: str
    arch: int
    row: dict[str, Any]
    asked: tuple[str, ...]


Line = Row | Check | Limits | Measurement | Comparison | Note | Failed | Absent | Launch
KINDS = {kind.__name__: kind for kind in (Row, Check, Limits, Measurement, Comparison, Note, Failed, Absent, Launch)}
Labels = dict[str, Label]


def encode(line: Line) -> dict[str, Any]:
    return {"kind": type(line).__name__, **asdict(line)}


def decode(content: Mapping[str, Any]) -> Line:
    """Undo `encode`, by hand: the device machine has no pydantic."""
    given = dict(content)
    kind = given.pop("kind")
    if kind in ("Measurement", "Comparison"):
        given["spread"] = Spread(**given["spread"])
    elif kind == "Limits":
        given["limits"] = {name: Spread(**spread) for name, spread in given["limits"].items()}
    elif kind == "Row":
        given["contestants"] = {name: _contestant(it) for name, it in given["contestants"].items()}
    elif kind == "Launch":
        given["asked"] = tuple(given["asked"])
    line: Line = KINDS[kind](**given)
    return line


def _contestant(content: Mapping[str, Any]) -> Contestant:
    spreads = {name: Spread(**content[name]) for name in ("seconds", "ratio") if content[name] is not None}
    return Contestant(**{**content, **spreads})


def measured(
    name: str, unit: str, samples: Sequence[float], better: Better = "lower", labels: Labels | None = None
) -> Measurement:
    """Return a measurement of samples, in the order in which they were taken."""
    values = [float(value) for value in samples]
    return Measurement(
        name=name, unit=unit, better=better, spread=spread_of(values), samples=values, labels=dict(labels or {})
    )


def of_turns(group: str, turns: Turns, ours: str, labels: Labels | None = None) -> list[Line]:
    """Return each contestant's seconds, their ratios to `ours` round by round, and the failures."""
    found: list[Line] = [measured(f"{group}/{name}", "s", s, labels=labels) for name, s in turns.samples.items()]
    for name in turns.samples:
        if name != ours and ours in turns.samples:
            values = ratios(turns.samples[name], turns.samples[ours])
            found.append(Comparison(name=f"{group}/{name}", of=name, to=ours, spread=spread_of(values), samples=values))
    return [*found, *(Failed(name=f"{group}/{name}", reason=reason) for name, reason in turns.failed.items())]
