"""Figures and tables inside documents, that come out of result files and say so where they stand.

    <!-- figure: cpu/peers.json | peers/whole/eager: eager / exact | {median:.2f}x -->2.60x<!-- /figure -->
    <!-- figure: cpu/peers.json | peers/whole/exact | {median:.0f} ms | 1000 -->785 ms<!-- /figure -->
    <!-- table: cpu/quality.json | cache= -->
    ...
    <!-- /table -->
    <!-- models: memory -->
    ...
    <!-- /models -->
    <!-- from: docs/performance.md | In short -->
    ...
    <!-- /from -->
    <!-- metrics: counter -->
    ...
    <!-- /metrics -->
    <!-- xids: drain -->
    ...
    <!-- /xids -->

Fields are those of a spread: median, q1, q3, low, high, n; the last part multiplies them. A comparison's name is
`NAME: OF / TO`. A table is of the figures whose names begin with its second part, or of all. Models are those of a
folder of `bench fits`, a line each. What is from another document is the text under that heading, without its comments.
Metrics are the service's, of one kind; Xids those that drain an engine, or that are told alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...runtime.checkpoints.published import published
from ..fits.markdown import overview
from ..fits.table import read as read_fits
from ..record import read_any
from ..track.compare import figures
from .load import AnyResult
from .reference import metrics_table, xids_table
from .tables import table

FIGURE = re.compile(r"(<!-- figure: (.*?) -->)(.*?)(<!-- /figure -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
MODELS = re.compile(r"(<!-- models: (.*?) -->\n)(.*?)(<!-- /models -->)", re.DOTALL)
OTHER = re.compile(r"(<!-- from: (.*?) -->\n)(.*?)(<!-- /from -->)", re.DOTALL)
METRICS = re.compile(r"(<!-- metrics: (.*?) -->\n)(.*?)(<!-- /metrics -->)", re.DOTALL)
XIDS = re.compile(r"(<!-- xids: (.*?) -->\n)(.*?)(<!-- /xids -->)", re.DOTALL)
COMMENT = re.compile(r"<!-- .*? -->", re.DOTALL)


class Blocks:
    """Fills them from one folder of results; `wrong` has what could not be filled, and why."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.wrong: list[str] = []
        self._read: dict[str, AnyResult] = {}

    def filled(self, text: str, name: str) -> str:
        """A document with every block as the results have it; what cannot be filled stays as it is."""
        fills: tuple[tuple[re.Pattern[str], Callable[[list[str]], str]], ...] = (
            (FIGURE, self._figure),
            (TABLE, self._table),
            (MODELS, self._models),
            (OTHER, self._other),
            (METRICS, lambda parts: metrics_table(*parts)),
            (XIDS, lambda parts: xids_table(*parts)),
        )
        for pattern, fill in fills:
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

    def _models(self, parts: list[str]) -> str:
        if len(parts) != 1:
            raise ValueError(f"models must be FOLDER, got {len(parts)} parts")
        found = {path.name: read_fits(path) for path in (self.results / parts[0]).glob("*.json")}
        if not found:
            raise ValueError(f"{parts[0]} has no tables of `bench fits`")
        known = list(published())
        ordered = sorted(found.values(), key=lambda table: known.index(table.model))
        return overview(ordered)

    def _other(self, parts: list[str]) -> str:
        if len(parts) != 2:
            raise ValueError(f"what is from elsewhere must be DOCUMENT | HEADING, got {len(parts)} parts")
        document, heading = parts
        text = self.filled((self.results.parents[1] / document).read_text(), document)
        _, found, rest = text.partition(f"\n## {heading}\n")
        if not found:
            raise ValueError(f"{document} has no heading {heading!r}")
        return COMMENT.sub("", rest.partition("\n## ")[0]).strip("\n") + "\n"

    def _report(self, file: str) -> AnyResult:
        if file not in self._read:
            path = self.results / file
            if not path.is_file():
                raise ValueError(f"{file} is not among the results")
            self._read[file] = read_any(path)
        return self._read[file]
