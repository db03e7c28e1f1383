"""Every metric that `/metrics` shows: its name, kind, labels and how many series it may have.

Counters and histograms are rows of the store (store/counters.py), added in the transaction that makes what they count,
so they never fall. Gauges are read when they are asked for (metrics.py). Names and labels are a contract with
dashboards and alerts: a new release adds, and renames nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

COUNTER, HISTOGRAM, GAUGE = "counter", "histogram", "gauge"
BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds
OTHER = "other"  # the label value of whatever is beyond `max_sets`
MAX_SERIES = 2000  # of a service with 3 models and 8 classes, whatever its clients do


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric. max_sets: how many combinations of label values there may be, for each model if `model` is a label.

    is_open: values come from outside (names of classes, codes of errors, plug-ins): what comes after `max_sets` of them
    is counted under `other`, so that nobody can make the store or Prometheus grow. kept_for: the value of a label whose
    sets leave the others no more than what `num_kept` of them leave. A gauge's `max_sets` is what is expected.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    max_sets: int
    help: str
    is_open: bool = False
    kept_for: str = ""
    num_kept: int = 0

    @property
    def series_a_set(self) -> int:
        """Series of one set of labels; a histogram has its buckets, the one without an end, a sum and a count."""
        return len(BUCKETS) + 3 if self.kind == HISTOGRAM else 1

    def max_series(self, num_models: int) -> int:
        """Return the most series that it can have, `other` included."""
        sets = (self.max_sets + self.is_open) * (num_models if "model" in self.labels else 1)
        return sets * self.series_a_set


def _metric(
    kind: str,
    name: str,
    labels: str,
    max_sets: int,
    help: str,
    *,
    is_open: bool = False,
    kept: tuple[str, int] = ("", 0),
) -> Metric:
    return Metric(
        name=f"skylapse_{name}",
        kind=kind,
        labels=tuple(labels.split()),
        max_sets=max_sets,
        help=help,
        is_open=is_open,
        kept_for=kept[0],
        num_kept=kept[1],
    )


JOBS_CREATED = _metric(COUNTER, "jobs_created_total", "model kind class", 40, "Jobs that were made", is_open=True)
JOBS_ENDED = _metric(
    COUNTER,
    "jobs_ended_total",
    "model outcome class",
    90,
    "Jobs that ended, as `completed` or with an error's code",
    is_open=True,
)
JOB_SECONDS = _metric(
    HISTOGRAM,
    "job_duration_seconds",
    "model outcome class",
    11,
    "Seconds from a job's creation to its end",
    is_open=True,
    kept=("completed", 8),
)
QUEUE_WAIT = _metric(
    HISTOGRAM,
    "queue_wait_seconds",
    "model class",
    8,
    "Seconds from a job's creation until an engine took it",
    is_open=True,
)
STAGE_SECONDS = _metric(
    HISTOGRAM, "stage_seconds", "model stage", 4, "Seconds of a completed job's encode, denoise, decode and finish"
)
STEP_SECONDS = _metric(
    HISTOGRAM, "step_seconds", "model", 1, "Seconds of an engine's denoising step, of all requests that shared it"
)
STEPS = _metric(
    COUNTER, "steps_total", "model how", 3, "Jobs' denoising steps: computed, skipped by a cache, lost with an engine"
)
ENGINE_SECONDS = _metric(
    COUNTER,
    "engine_seconds_total",
    "model class",
    8,
    "Seconds of engines that jobs are charged with: the ledger's sum",
    is_open=True,
)
LOST_SECONDS = _metric(
    COUNTER,
    "lost_engine_seconds_total",
    "model",
    1,
    "Seconds of engines that no job is charged with: what died with one",
)
BUSY_SECONDS = _metric(
    COUNTER, "engine_busy_seconds_total", "model", 1, "Seconds in which engines worked, told by them as time passes"
)
REJECTIONS = _metric(
    COUNTER,
    "rejections_total",
    "category stage",
    40,
    "Requests and jobs that were refused: why, and where",
    is_open=True,
)
WEBHOOKS = _metric(
    COUNTER, "webhook_deliveries_total", "outcome", 3, "Attempts at webhooks: delivered, retried, given_up"
)
HTTP_REQUESTS = _metric(
    COUNTER,
    "http_requests_total",
    "route method status",
    160,
    "Requests that ingresses answered; route is a template",
    is_open=True,
)
SICK_ENGINES = _metric(
    COUNTER, "sick_engines_total", "model", 1, "Engines that gave their jobs back because of their GPU"
)
SPANS_DROPPED = _metric(COUNTER, "trace_spans_dropped_total", "", 1, "Spans of traces that no collector has")
COUNTED = (
    JOBS_CREATED,
    JOBS_ENDED,
    JOB_SECONDS,
    QUEUE_WAIT,
    STAGE_SECONDS,
    STEP_SECONDS,
    STEPS,
    ENGINE_SECONDS,
    LOST_SECONDS,
    BUSY_SECONDS,
    REJECTIONS,
    WEBHOOKS,
    HTTP_REQUESTS,
    SICK_ENGINES,
    SPANS_DROPPED,
)

BUILD_INFO = _metric(GAUGE, "build_info", "version revision", 1, "1, of the release that answers")
QUEUE_DEPTH = _metric(GAUGE, "queue_depth", "model", 1, "Jobs that wait")
QUEUE_AGE = _metric(GAUGE, "queue_age_seconds", "model", 1, "Seconds that the oldest waiting job has waited")
BACKLOG = _metric(GAUGE, "backlog_seconds", "model", 1, "Estimated seconds of one engine for all unfinished jobs")
JOBS_IN_PROGRESS = _metric(GAUGE, "jobs_in_progress", "model", 1, "Jobs that engines work on")
WEBHOOKS_WAITING = _metric(GAUGE, "webhooks_waiting", "", 1, "Webhook events that are neither delivered nor given up")
DISPATCHERS = _metric(GAUGE, "dispatchers", "", 1, "Dispatchers that are alive")
ENGINES = _metric(GAUGE, "engines", "model state", 5, "Engines that are alive: loading, ready, draining, sick, failed")
ENGINE_MEMORY = _metric(
    GAUGE, "engine_memory_utilization_ratio", "engine", 8, "Share of its memory that an engine's device has in use"
)
ENGINE_UTILIZATION = _metric(
    GAUGE, "engine_gpu_utilization_ratio", "engine", 8, "Share of the last second in which the GPU worked"
)
ENGINE_POWER = _metric(GAUGE, "engine_gpu_power_watts", "engine", 8, "Power that the GPU draws")
ENGINE_JOBS = _metric(GAUGE, "engine_jobs", "engine", 8, "Jobs that an engine works on")
ENGINE_SLOTS = _metric(GAUGE, "engine_slots", "engine", 8, "Jobs that an engine works on at most")
ENGINE_TOKENS = _metric(
    GAUGE, "engine_tokens_per_second", "engine", 8, "Tokens times steps a second, median of an engine's last jobs"
)
ENGINE_READY = _metric(GAUGE, "engine_ready_seconds", "engine", 8, "Seconds from an engine's start until it was ready")
ENGINE_DECODER = _metric(
    GAUGE, "engine_decoder", "engine backend", 8, "1 for the backend that decodes the clips that begin now"
)
ENGINE_DEMOTIONS = _metric(
    GAUGE, "engine_decoder_demotions", "engine", 8, "Compiled decoders that were found wrong or failed"
)
READ = (
    BUILD_INFO,
    QUEUE_DEPTH,
    QUEUE_AGE,
    BACKLOG,
    JOBS_IN_PROGRESS,
    WEBHOOKS_WAITING,
    DISPATCHERS,
    ENGINES,
    ENGINE_MEMORY,
    ENGINE_UTILIZATION,
    ENGINE_POWER,
    ENGINE_JOBS,
    ENGINE_SLOTS,
    ENGINE_TOKENS,
    ENGINE_READY,
    ENGINE_DECODER,
    ENGINE_DEMOTIONS,
)
METRICS = {metric.name: metric for metric in (*COUNTED, *READ)}
