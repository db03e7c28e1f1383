"""Result files: one schema with a version, written whole or not at all, marked where a run did not end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.video_file import replaced_when_complete

SCHEMA: Literal["skylapse.benchmark/1"] = "skylapse.benchmark/1"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(Strict):
    """low and high: the median's interval of 95 %; None of fewer than 6 values."""

    median: Finite
    q1: Finite
    q3: Finite
    low: Finite | None
    high: Finite | None
    n: int


class Contestant(Strict):
    """One implementation in a comparison.

    ratio: its seconds over those of the row's `ours`, round by round; above 1 ours is faster. roofline_share: the least
    time that the device's measured limits allow, over its median.
    """

    status: Literal["ok", "missing", "failed"]
    reason: str | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    roofline_share: Finite | None = None


class Row(Strict):
    """One operation at one shape; num_bytes and operations are the least that it must move and compute."""

    op: str
    case: str
    ours: str
    num_bytes: int
    operations: int
    contestants: dict[str, Contestant]
    gpu: dict[str, Finite] = {}  # its clocks, power and temperature behind the last round


class Check(Strict):
    """One implementation against float64 on the device.

    worst: the greatest distance of an element, in units of the result's root mean square; runs: how many gave the same.
    """

    op: str
    case: str
    status: Literal["ok", "wrong", "failed"]
    worst: Finite | None = None
    tolerance: Finite | None = None
    runs: int = 0
    reason: str | None = None


class Report(Strict):
    """What every result file has; a suite's own class adds its rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["skylapse.benchmark/1"] = Field(alias="schema")
    benchmark: str
    suite: str
    quick: bool
    machine: dict[str, Any]
    elapsed_s: Finite
    partial: str | None  # why the run did not come to its end; None where it did

    @property
    def is_publishable(self) -> bool:
        """A whole run of a commit that others can have."""
        return self.partial is None and bool(self.machine.get("commit")) and self.machine.get("dirty") is False


class KernelReport(Report):
    """Of `kernels`; limits: measured on the device, bytes or operations a second."""

    benchmark: Literal["kernels"] = "kernels"
    seed: int  # of the checks' shapes and numbers
    limits: dict[str, Spread]
    checks: list[Check]
    rows: list[Row]


Better = Literal["lower", "higher", "neither"]
Label = str | int | float


class Measurement(Strict):
    """One figure of a suite; samples: in the order in which they were taken, so that two runs can be paired."""

    name: str
    unit: str
    better: Better
    spread: Spread
    samples: list[Finite]
    labels: dict[str, Label] = {}


class Comparison(Strict):
    """`of` over `to`, round by round: of seconds, above 1 `to` is the faster one."""

    name: str
    of: str
    to: str
    spread: Spread
    samples: list[Finite]
    labels: dict[str, Label] = {}


class Curve(Strict):
    """Points of a plot; x and y say what they are, with the unit."""

    name: str
    x: str
    y: str
    points: list[tuple[Finite, Finite]]
    labels: dict[str, Label] = {}


class SuiteReport(Report):
    """Of every other suite; settings: what was asked for and is not in the names.

    failures, missing: name -> reason, of what went wrong and of what this machine has not got.
    """

    seed: int
    model: str
    settings: dict[str, Any]
    measurements: list[Measurement]
    comparisons: list[Comparison] = []
    curves: list[Curve] = []
    failures: dict[str, str] = {}
    missing: dict[str, str] = {}


class Point(Strict):
    """A figure of one run in a history."""

    unit: str
    better: Better
    median: Finite
    low: Finite | None
    high: Finite | None
    n: int


HISTORY_SCHEMA: Literal["skylapse.history/1"] = "skylapse.history/1"


class HistoryLine(Strict):
    """One run in a device's history; date: the commit's, ISO 8601; unpublishable: why it is not, None where it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["skylapse.history/1"] = Field(alias="schema")
    benchmark: str
    commit: str
    date: str
    device: str
    threads: int
    quick: bool
    unpublishable: str | None
    figures: dict[str, Point]


AnyReport = TypeVar("AnyReport", bound=Report)


def write(report: Report, path: Path) -> None:
    """Replaces the file in one move: a reader never sees half of it."""
    text = report.model_dump_json(indent=1, by_alias=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as unfinished:
        unfinished.write_text(text + "\n")


def read(path: Path, kind: type[AnyReport]) -> AnyReport:
    """ValueError says what is wrong with the file."""
    return _checked(path, _content(path), kind)


def read_any(path: Path) -> KernelReport | SuiteReport:
    """A file of any suite."""
    content = _content(path)
    if content.get("benchmark") == "kernels":
        return _checked(path, content, KernelReport)
    return _checked(path, content, SuiteReport)


def read_history(path: Path) -> list[HistoryLine]:
    """Oldest run first, as they were put in."""
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            found.append(HistoryLine.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{path.name} is no history: line {number}: {_first(error)}") from error
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path.name} must have schema {SCHEMA!r}, got {schema!r}")
    return dict(content)


def _checked(path: Path, content: dict[str, Any], kind: type[AnyReport]) -> AnyReport:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path.name} is no result of {kind.__name__}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
