"""Merge journals of a lease into one result file a device, in the schema of `bench report`, `pick` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..kernels.apart import Limits
from ..record import SCHEMA, Check, Comparison, LeaseReport, Measurement, Row, write
from ..track.history import slug
from .calls import CALLS
from .journal import Cases, read
from .lines import Absent, Failed, Launch, Line, Note, decode


def write_merged(places: Sequence[Path], out: Path, predict: bool = False) -> list[Path]:
    """Write a report a device from all journals below these folders; a later folder's replaces an earlier one's call.

    predict: put the shape model's prediction beside each peak of a GPU, which takes a minute.
    """
    found: dict[str, dict[str, Cases]] = {}
    for call in CALLS:
        for place in places:
            for device, cases in read(place / f"{call.name}.jsonl").items():
                found.setdefault(device, {})[call.name] = cases
    written = []
    for device, calls in found.items():
        path, report = out / f"gpu_lease-{slug(device)}.json", report_of(device, calls)
        if predict and isinstance(capability := report.machine.get("capability"), int):
            from .predictions import predicted_peaks  # all that it takes to build the models

            held = {one.name for one in report.measurements}
            report = replace(report, measurements=[*report.measurements, *predicted_peaks(held, capability)])
        write(report, path)
        written.append(path)
    return written


def report_of(device: str, calls: dict[str, Cases]) -> LeaseReport:
    """Return the report of everything that one device gave; partial where a call is missing or was cut."""
    lines = [(name, line) for name, cases in calls.items() for line in lines_of(cases)]
    cut = [f"{name}: {cases.cut}" for name, cases in calls.items() if cases.cut]
    if absent := [call.name for call in CALLS if call.name not in calls]:
        cut.append(f"not run: {', '.join(absent)}")
    machine = next(reversed([cases.facts for cases in calls.values()]))
    seconds = sum(float(end["seconds"]) for cases in calls.values() for end in cases.ended.values())
    codes = {name: sorted({end["code"] for end in cases.ended.values()}) for name, cases in calls.items()}
    notes = {f"{name}/{line.name}": line.value for name, line in lines if isinstance(line, Note)}
    limits = [line.limits for _, line in lines if isinstance(line, Limits)]
    return LeaseReport(
        schema=SCHEMA,
        benchmark="gpu_lease",
        suite=device,
        quick=False,
        machine=machine,
        elapsed_s=round(seconds, 1),
        partial="; ".join(cut) or None,
        seed=0,
        model="random weights",
        settings={"code": codes, **notes},
        limits=limits[-1] if limits else {},
        checks=[line for _, line in lines if isinstance(line, Check)],
        rows=[line for _, line in lines if isinstance(line, Row)],
        measurements=[line for _, line in lines if isinstance(line, Measurement)],
        comparisons=[line for _, line in lines if isinstance(line, Comparison)],
        failures={line.name: line.reason for _, line in lines if isinstance(line, Failed)},
        missing={line.name: line.reason for _, line in lines if isinstance(line, Absent)},
    )


def lines_of(cases: Cases) -> list[Line]:
    """Return the lines of the cases that came to an end; a case that was cut will be measured again."""
    return [decode(line) for case, lines in cases.lines.items() if case in cases.ended for line in lines]


def launches_of(places: Sequence[Path]) -> list[Launch]:
    """Return the rows for `kernels/*.json` that were found."""
    journals = [read(place / "tune.jsonl") for place in places]
    lines = [line for found in journals for cases in found.values() for line in lines_of(cases)]
    return [line for line in lines if isinstance(line, Launch)]
