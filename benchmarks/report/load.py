"""What a folder of results holds: reports, histories, what fits on which card, and the files that are none of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..fits.table import ModelTable, is_table
from ..fits.table import read as read_table
from ..record import HistoryLine, KernelReport, KernelResult, SuiteReport, read_any, read_history

AnyResult = KernelReport | SuiteReport


@dataclass
class Found:
    """Paths are relative to the folder."""

    folder: Path
    reports: dict[str, AnyResult] = field(default_factory=dict)
    histories: dict[str, list[HistoryLine]] = field(default_factory=dict)
    fits: dict[str, ModelTable] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # with the reason

    @property
    def suites(self) -> dict[str, SuiteReport]:
        return {path: report for path, report in self.reports.items() if isinstance(report, SuiteReport)}

    @property
    def kernels(self) -> dict[str, KernelResult]:
        """Those that compare kernels."""
        return {path: report for path, report in self.reports.items() if isinstance(report, KernelResult)}


def collect(folder: Path) -> Found:
    """Everything below it; ValueError where there is nothing at all."""
    if not folder.is_dir():
        raise ValueError(f"the folder of results must exist, got {str(folder)!r}")
    found = Found(folder)
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".jsonl":
                found.histories[name] = read_history(path)
            elif _is_table(path):
                found.fits[name] = read_table(path)
            else:
                found.reports[name] = read_any(path)
        except (ValueError, OSError) as error:
            found.refused[name] = str(error)
    if not (found.reports or found.histories or found.fits or found.refused):
        raise ValueError(f"{str(folder)!r} must have results, *.json or *.jsonl, got none")
    return found


def _is_table(path: Path) -> bool:
    try:
        return is_table(json.loads(path.read_text()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return False
