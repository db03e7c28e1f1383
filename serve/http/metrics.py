"""`/metrics` in Prometheus' text format, from the store alone: the same whichever ingress is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from sqlalchemy import case, func, select

from ... import __version__
from ..core import metric_definitions as table
from ..core.metric_definitions import Metric
from ..core.release import revision
from ..jobs.services import Context
from ..store.backlog import work_left
from ..store.counters import INFINITE, SUM, VALUE, read_counters
from ..store.database import now
from ..store.job_model import model_column
from ..store.processes import DISPATCHER, ENGINE, Process
from ..store.tables import IN_PROGRESS, QUEUED, jobs, outbox

Samples = Iterable[tuple[Sequence[str], float]]
FACTS = {  # of each engine's sign of life
    "memory_utilization": table.ENGINE_MEMORY,
    "gpu_utilisation": table.ENGINE_UTILIZATION,
    "gpu_power_w": table.ENGINE_POWER,
    "running": table.ENGINE_JOBS,
    "slots": table.ENGINE_SLOTS,
    "tokens_per_s": table.ENGINE_TOKENS,
    "ready_s": table.ENGINE_READY,
    "decoder_demotions": table.ENGINE_DEMOTIONS,
}


def render(context: Context) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Store(context))
    return generate_latest(registry)


class _Store(Collector):
    """The collector of one scrape."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def collect(self) -> Iterator[Family]:
        with self.context.database.read() as connection:
            yield from (_counted(metric, sets) for metric, sets in read_counters(connection))
        yield _gauge(table.BUILD_INFO, [((__version__, revision()), 1.0)])
        yield from self._queues()
        yield from self._processes()

    def _queues(self) -> Iterator[Family]:
        """Yield the queue metrics of each served model, and of each model that has unfinished jobs."""
        model, is_queued = model_column(), jobs.c.state == QUEUED
        waited_s = now() - func.min(case((is_queued, jobs.c.created_at)))
        counts = [func.count(case((jobs.c.state == state, 1))) for state in (QUEUED, IN_PROGRESS)]
        unfinished = select(model.label("served"), *counts, waited_s, work_left())
        unfinished = unfinished.where(jobs.c.state.in_((QUEUED, IN_PROGRESS))).group_by("served")
        undelivered = select(func.count()).where(outbox.c.delivered_at.is_(None), outbox.c.failed_at.is_(None))
        with self.context.database.read() as connection:
            found: dict[str, Sequence[Any]] = {row[0]: row[1:] for row in connection.execute(unfinished)}
            webhooks = connection.scalar(undelivered) or 0
        for name in self.context.config.model_names:
            found.setdefault(name, (0, 0, None, 0.0))
        gauges = (table.QUEUE_DEPTH, table.JOBS_IN_PROGRESS, table.QUEUE_AGE, table.BACKLOG)
        for number, metric in enumerate(gauges):
            yield _gauge(metric, [((name,), values[number] or 0.0) for name, values in sorted(found.items())])
        yield _gauge(table.WEBHOOKS_WAITING, [((), webhooks)])

    def _processes(self) -> Iterator[Family]:
        alive = self.context.processes.alive()
        engines = [p for p in alive if p.kind == ENGINE]
        yield _gauge(table.DISPATCHERS, [((), sum(p.kind == DISPATCHER for p in alive))])
        yield _gauge(table.ENGINES, _by_state(engines, self.context.config.model_names))
        for fact, metric in FACTS.items():
            yield _gauge(metric, [((p.id,), float(p.facts[fact])) for p in engines if p.facts.get(fact) is not None])
        decoders = [((p.id, str(p.facts["decoder"])), 1.0) for p in engines if "decoder" in p.facts]
        yield _gauge(table.ENGINE_DECODER, decoders)


def _by_state(engines: Sequence[Process], models: Sequence[str]) -> Samples:
    """Count engines by state; a served model has a line also where none is ready, so that an alert sees it."""
    counts: dict[tuple[str, str], float] = {(model, "ready"): 0.0 for model in models}
    for process in engines:
        key = str(process.facts.get("model", models[0])), str(process.facts.get("state", "ready"))
        counts[key] = counts.get(key, 0.0) + 1
    return sorted(counts.items())


def _gauge(metric: Metric, samples: Samples) -> Family:
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _counted(metric: Metric, sets: Mapping[tuple[str, ...], Mapping[str, float]]) -> Family:
    if metric.kind == table.COUNTER:
        counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, parts in sets.items():
            counter.add_metric(labels, parts.get(VALUE, 0.0))
        return counter
    histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, parts in sets.items():
        total, buckets = 0.0, []
        for bound in (*map(str, table.BUCKETS), INFINITE):
            total += parts.get(bound, 0.0)
            buckets.append((bound if bound == INFINITE else str(float(bound)), total))
        histogram.add_metric(labels, buckets, parts.get(SUM, 0.0))
    return histogram
