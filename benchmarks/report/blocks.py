"""Figures and tables inside documents, that come out of result files and say so where they stand.

    <!-- figure: cpu/peers.json | peers/whole/eager: eager / exact | {median:.2f}x -->2.60x<!-- /figure -->
    <!-- figure: cpu/peers.json | peers/whole/exact | {median:.0f} ms | 1000 -->785 ms<!-- /figure -->
    <!-- table: cpu/quality.json | cache= -->
    ...
    <!-- /table -->

Fields are those of a spread: median, q1, q3, low, high, n; the last part multiplies them. A comparison's name is
`NAME: OF / TO`. A table is of the figures whose names begin with its second part, or of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..record import read_any
from ..track.compare import figures
from .load import AnyResult
from .tables import table

FIGURE = re.compile(r"(<!-- figure: (.*?) -->)(.*?)(<!-- /figure -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


class Blocks:
    """Fills them from one folder of results; `wrong` has what could not be filled, and why."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.wrong: list[str] = []
        self._read: dict[str, AnyResult] = {}

    def filled(self, text: str, name: str) -> str:
        """A document with every block as the results have it; what cannot be filled stays as it is."""
        for pattern, fill in ((FIGURE, self._figure), (TABLE, self._table)):
            text = pattern.sub(partial(self._put, fill, name), text)
        return text

    def _put(self, fill: Callable[[list[str]], str], name: str, found: re.Match[str]) -> str:
        try:
            value = fill([part.strip() for part in found[2].split("|")])
        except (ValueError, OSError, KeyError, IndexError, TypeError) as error:
            self.wrong.append(f"{name}: {found[2]}: {error}")
            return found[0]
        return f"{found[1]}{value}{found[4]}"

    def _figure(self, parts: list[str]) -> str:
        if len(parts) not in (3, 4):
            raise ValueError(f"a figure must be FILE | NAME | FORMAT, with | FACTOR or without, got {len(parts)} parts")
        file, figure, form = parts[:3]
        held = figures(self._report(file))
        if figure not in held:
            raise ValueError(f"{file} has no figure {figure!r}")
        factor = float(parts[3]) if len(parts) == 4 else 1.0
        spread = held[figure].spread
        fields = {
            field: None if (value := getattr(spread, field)) is None else value * factor
            for field in ("median", "q1", "q3", "low", "high")
        }
        return form.format(**fields, n=spread.n)

    def _table(self, parts: list[str]) -> str:
        if len(parts) not in (1, 2):
            raise ValueError(f"a table must be FILE, with | BEGINNING or without, got {len(parts)} parts")
        return table(self._report(parts[0]), parts[1] if len(parts) == 2 else "").rstrip("\n") + "\n"

    def _report(self, file: str) -> AnyResult:
        if file not in self._read:
            path = self.results / file
            if not path.is_file():
                raise ValueError(f"{file} is not among the results")
            self._read[file] = read_any(path)
        return self._read[file]
