"""Keep a lease's results line by line, so that a cut costs the case that was under way and no more.

A journal is `NAME.jsonl`: facts of the machine, lines of cases, and an end for each case that came to one. A case
counts as done if its end was written by the same code on the same device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calls import ROOT

CODE = ("kernels", "compile", "runtime", "benchmarks/kernels", "benchmarks/gpu_lease", "benchmarks/harness.py")


def fingerprint(root: Path = ROOT) -> str:
    """Return a digest of the code that a figure depends on: every .py and .json below `CODE`."""
    found = hashlib.sha256()
    for part in CODE:
        place = root / part
        for path in sorted([place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.json")]):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


@dataclass
class Cases:
    """The cases of one call on one device: case -> its lines, and case -> its end ("ok", "failed")."""

    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    cut: str | None = None  # why the last run of the call stopped before its end


class Journal:
    """A call's file in $OUT; it begins with an earlier one's entries of the same code."""

    def __init__(self, path: Path, code: str, earlier: Path | None = None, again: bool = False) -> None:
        """again: cases that failed are not done, and run again."""
        self.path, self.code = path, code
        held = [*_entries(earlier), *_entries(path)] if earlier != path else [*_entries(path)]
        entries = [entry for entry in held if entry["code"] == code]
        ended = {(e["device"], e["case"]): e["ended"] for e in entries if "ended" in e}
        if again:
            ended = {case: how for case, how in ended.items() if how == "ok"}
        kept = [e for e in entries if "facts" in e or (e["device"], e.get("case")) in ended]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._done: dict[str, set[str]] = {}
        for device, case in ended:
            self._done.setdefault(device, set()).add(case)

    def done(self) -> dict[str, list[str]]:
        """Return device -> the cases that came to an end there."""
        return {device: sorted(cases) for device, cases in self._done.items()}

    def add(self, device: str, **entry: Any) -> None:
        """Add one line, which is on the disk before the next case begins."""
        with self.path.open("a") as file:
            file.write(json.dumps({"code": self.code, "device": device, **entry}) + "\n")


def read(path: Path) -> dict[str, Cases]:
    """Return device -> its cases; of a case that was run again, the last run."""
    found: dict[str, Cases] = {}
    for entry in _entries(path):
        cases = found.setdefault(entry["device"], Cases())
        if "facts" in entry:
            cases.facts, cases.cut = entry["facts"], None
        elif "cut" in entry:
            cases.cut = entry["cut"]
        elif "begun" in entry:
            cases.lines[entry["case"]] = []
            cases.ended.pop(entry["case"], None)
        elif "ended" in entry:
            cases.ended[entry["case"]] = entry
        else:
            cases.lines.setdefault(entry["case"], []).append(entry["line"])
    return found


def _entries(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file that may be missing, or cut in the middle of its last line."""
    if path is None or not path.is_file():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and {"code", "device"} <= entry.keys():
            yield entry
