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

QUEUED, IN_PROGRESS, COMPLETED, FAILED = STATES = ("queued", "in_progress", "completed", "failed")

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
    Column("cancel_requested", Boolean, nullable=False, default=False),
    # how far it is
    Column("stage", String(16)),
    Column("step", Integer, nullable=False, default=0),
    Column("num_steps", Integer, nullable=False, default=0),
    Column("checkpoint", String(255)),  # key of the newest one
    Column("checkpoint_step", Integer, nullable=False, default=0),
    Column("resumed_from_step", Integer),
    # what came of it
    Column("artifacts", JSON),  # variant -> key, bytes, sha256
    Column("error_code", String(64)),
    Column("error_message", Text),
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
