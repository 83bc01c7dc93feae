-- Tables, access of tenants, notifications.

CREATE TABLE base_models (
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    source TEXT NOT NULL,
    prefix TEXT,
    sha256 TEXT,
    config JSONB,
    parameters BIGINT,
    bytes BIGINT,
    chat_template TEXT,
    error JSONB,
    created_at timestamptz DEFAULT now() NOT NULL,
    claimed_at timestamptz,
    PRIMARY KEY (id),
    UNIQUE (name)
);

CREATE TABLE control (
    name TEXT NOT NULL,
    value BIGINT NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE nodes (
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    slots INTEGER NOT NULL,
    memory_gb FLOAT NOT NULL,
    environments JSONB NOT NULL,
    models JSONB NOT NULL,
    seen_at timestamptz DEFAULT now() NOT NULL,
    lost_at timestamptz,
    PRIMARY KEY (name)
);

CREATE TABLE tenants (
    id TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    max_queued_jobs INTEGER NOT NULL,
    max_slots INTEGER,
    uid INTEGER,
    PRIMARY KEY (id),
    UNIQUE (uid)
);

CREATE TABLE datasets (
    id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    format TEXT NOT NULL,
    task TEXT NOT NULL,
    rows INTEGER NOT NULL,
    bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    source_sha256 TEXT NOT NULL,
    object_key TEXT NOT NULL,
    report JSONB NOT NULL,
    max_chars INTEGER NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    deleted_at timestamptz,
    PRIMARY KEY (id),
    UNIQUE (tenant_id, name, version),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_datasets_tenant_id ON datasets (tenant_id);

CREATE TABLE environments (
    id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    spec TEXT NOT NULL,
    lock JSONB NOT NULL,
    fingerprint TEXT NOT NULL,
    dependency_md5 TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    deleted_at timestamptz,
    PRIMARY KEY (id),
    UNIQUE (tenant_id, name, version),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_environments_tenant_id ON environments (tenant_id);

CREATE TABLE idempotency_keys (
    tenant_id TEXT NOT NULL,
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    body_sha256 TEXT NOT NULL,
    token_sha256 TEXT NOT NULL,
    status INTEGER NOT NULL,
    response JSONB NOT NULL,
    delivered BOOLEAN DEFAULT 'false' NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    PRIMARY KEY (tenant_id, route, key),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);

CREATE TABLE issued_tokens (
    jti TEXT NOT NULL,
    tenant_id TEXT,
    subject TEXT NOT NULL,
    role TEXT NOT NULL,
    scope TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    PRIMARY KEY (jti),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_issued_tokens_tenant_id ON issued_tokens (tenant_id);

CREATE TABLE models (
    id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    name TEXT NOT NULL,
    last_version INTEGER DEFAULT '0' NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    deleted_at timestamptz,
    PRIMARY KEY (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_models_tenant_id ON models (tenant_id);
CREATE UNIQUE INDEX models_name ON models (tenant_id, name) WHERE deleted_at IS NULL;

CREATE TABLE jobs (
    id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    state TEXT NOT NULL,
    wish TEXT DEFAULT 'run' NOT NULL,
    reason TEXT DEFAULT '' NOT NULL,
    attempt INTEGER DEFAULT '0' NOT NULL,
    epoch BIGINT DEFAULT '0' NOT NULL,
    fruitless_attempts INTEGER DEFAULT '0' NOT NULL,
    last_seq BIGINT DEFAULT '0' NOT NULL,
    priority TEXT NOT NULL,
    request JSONB NOT NULL,
    method TEXT NOT NULL,
    training_type TEXT NOT NULL,
    task TEXT NOT NULL,
    hyperparams JSONB NOT NULL,
    precision TEXT NOT NULL,
    resource_config JSONB NOT NULL,
    shape JSONB NOT NULL,
    estimate JSONB NOT NULL,
    actual JSONB,
    granted JSONB,
    base_model_id TEXT NOT NULL,
    parent_version_id TEXT,
    dataset_id TEXT NOT NULL,
    validation_dataset_id TEXT,
    environment_id TEXT,
    lock JSONB NOT NULL,
    fingerprint TEXT NOT NULL,
    output_model TEXT NOT NULL,
    fine_tuned_model TEXT,
    error JSONB,
    metadata JSONB NOT NULL,
    created_by TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    queued_at timestamptz DEFAULT now() NOT NULL,
    state_since timestamptz DEFAULT now() NOT NULL,
    progress_at timestamptz DEFAULT now() NOT NULL,
    started_at timestamptz,
    finished_at timestamptz,
    ran_s FLOAT DEFAULT '0' NOT NULL,
    max_runtime_s FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    FOREIGN KEY(dataset_id) REFERENCES datasets (id),
    FOREIGN KEY(validation_dataset_id) REFERENCES datasets (id),
    FOREIGN KEY(environment_id) REFERENCES environments (id)
);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE INDEX ix_jobs_tenant_id ON jobs (tenant_id);

CREATE TABLE checkpoints (
    id TEXT NOT NULL,
    job_id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    prefix TEXT NOT NULL,
    files JSONB NOT NULL,
    metrics JSONB NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (job_id, attempt, step),
    FOREIGN KEY(job_id) REFERENCES jobs (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_checkpoints_tenant_id ON checkpoints (tenant_id);

CREATE TABLE events (
    job_id TEXT NOT NULL,
    seq BIGINT NOT NULL,
    id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    type TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data JSONB NOT NULL,
    attempt INTEGER NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    xid BIGINT DEFAULT (pg_current_xact_id()::text::bigint) NOT NULL,
    PRIMARY KEY (job_id, seq),
    FOREIGN KEY(job_id) REFERENCES jobs (id),
    UNIQUE (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX events_tail ON events (tenant_id, xid, job_id, seq);
CREATE INDEX ix_events_tenant_id ON events (tenant_id);

CREATE TABLE leases (
    job_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    node TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    slots INTEGER[] NOT NULL,
    kind TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    turn INTEGER DEFAULT '1' NOT NULL,
    granted_at timestamptz DEFAULT now() NOT NULL,
    expires_at timestamptz NOT NULL,
    released_at timestamptz,
    PRIMARY KEY (job_id, attempt, node),
    FOREIGN KEY(job_id) REFERENCES jobs (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_leases_released_at ON leases (released_at);
CREATE INDEX ix_leases_tenant_id ON leases (tenant_id);

CREATE TABLE model_versions (
    id TEXT NOT NULL,
    model_id TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    job_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    prefix TEXT NOT NULL,
    files JSONB NOT NULL,
    metrics JSONB NOT NULL,
    lineage JSONB NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    deleted_at timestamptz,
    PRIMARY KEY (id),
    UNIQUE (model_id, version),
    FOREIGN KEY(model_id) REFERENCES models (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    UNIQUE (job_id),
    FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE INDEX ix_model_versions_tenant_id ON model_versions (tenant_id);

CREATE TABLE steps (
    job_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    tenant_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    epoch FLOAT NOT NULL,
    loss FLOAT NOT NULL,
    lr FLOAT NOT NULL,
    grad_norm FLOAT NOT NULL,
    tokens INTEGER NOT NULL,
    seconds FLOAT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    PRIMARY KEY (job_id, step),
    FOREIGN KEY(job_id) REFERENCES jobs (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE INDEX ix_steps_tenant_id ON steps (tenant_id);

CREATE TABLE lease_slots (
    node TEXT NOT NULL,
    slot INTEGER NOT NULL,
    job_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    PRIMARY KEY (node, slot),
    FOREIGN KEY(job_id, attempt, node) REFERENCES leases (job_id, attempt, node) ON DELETE CASCADE
);

CREATE TABLE model_aliases (
    model_id TEXT NOT NULL,
    alias TEXT NOT NULL,
    number INTEGER NOT NULL,
    tenant_id TEXT NOT NULL,
    version_id TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    PRIMARY KEY (model_id, alias, number),
    FOREIGN KEY(model_id) REFERENCES models (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    FOREIGN KEY(version_id) REFERENCES model_versions (id)
);
CREATE INDEX ix_model_aliases_tenant_id ON model_aliases (tenant_id);
ALTER TABLE jobs ADD FOREIGN KEY (parent_version_id) REFERENCES model_versions (id);

-- Access. The owner (the platform) sees all rows: row-level security is not forced on it, since the scheduler rules over every
-- tenant. A tenant's session takes the role heliostat_tenant: no policy, no row; a forgotten filter returns nothing.
-- The role belongs to the whole server, so it may be there already: from another database, or made by an administrator for an
-- owner that may not make roles.
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'heliostat_tenant') THEN
        CREATE ROLE heliostat_tenant NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;  -- made at this moment
END $$;
DO $$ BEGIN
    IF NOT pg_has_role(current_user, 'heliostat_tenant', 'SET') THEN
        EXECUTE format('GRANT heliostat_tenant TO %I', current_user);
    END IF;
END $$;
GRANT USAGE ON SCHEMA public TO heliostat_tenant;

GRANT SELECT ON base_models, nodes, tenants, leases, steps, checkpoints TO heliostat_tenant;
GRANT SELECT, INSERT ON events TO heliostat_tenant;
GRANT SELECT, INSERT, UPDATE ON datasets, environments, jobs, models, model_versions, model_aliases, issued_tokens
    TO heliostat_tenant;
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_keys TO heliostat_tenant;

ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_row ON tenants FOR SELECT TO heliostat_tenant USING (id = current_setting('heliostat.tenant', true));

DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['datasets', 'environments', 'jobs', 'events', 'steps', 'checkpoints', 'leases', 'models',
                                'model_versions', 'model_aliases', 'idempotency_keys', 'issued_tokens'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY own_rows ON %I TO heliostat_tenant
                        USING (tenant_id = current_setting(''heliostat.tenant'', true))
                        WITH CHECK (tenant_id = current_setting(''heliostat.tenant'', true))', name);
    END LOOP;
END $$;

-- Notifications go out at commit. Channel heliostat: a job, a wish or a lease changed (payload: the job's id; the scheduler reads
-- the rows). Channel heliostat_events: an event was written (payload: tenant, job, number).
CREATE FUNCTION notify_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('heliostat', NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER job_made AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION notify_job();
CREATE TRIGGER job_changed AFTER UPDATE OF state, wish, attempt, priority ON jobs FOR EACH ROW
    WHEN ((OLD.state, OLD.wish, OLD.attempt, OLD.priority) IS DISTINCT FROM (NEW.state, NEW.wish, NEW.attempt, NEW.priority))
    EXECUTE FUNCTION notify_job();

CREATE FUNCTION notify_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('heliostat', NEW.job_id);
    RETURN NULL;
END $$;
CREATE TRIGGER lease_closed AFTER UPDATE OF released_at ON leases FOR EACH ROW
    WHEN (OLD.released_at IS DISTINCT FROM NEW.released_at) EXECUTE FUNCTION notify_lease();

CREATE FUNCTION notify_event() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('heliostat_events', json_build_object('tenant', NEW.tenant_id, 'job', NEW.job_id, 'seq', NEW.seq)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER event_made AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION notify_event();
