"""Result files: one schema with a version, written whole or not at all, marked where a run did not end.

Reports are dataclasses, so that a machine without pydantic measures and writes; pydantic checks what is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from ..runtime.media.writer import replaced_when_complete

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

SCHEMA: Literal["skylapse.benchmark/1"] = "skylapse.benchmark/1"


class Strict:
    """How pydantic reads a record: a field too many is an error, and so is a number that is not finite."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


def _check_finite(owner: str, values: Iterable[float | None]) -> None:
    if bad := [value for value in values if value is not None and not math.isfinite(value)]:
        raise ValueError(f"{owner} must be of finite numbers, got {bad[0]}")


@dataclass(frozen=True, kw_only=True)
class Spread(Strict):
    """low and high: the median's interval of 95 %; None of fewer than 6 values."""

    median: float
    q1: float
    q3: float
    low: float | None
    high: float | None
    n: int

    def __post_init__(self) -> None:
        _check_finite("a spread", (self.median, self.q1, self.q3, self.low, self.high))


@dataclass(frozen=True, kw_only=True)
class Contestant(Strict):
    """One implementation in a comparison.

    ratio: its seconds over those of the row's `ours`, round by round; above 1 ours is faster. roofline_share: the least
    time that the device's measured limits allow, over its median.
    """

    status: Literal["ok", "missing", "failed"]
    reason: str | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    roofline_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row(Strict):
    """One operation at one shape; num_bytes and operations are the least that it must move and compute."""

    op: str
    case: str
    ours: str
    num_bytes: int
    operations: int
    contestants: dict[str, Contestant]
    gpu: dict[str, float] = field(default_factory=dict)  # its clocks, power and temperature behind the last round


@dataclass(frozen=True, kw_only=True)
class Check(Strict):
    """One implementation against float64 on the device.

    worst: the greatest distance of an element, in units of the result's root mean square; runs: how many gave the same.
    """

    op: str
    case: str
    status: Literal["ok", "wrong", "failed"]
    worst: float | None = None
    tolerance: float | None = None
    runs: int = 0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Strict):
    """What every result file has; a suite's own class adds its rows."""

    schema: Literal["skylapse.benchmark/1"]
    benchmark: str
    suite: str
    quick: bool
    machine: dict[str, Any]
    elapsed_s: float
    partial: str | None  # why the run did not come to its end; None where it did

    @property
    def is_publishable(self) -> bool:
        """A whole run of a commit that others can have."""
        return self.partial is None and bool(self.machine.get("commit")) and self.machine.get("dirty") is False


@dataclass(frozen=True, kw_only=True)
class KernelReport(Report):
    """Of `kernels`; limits: measured on the device, bytes or operations a second."""

    benchmark: Literal["kernels"] = "kernels"
    seed: int  # of the checks' shapes and numbers
    limits: dict[str, Spread]
    checks: list[Check]
    rows: list[Row]


Better = Literal["lower", "higher", "neither"]
Label = str | int | float


@dataclass(frozen=True, kw_only=True)
class Measurement(Strict):
    """One figure of a suite; samples: in the order in which they were taken, so that two runs can be paired."""

    name: str
    unit: str
    better: Better
    spread: Spread
    samples: list[float]
    labels: dict[str, Label] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_finite(self.name, self.samples)


@dataclass(frozen=True, kw_only=True)
class Comparison(Strict):
    """`of` over `to`, round by round: of seconds, above 1 `to` is the faster one."""

    name: str
    of: str
    to: str
    spread: Spread
    samples: list[float]
    labels: dict[str, Label] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_finite(self.name, self.samples)


@dataclass(frozen=True, kw_only=True)
class Curve(Strict):
    """Points of a plot; x and y say what they are, with the unit."""

    name: str
    x: str
    y: str
    points: list[tuple[float, float]]
    labels: dict[str, Label] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_finite(self.name, chain.from_iterable(self.points))


@dataclass(frozen=True, kw_only=True)
class SuiteReport(Report):
    """Of every other suite; settings: what was asked for and is not in the names.

    failures, missing: name -> reason, of what went wrong and of what this machine has not got.
    """

    seed: int
    model: str
    settings: dict[str, Any]
    measurements: list[Measurement]
    comparisons: list[Comparison] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LeaseReport(SuiteReport):
    """Of a lent GPU: figures, and checks and comparisons of kernels as `KernelReport` has them."""

    benchmark: Literal["gpu_lease"] = "gpu_lease"
    limits: dict[str, Spread]
    checks: list[Check]
    rows: list[Row]


KernelResult = KernelReport | LeaseReport  # what has checks and comparisons of kernels, and the device's limits


@dataclass(frozen=True, kw_only=True)
class Point(Strict):
    """A figure of one run in a history."""

    unit: str
    better: Better
    median: float
    low: float | None
    high: float | None
    n: int


HISTORY_SCHEMA: Literal["skylapse.history/1"] = "skylapse.history/1"


@dataclass(frozen=True, kw_only=True)
class HistoryLine(Strict):
    """One run in a device's history; date: the commit's, ISO 8601; unpublishable: why it is not, None where it is."""

    schema: Literal["skylapse.history/1"]
    benchmark: str
    commit: str
    date: str
    device: str
    threads: int
    quick: bool
    unpublishable: str | None
    figures: dict[str, Point]


AnyReport = TypeVar("AnyReport", bound=Report)
AnyRecord = TypeVar("AnyRecord")


def write(report: Report, path: Path) -> None:
    """Replaces the file in one move: a reader never sees half of it."""
    text = json.dumps(asdict(report), indent=1, allow_nan=False, ensure_ascii=False, default=_plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as unfinished:
        unfinished.write_text(text + "\n")


def read(path: Path, kind: type[AnyReport]) -> AnyReport:
    """ValueError says what is wrong with the file."""
    return _checked(path, _content(path), kind)


def read_any(path: Path) -> KernelReport | SuiteReport:
    """A file of any suite."""
    content = _content(path)
    kinds: dict[object, type[KernelReport | SuiteReport]] = {"kernels": KernelReport, "gpu_lease": LeaseReport}
    return _checked(path, content, kinds.get(content.get("benchmark"), SuiteReport))


def read_history(path: Path) -> list[HistoryLine]:
    """Oldest run first, as they were put in."""
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            found.append(from_json(HistoryLine, line))
        except ValueError as error:
            raise ValueError(f"{path.name} is no history: line {number}: {error}") from error
    return found


def from_json(kind: type[AnyRecord], text: str) -> AnyRecord:
    """A record of one line of JSON; ValueError names the field that is wrong."""
    from pydantic import ValidationError

    try:
        found: AnyRecord = _adapter(kind).validate_json(text)
        return found
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def to_json(record: Any) -> str:
    """A record on one line; ValueError where a number is not finite."""
    return json.dumps(asdict(record), separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=_plain)


def _plain(value: object) -> str:
    """What JSON has no word for, in settings and facts of a machine."""
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"a result must be of JSON, got an object of {type(value).__name__}")


def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


_adapters: dict[Any, TypeAdapter[Any]] = {}


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
    from pydantic import ValidationError

    try:
        found: AnyReport = _adapter(kind).validate_python(content)
        return found
    except ValidationError as error:
        raise ValueError(f"{path.name} is no result of {kind.__name__}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
