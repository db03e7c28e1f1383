"""Prometheus gauges that come from the store, in the text format: the same whichever ingress is asked."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy import func, select

from .context import Context
from .store.backlog import read_backlog
from .store.database import now
from .store.jobs import UNFINISHED
from .store.processes import DISPATCHER, ENGINE
from .store.tables import IN_PROGRESS, QUEUED, jobs, outbox

# Of each engine's facts: name -> (metric, help).
FACTS = {
    "running": ("engine_jobs", "Jobs that an engine works on"),
    "slots": ("engine_slots", "Jobs that an engine works on at most"),
    "step_s": ("engine_step_seconds", "Seconds a denoising step, of the job that ended last"),
    "tokens_per_s": ("engine_tokens_per_second", "Tokens times steps a second, median of the last jobs"),
    "pack_tokens": ("engine_pack_tokens", "Tokens of the packs of the last second, mean"),
    "steps": ("engine_steps", "Denoising steps of jobs that ended"),
    "steps_skipped": ("engine_steps_skipped", "Of these, the steps that a cache answered"),
    "lost_steps": ("engine_lost_steps", "Steps that dead engines had taken in vain"),
    "ready_s": ("engine_ready_seconds", "Seconds that an engine took from its start until it was ready"),
    "first_preview_s": ("engine_first_preview_seconds", "Seconds to the newest first preview"),
    "decoder_demotions": ("engine_decoder_demotions", "Compiled decoders that were found wrong or failed"),
    "gpu_memory_bytes": ("engine_gpu_memory_bytes", "Device memory in use"),
    "gpu_utilisation": ("engine_gpu_utilisation", "Share of the last second in which the device worked"),
    "gpu_power_w": ("engine_gpu_power_watts", "Power that the device draws"),
}


def render(context: Context) -> bytes:
    registry = CollectorRegistry()

    def gauge(name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"skylapse_{name}", help, labels, registry=registry)

    queue = _queue(context)
    gauge("queue_depth", "Jobs that wait").set(queue["waiting"])
    gauge("jobs_in_progress", "Jobs that are worked on").set(queue["running"])
    gauge("queue_age_seconds", "Age of the job that has waited longest").set(queue["age_s"])
    gauge("backlog_seconds", "Estimated seconds of one engine for all unfinished jobs").set(queue["backlog_s"])
    gauge("webhooks_waiting", "Webhook events that are not delivered yet").set(queue["webhooks"])
    ended = gauge("jobs_ended", "Jobs that are kept, by how they ended", "outcome")
    for outcome, count in queue["ended"].items():
        ended.labels(outcome).set(count)
    processes = context.processes.alive()
    gauge("dispatchers", "Dispatchers that are alive").set(sum(p.kind == DISPATCHER for p in processes))
    gauge("engines", "Engines that are alive").set(sum(p.kind == ENGINE for p in processes))
    for fact, (name, help) in FACTS.items():
        found = [(p.id, p.facts[fact]) for p in processes if p.kind == ENGINE and fact in p.facts]
        if found:
            metric = gauge(name, help, "engine")
            for engine, value in found:
                metric.labels(engine).set(value)
    decoders = [(p.id, p.facts["decoder"]) for p in processes if p.kind == ENGINE and "decoder" in p.facts]
    if decoders:
        metric = gauge("engine_decoder", "1 for the backend that decodes the clips that begin now", "engine", "backend")
        for engine, backend in decoders:
            metric.labels(engine, backend).set(1)
    return generate_latest(registry)


def _queue(context: Context) -> dict[str, Any]:
    """What the store says of jobs and webhooks; outcomes are codes of errors, or `completed`."""
    is_unfinished = jobs.c.state.in_(UNFINISHED)
    outcome = func.coalesce(jobs.c.error_code, jobs.c.state)
    with context.database.read() as connection:
        states: dict[str, int] = dict(
            connection.execute(select(jobs.c.state, func.count()).where(is_unfinished).group_by(jobs.c.state)).all()
        )
        age_s = connection.scalar(select(now() - func.min(jobs.c.created_at)).where(jobs.c.state == QUEUED))
        ended = connection.execute(select(outcome, func.count()).where(~is_unfinished).group_by(outcome)).all()
        webhooks = connection.scalar(
            select(func.count()).where(outbox.c.delivered_at.is_(None), outbox.c.failed_at.is_(None))
        )
    return {
        "waiting": states.get(QUEUED, 0),
        "running": states.get(IN_PROGRESS, 0),
        "age_s": age_s or 0.0,
        "backlog_s": read_backlog(context.database).engine_s,
        "webhooks": webhooks or 0,
        "ended": dict(ended),
    }
