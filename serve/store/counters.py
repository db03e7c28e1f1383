"""Counters and histograms as rows of the store, added in the transaction that makes what they count: they never fall.

A row is (metric, values of its labels, part); a counter has one part, a histogram one for each bucket and its sum. Rows
are added in one order, by everybody, and once a transaction, as its last statement: then engines that end jobs at the
same time wait for each other and do not deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from ..core.metric_definitions import BUCKETS, COUNTED, COUNTER, HISTOGRAM, OTHER, Metric
from .tables import metrics

Labels = tuple[str, ...]
VALUE, SUM, INFINITE = "", "sum", "+Inf"
MAX_LABEL_CHARACTERS = 200
MAX_KNOWN = 10_000  # label values of one metric that a process remembers


class Tally:
    """The additions of one transaction to counters and histograms."""

    def __init__(self) -> None:
        self.values: dict[tuple[Metric, Labels, str], float] = {}

    def add(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add `by` to a counter, which never falls; 0 adds nothing."""
        assert metric.kind == COUNTER and by >= 0, (metric.name, by)
        if by:
            self._add(metric, labels, VALUE, by)

    def observe(self, metric: Metric, *labels: str, seconds: float, count: int = 1) -> None:
        """Add one observation of a histogram, or `count` equal ones."""
        assert metric.kind == HISTOGRAM, metric.name
        seconds = max(0.0, seconds)
        part = next((str(bound) for bound in BUCKETS if seconds <= bound), INFINITE)
        self._add(metric, labels, part, count)
        self._add(metric, labels, SUM, seconds * count)

    def _add(self, metric: Metric, labels: Labels, part: str, by: float) -> None:
        assert len(labels) == len(metric.labels), (metric.name, labels)
        key = metric, tuple(label[:MAX_LABEL_CHARACTERS] for label in labels), part
        self.values[key] = self.values.get(key, 0.0) + by

    def merge(self, other: Tally) -> None:
        for key, by in other.values.items():
            self.values[key] = self.values.get(key, 0.0) + by

    def __bool__(self) -> bool:
        return bool(self.values)


class Counters:
    """Adds tallies to the store; one object a process, which remembers the label values that it has seen."""

    def __init__(self) -> None:
        self._known: dict[Metric, dict[Labels, Labels]] = {}  # label values -> what they are counted under

    def add(self, connection: Connection, tally: Tally) -> None:
        """Add a tally, as the last statement of the caller's transaction."""
        if not tally:
            return
        for metric in {m for m, labels, _ in tally.values if m.is_open and labels not in self._known.get(m, ())}:
            self._look(connection, metric)
        summed: dict[tuple[str, str, str], float] = {}
        for (metric, labels, part), by in tally.values.items():
            key = metric.name, json.dumps(self._admitted(metric, labels)), part
            summed[key] = summed.get(key, 0.0) + by
        rows = [dict(name=n, labels=ls, part=p, value=by) for (n, ls, p), by in sorted(summed.items())]
        dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
        added = dialect.insert(metrics).values(rows)
        kept = dict(value=metrics.c.value + added.excluded.value)
        connection.execute(added.on_conflict_do_update(index_elements=list(metrics.primary_key), set_=kept))

    def _look(self, connection: Connection, metric: Metric) -> None:
        """Learn the label values that other processes have added."""
        rows = connection.scalars(select(metrics.c.labels).where(metrics.c.name == metric.name).distinct())
        known = self._known.setdefault(metric, {})
        if len(known) > MAX_KNOWN:
            known.clear()
        known.update({labels: labels for labels in (tuple(json.loads(row)) for row in rows)})

    def _admitted(self, metric: Metric, labels: Labels) -> Labels:
        """Return these label values, or `other` for all but the model if there are as many as there may be."""
        if not metric.is_open:
            return labels
        known = self._known[metric]
        if labels not in known:
            other = tuple(v if name == "model" else OTHER for name, v in zip(metric.labels, labels, strict=True))
            there = {counted for counted in known.values() if counted != other}
            known[labels] = labels if _has_room(metric, labels, there) else other
        return known[labels]


def _has_room(metric: Metric, labels: Labels, known: set[Labels]) -> bool:
    """Return whether one more combination may be added to those of the same model."""
    where = metric.labels.index("model") if "model" in metric.labels else None
    beside = [other for other in known if where is None or other[where] == labels[where]]
    if not metric.kept_for:
        return len(beside) < metric.max_sets
    alike = [other for other in beside if (metric.kept_for in other) == (metric.kept_for in labels)]
    return len(alike) < (metric.num_kept if metric.kept_for in labels else metric.max_sets - metric.num_kept)


def read_counters(connection: Connection) -> Iterator[tuple[Metric, dict[Labels, dict[str, float]]]]:
    """Yield every metric with, for each combination of its labels' values, the parts that there are."""
    found: dict[str, dict[Labels, dict[str, float]]] = {}
    for row in connection.execute(select(metrics).order_by(metrics.c.name, metrics.c.labels)):
        found.setdefault(row.name, {}).setdefault(tuple(json.loads(row.labels)), {})[row.part] = row.value
    for metric in COUNTED:
        sets = found.get(metric.name, {})
        yield metric, {labels: parts for labels, parts in sets.items() if len(labels) == len(metric.labels)}
