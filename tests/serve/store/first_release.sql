-- The tables of schema version 1, as that release made them on Postgres, and on SQLite by the same text.
CREATE TABLE api_keys (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(64) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    scopes JSON NOT NULL,
    max_priority INTEGER NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT,
    revoked_at FLOAT,
    PRIMARY KEY (id),
    UNIQUE (digest)
);
CREATE TABLE jobs (
    id VARCHAR(64) NOT NULL,
    sequence BIGINT NOT NULL,
    tenant VARCHAR(64) NOT NULL,
    state VARCHAR(16) NOT NULL,
    request JSON NOT NULL,
    priority INTEGER NOT NULL,
    work FLOAT NOT NULL,
    created_at FLOAT NOT NULL,
    started_at FLOAT,
    ended_at FLOAT,
    epoch INTEGER NOT NULL,
    lease_until FLOAT,
    owner VARCHAR(64),
    attempts INTEGER NOT NULL,
    is_suspect BOOLEAN NOT NULL,
    stage VARCHAR(16),
    step INTEGER NOT NULL,
    num_steps INTEGER NOT NULL,
    checkpoint VARCHAR(255),
    checkpoint_step INTEGER NOT NULL,
    resumed_from_step INTEGER,
    eta_s FLOAT,
    version INTEGER NOT NULL,
    preview JSON,
    artifacts JSON,
    is_swept BOOLEAN NOT NULL,
    has_expired BOOLEAN NOT NULL,
    error_code VARCHAR(64),
    error_message TEXT,
    webhook_url TEXT,
    PRIMARY KEY (id),
    CONSTRAINT jobs_state CHECK (state in ('queued', 'in_progress', 'completed', 'failed')),
    UNIQUE (sequence)
);
CREATE INDEX jobs_of_tenant ON jobs (tenant, sequence);
CREATE INDEX jobs_waiting ON jobs (state, lease_until, priority);
CREATE TABLE outbox (
    id VARCHAR(64) NOT NULL,
    job_id VARCHAR(64) NOT NULL,
    url TEXT NOT NULL,
    body TEXT NOT NULL,
    created_at FLOAT NOT NULL,
    next_at FLOAT NOT NULL,
    attempts INTEGER NOT NULL,
    delivered_at FLOAT,
    failed_at FLOAT,
    last_error VARCHAR(200),
    PRIMARY KEY (id)
);
CREATE INDEX outbox_due ON outbox (delivered_at, failed_at, next_at);
CREATE TABLE processes (
    id VARCHAR(64) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    seen_at FLOAT NOT NULL,
    facts JSON NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE rates (
    tenant VARCHAR(64) NOT NULL,
    minute BIGINT NOT NULL,
    creates INTEGER NOT NULL,
    PRIMARY KEY (tenant, minute)
);
CREATE TABLE schema_version (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE idempotency (
    tenant VARCHAR(64) NOT NULL,
    route VARCHAR(64) NOT NULL,
    key VARCHAR(255) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    job_id VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (tenant, route, key),
    FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE TABLE sessions (
    digest VARCHAR(64) NOT NULL,
    key_id VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT NOT NULL,
    PRIMARY KEY (digest),
    FOREIGN KEY(key_id) REFERENCES api_keys (id) ON DELETE CASCADE
);
INSERT INTO schema_version (version) VALUES (1);
INSERT INTO api_keys (id, tenant, digest, scopes, max_priority, created_at)
VALUES ('key_0000000000000001', 'acme', 'DIGEST', '["read", "write"]', 3, 1795800000.5);
INSERT INTO jobs (id, sequence, tenant, state, request, priority, work, created_at, epoch, attempts, is_suspect, step,
    num_steps, checkpoint_step, version, is_swept, has_expired)
VALUES ('video_00000000000000000000000000000001', 1, 'acme', 'queued', '{"prompt": "a star", "model": "demo"}', 0, 1.0,
    1795800001.5, 0, 0, false, 0, 0, 0, 0, false, false);
INSERT INTO processes (id, kind, seen_at, facts) VALUES ('old', 'engine', 1795800002.5, '{"slots": 8}');
