"""When requests arrive: Poisson, bursts, a day's wave, or a recorded trace."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .workloads import Ask

BURST_FACTOR, BURST_SHARE = 4.0, 0.15  # in a burst the rate is 4 times the mean, for 15 % of the time
BURST_CYCLE_REQUESTS = 40.0  # that are expected from one burst's beginning to the next one's
DIURNAL_DEPTH = 0.8  # of the wave: from 0.2 to 1.8 times the mean rate
COLUMNS = ("at_s", "class", "prompt", "negative_prompt", "size", "seconds", "num_frames", "frames", "fps")
NUMBERS = ("num_inference_steps", "steps", "seed", "guidance_scale")
ALIASES = {"frames": "num_frames", "steps": "num_inference_steps"}
WHOLE = ("num_frames", "fps", "num_inference_steps", "seed")


@dataclass(frozen=True)
class Arrival:
    """One request: when it is due, its class, the body, and how many seconds of video it asks for."""

    at_s: float
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    video_s: float = 0.0


def poisson(
    rate: float, ask: Ask, seed: int, *, requests: int | None = None, duration_s: float | None = None
) -> list[Arrival]:
    """Exponential gaps of mean 1/rate, until there are so many or so long."""
    rng = random.Random(seed)
    return _taken((rng.expovariate(rate) for _ in iter(int, 1)), ask, requests, duration_s)


def burst(
    rate: float, ask: Ask, seed: int, *, requests: int | None = None, duration_s: float | None = None
) -> list[Arrival]:
    """A Poisson process of two rates (MMPP-2): calm, and bursts of 4 times the mean rate `rate`."""
    rng = random.Random(seed)
    calm = rate * (1 - BURST_FACTOR * BURST_SHARE) / (1 - BURST_SHARE)
    cycle_s = BURST_CYCLE_REQUESTS / rate
    stay_s = {True: cycle_s * BURST_SHARE, False: cycle_s * (1 - BURST_SHARE)}

    def gaps() -> Iterator[float]:
        # A trace that always began calm would have too few requests: the first state is drawn as it is met at random.
        bursting = rng.random() < BURST_SHARE
        left_s, gap_s = rng.expovariate(1 / stay_s[bursting]), 0.0
        while True:
            step_s = rng.expovariate(rate * BURST_FACTOR if bursting else calm)
            if step_s < left_s:
                left_s -= step_s
                yield gap_s + step_s
                gap_s = 0.0
            else:  # without memory: what is left of the gap is drawn anew at the other rate
                gap_s += left_s
                bursting = not bursting
                left_s = rng.expovariate(1 / stay_s[bursting])

    return _taken(gaps(), ask, requests, duration_s)


def diurnal(
    rate: float, ask: Ask, seed: int, *, requests: int | None = None, duration_s: float | None = None
) -> list[Arrival]:
    """A Poisson process whose rate is one wave of the sine over the trace: a day, as short as the run. By thinning."""
    rng = random.Random(seed)
    period_s = duration_s or (requests or 1) / rate
    most = rate * (1 + DIURNAL_DEPTH)

    def gaps() -> Iterator[float]:
        at_s = last_s = 0.0
        while True:
            at_s += rng.expovariate(most)
            now = rate * (1 - DIURNAL_DEPTH * math.cos(2 * math.pi * at_s / period_s))
            if rng.random() * most < now:
                yield at_s - last_s
                last_s = at_s

    return _taken(gaps(), ask, requests, duration_s)


def at_once(ask: Ask, requests: int) -> list[Arrival]:
    """All at second 0: MLPerf's Offline, and what closed loops take one by one."""
    return _taken(iter([0.0] * requests), ask, requests, None)


PROCESSES = {"poisson": poisson, "burst": burst, "diurnal": diurnal}


def draw(name: str, rate: float, ask: Ask, seed: int, requests: int | None, duration_s: float | None) -> list[Arrival]:
    """ValueError where the trace would be empty or endless."""
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be above 0 requests a second, got {rate:g}")
    if requests is None and duration_s is None:
        raise ValueError("requests or duration must be given: a trace of an arrival process has no end of its own")
    if requests is not None and requests < 1:
        raise ValueError(f"requests must be at least 1, got {requests}")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration must be above 0 seconds, got {duration_s:g}")
    arrivals = PROCESSES[name](rate, ask, seed, requests=requests, duration_s=duration_s)
    if not arrivals:
        raise ValueError(f"the trace is empty: no request arrives in {duration_s:g} s at {rate:g}/s with seed {seed}")
    return arrivals


def _taken(gaps: Iterator[float], ask: Ask, requests: int | None, duration_s: float | None) -> list[Arrival]:
    arrivals: list[Arrival] = []
    at_s = 0.0
    for gap_s in gaps:
        at_s += gap_s
        if (duration_s is not None and at_s >= duration_s) or len(arrivals) == requests:
            break
        arrivals.append(Arrival(at_s, *ask(len(arrivals))))
        if len(arrivals) == requests:
            break
    return arrivals


# --- recorded traces --------------------------------------------------------------------------------------------------


def replay(path: Path, ask: Ask, speed: float = 1.0) -> list[Arrival]:
    """A recorded trace: JSON lines, or CSV with a header; `speed` 2 plays it twice as fast.

    `at_s` alone must be there; what a line does not say is the workload's. Times begin at the first one, and need not
    be in order in the file. ValueError names the line that is wrong.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed must be above 0, got {speed:g}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} must be text in UTF-8: {error.reason} at byte {error.start}") from None
    lines = _csv(path.name, text) if path.suffix.lower() == ".csv" else _json_lines(path.name, text)
    rows = [(number, _row(f"{path.name}, line {number}", row)) for number, row in lines]
    if not rows:
        raise ValueError(f"{path.name} must have requests, and has none: the trace is empty")
    first_s = min(row["at_s"] for _, row in rows)
    arrivals = []
    for index, (_, row) in enumerate(sorted(rows, key=lambda found: found[1]["at_s"])):
        kind, defaults, video_s = ask(index)
        own = {name: value for name, value in row.items() if name not in ("at_s", "class")}
        fields = {**_without(defaults, own), **own}
        arrivals.append(
            Arrival((row["at_s"] - first_s) / speed, row.get("class") or kind, fields, _video_s(fields, video_s))
        )
    return arrivals


def _without(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A line that says seconds is not given the workload's frames as well: servers refuse both."""
    drop = {"seconds", "num_frames"} if {"seconds", "num_frames"} & set(own) else set()
    return {name: value for name, value in defaults.items() if name not in drop}


def _video_s(fields: Mapping[str, Any], otherwise: float) -> float:
    if "seconds" in fields:
        return float(fields["seconds"])
    if "num_frames" in fields and "fps" in fields:
        return float(fields["num_frames"]) / float(fields["fps"])
    return otherwise


def _json_lines(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: must be a JSON object: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}, line {number}: must be a JSON object, got {type(row).__name__}")
        yield number, row


def _csv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    if not reader.fieldnames:
        raise ValueError(f"{name} must have requests, and has none: the trace is empty")
    if "at_s" not in reader.fieldnames:
        raise ValueError(f"{name}, line 1: the header must have at_s, got {', '.join(reader.fieldnames)}")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{name}, line {reader.line_num}: must have {len(reader.fieldnames)} columns")
            yield reader.line_num, {column: value for column, value in row.items() if value.strip()}
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: must be CSV: {error}") from None


def _row(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Checked, numbers as numbers, our names for the shorter ones."""
    if unknown := set(row) - {*COLUMNS, *NUMBERS}:
        raise ValueError(f"{where}: may have {', '.join((*COLUMNS, *NUMBERS))}, got {sorted(unknown)[0]!r}")
    if "at_s" not in row:
        raise ValueError(f"{where}: must have at_s, the second at which the request arrives")
    found: dict[str, Any] = {}
    for column, value in row.items():
        name = ALIASES.get(column, column)
        if name in found:
            raise ValueError(f"{where}: has {name} twice")
        if name in ("class", "prompt", "negative_prompt", "size"):
            if not isinstance(value, str) or (name != "negative_prompt" and not value.strip()):
                raise ValueError(f"{where}: {column} must be text, got {value!r}")
            found[name] = value
        else:
            found[name] = _number(where, column, value, name in WHOLE)
    if "seconds" in found and "num_frames" in found:
        raise ValueError(f"{where}: must have seconds or num_frames, not both")
    if "size" in found and not _is_size(found["size"]):
        raise ValueError(f"{where}: size must be WIDTHxHEIGHT, got {found['size']!r}")
    if "seconds" in found:
        found["seconds"] = f"{found['seconds']:g}"  # OpenAI's schema has text
    return found


def _is_size(text: str) -> bool:
    width, times, height = text.partition("x")
    return bool(times) and width.isdecimal() and height.isdecimal()


def _number(where: str, column: str, value: Any, whole: bool) -> float | int:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    least = 0 if column in ("at_s", "seed", "guidance_scale") else 1e-9
    if not math.isfinite(number) or number < least or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{where}: {column} must be {kind}{' above 0' if least else ' from 0'}, got {value!r}")
    return int(number) if whole else number
