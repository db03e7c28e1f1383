"""The store's tables. Times are seconds since 1970 by the database's clock."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

versions = Table("schema_version", metadata, Column("version", Integer, primary_key=True))  # migrations that were done

QUEUED, IN_PROGRESS, COMPLETED, FAILED = STATES = ("queued", "in_progress", "completed", "failed")

CANARY = "canary"  # a job's variant; null is the stable one

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), nullable=False, unique=True),  # order of creation
    Column("tenant", String(64), nullable=False),
    Column("state", String(16), nullable=False, default=QUEUED),
    Column("request", JSON, nullable=False),
    Column("priority", Integer, nullable=False, default=0),
    Column("work", Float, nullable=False, default=1.0),  # estimated seconds of one engine
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    # who works on it
    Column("epoch", Integer, nullable=False, default=0),  # grows with every claim; writes of an older one count nothing
    Column("lease_until", Float),
    Column("owner", String(64)),
    Column("attempts", Integer, nullable=False, default=0),  # claims that ended in a crash of the job's own
    Column("is_suspect", Boolean, nullable=False, default=False),  # its engine died: it is tried again alone
    # how far it is
    Column("stage", String(16)),
    Column("step", Integer, nullable=False, default=0),
    Column("num_steps", Integer, nullable=False, default=0),
    Column("checkpoint", String(255)),  # key of the newest one
    Column("checkpoint_step", Integer, nullable=False, default=0),
    Column("resumed_from_step", Integer),
    Column("eta_s", Float),  # until the last step, when `version` was written
    Column("version", Integer, nullable=False, default=0),  # grows with all that a client may see: the id of its events
    Column("preview", JSON),  # the newest one: key, step, index, bytes
    # what came of it
    Column("artifacts", JSON),  # variant -> key, bytes, sha256
    Column("is_swept", Boolean, nullable=False, default=False),  # ended, and no file is left but its artifacts
    Column("has_expired", Boolean, nullable=False, default=False),  # nor those
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("webhook_url", Text),  # told once it has ended
    # which weights
    Column("model", Text),  # the served model's name, whatever alias was asked for; null: of a release that served one
    Column("variant", String(16)),  # of the model, for whose engines the job was made
    Column("revision", String(200)),  # of the hub's, where the model is one: as it was made for, then as it was claimed
    Column("fingerprint", String(64)),  # of the weights that work on it, from its first claim on
    Column("queued_at", Float),  # since when it waits again, after an engine had it; null: since it was created
    Column("trace", String(64)),  # where its trace begins, as W3C's traceparent; null: there is none (tracing.py)
    Column("job_class", String(32)),  # the operator's class of its tenant, a label of metrics; null: default
    # what it has used: the newest attempt as it was last told and by its newest checkpoint, and all of it at the end
    Column("attempt_usage", JSON(none_as_null=True)),
    Column("kept_usage", JSON(none_as_null=True)),
    Column("usage", JSON(none_as_null=True)),
    CheckConstraint(f"state in {STATES}", name="jobs_state"),
)
Index("jobs_waiting", jobs.c.state, jobs.c.lease_until, jobs.c.priority)
Index("jobs_of_tenant", jobs.c.tenant, jobs.c.sequence)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256; the key itself is shown once and kept nowhere
    Column("scopes", JSON, nullable=False),
    Column("max_priority", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("name", String(100)),
    Column("last_used_at", Float),  # to the minute
    Column("managed_by", String(16)),  # `environment`, `file`: its text is set there, and a new one ends this key
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("route", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),  # of the request's canonical fields and files
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float, nullable=False),
)

rates = Table(  # creates of a tenant in a minute; a job that was deleted has still been made
    "rates",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("minute", BigInteger, primary_key=True),
    Column("creates", Integer, nullable=False),
)

sessions = Table(  # of browsers, which exchanged a key for a cookie
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),  # SHA-256 of the cookie's value
    Column("key_id", String(64), ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

outbox = Table(  # webhook events: written with the end of their job, delivered at least once
    "outbox",
    metadata,
    Column("id", String(64), primary_key=True),  # the event's `webhook-id`, the same at every attempt
    Column("job_id", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("body", Text, nullable=False),  # the event as it is sent, to the byte
    Column("created_at", Float, nullable=False),
    Column("next_at", Float, nullable=False),  # not before; a claim moves it past the time that an attempt may take
    Column("attempts", Integer, nullable=False, default=0),
    Column("delivered_at", Float),
    Column("failed_at", Float),  # given up
    Column("last_error", String(200)),
    Column("trace", String(64)),  # of its job
)
Index("outbox_due", outbox.c.delivered_at, outbox.c.failed_at, outbox.c.next_at)

job_traces = Table(  # spans of whole jobs: written with the end of their job, taken away by who exports them
    "job_traces",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("trace", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("facts", JSON, nullable=False),
)

processes = Table(  # who is alive, and what each knows: dispatchers, engines
    "processes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("drain_asked_at", Float),  # an engine reads it with its next sign
)

tenants = Table(  # what the operator has set for a tenant; null: as the configuration has it
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("quota", Integer),
    Column("creates_per_minute", Integer),
    Column("weight", Float),
    Column("job_class", String(32)),
    # its account: seconds of an engine that it was given, divided by its weight; leases.py
    Column("began", Float, nullable=False, default=0.0),  # as it was when the newest job was claimed
    Column("served", Float, nullable=False, default=0.0),  # and with that job
)

audit = Table(  # what operators changed; rows are added and never altered
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("actor", String(200), nullable=False),  # a key's id, or `cli:` and the account
    Column("action", String(64), nullable=False),  # such as key.create
    Column("target", String(128), nullable=False),  # id of what was changed
    Column("before", JSON),
    Column("after", JSON),
    Column("request_id", String(64)),
)

ledger = Table(  # what jobs have used: a row is added when an attempt at one ends, and none is altered
    "ledger",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("day", String(10), nullable=False),  # of `at`, by UTC
    Column("job_id", String(64), nullable=False),  # which may be deleted
    Column("epoch", Integer, nullable=False),  # of the attempt; 0: a correction of all earlier ones
    Column("tenant", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("job_class", String(32), nullable=False),
    Column("reason", String(64), nullable=False),  # why it ended: completed, an error's code, deleted, taken_back, ...
    Column("jobs", Integer, nullable=False),  # 1 in the row with which the job ended
    Column("completed", Integer, nullable=False),
    Column("device", String(16)),
    Column("engine_seconds", Float, nullable=False),  # the tenant's
    Column("evaluations", Integer, nullable=False),
    Column("steps_computed", Integer, nullable=False),
    Column("steps_skipped", Integer, nullable=False),
    Column("lost_seconds", Float, nullable=False),  # nobody's: of steps that have to be taken again
    Column("lost_steps", Integer, nullable=False),
    Column("frames", Integer, nullable=False),
    Column("video_seconds", Float, nullable=False),
    Column("cost_nanos", BigInteger),  # billionths of the currency's unit; null: there was no price
    Column("currency", String(3)),
)
Index("ledger_by_tenant", ledger.c.tenant, ledger.c.day)
Index("ledger_by_job", ledger.c.job_id)

metrics = Table(  # counters and histograms, which never fall
    "metrics",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("labels", Text, primary_key=True),  # their values, as JSON in the order of core/metric_definitions.py
    Column("part", String(16), primary_key=True),  # "": a counter; a bucket's upper bound, or `sum`
    Column("value", Float, nullable=False),
)
