-- What the scheduler shares out by: shares and quotas of tenants, turns and orders of leases, markets and prices of nodes, budgets.

ALTER TABLE tenants
    ADD COLUMN weight FLOAT DEFAULT '1' NOT NULL CHECK (weight > 0),
    ADD COLUMN guaranteed_slots INTEGER DEFAULT '0' NOT NULL CHECK (guaranteed_slots >= 0),
    ADD COLUMN urgent_slots INTEGER CHECK (urgent_slots >= 0),
    ADD COLUMN gpu_hours_per_month FLOAT CHECK (gpu_hours_per_month >= 0);

ALTER TABLE jobs
    ADD COLUMN budget JSONB,
    ADD COLUMN attained_s FLOAT DEFAULT '0' NOT NULL,
    ADD COLUMN turns INTEGER DEFAULT '0' NOT NULL,
    ADD COLUMN moved BOOLEAN DEFAULT 'false' NOT NULL;

ALTER TABLE leases
    ADD COLUMN ordered TEXT CHECK (ordered IN ('park', 'suspend')),
    ADD COLUMN order_reason TEXT,
    ADD COLUMN ordered_at timestamptz,
    ADD COLUMN parked_at timestamptz,
    ADD COLUMN held_since timestamptz DEFAULT now(),
    ADD COLUMN held_s FLOAT DEFAULT '0' NOT NULL,
    ADD COLUMN unbilled_s FLOAT DEFAULT '0' NOT NULL,
    ADD COLUMN price_per_hour FLOAT DEFAULT '0' NOT NULL;

-- Leases of the time before had one turn each: from the grant to the release.
UPDATE leases SET
    held_since = CASE WHEN released_at IS NULL THEN granted_at END,
    held_s = CASE WHEN released_at IS NULL THEN 0
                  ELSE greatest(0, extract(epoch FROM released_at - granted_at))::float END;
UPDATE jobs SET attained_s = used.held_s, turns = used.turns
    FROM (SELECT job_id, sum(held_s) AS held_s, count(*) AS turns
          FROM (SELECT job_id, attempt, max(held_s) AS held_s FROM leases GROUP BY job_id, attempt) AS attempts
          GROUP BY job_id) AS used
    WHERE jobs.id = used.job_id;

-- A month's use of a tenant: open leases, and those released since.
DROP INDEX ix_leases_tenant_id;
CREATE INDEX leases_usage ON leases (tenant_id, released_at);

ALTER TABLE nodes
    ADD COLUMN market TEXT DEFAULT 'on_demand' NOT NULL,
    ADD COLUMN region TEXT DEFAULT '' NOT NULL,
    ADD COLUMN price_per_hour FLOAT DEFAULT '0' NOT NULL,
    ADD COLUMN park_gb FLOAT DEFAULT '0' NOT NULL,
    ADD COLUMN draining BOOLEAN DEFAULT 'false' NOT NULL,
    ADD COLUMN notice_deadline timestamptz;

-- The scheduler looks again (payload '*': at everything) when a share, a quota or a node's draining changed, and when slots of a
-- parked job came free.
CREATE FUNCTION notify_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('heliostat', '*');
    RETURN NULL;
END $$;
CREATE TRIGGER tenant_changed AFTER UPDATE ON tenants FOR EACH ROW
    WHEN ((OLD.weight, OLD.guaranteed_slots, OLD.urgent_slots, OLD.max_slots, OLD.gpu_hours_per_month) IS DISTINCT FROM
          (NEW.weight, NEW.guaranteed_slots, NEW.urgent_slots, NEW.max_slots, NEW.gpu_hours_per_month))
    EXECUTE FUNCTION notify_all();
CREATE TRIGGER node_drained AFTER UPDATE OF draining ON nodes FOR EACH ROW
    WHEN (OLD.draining IS DISTINCT FROM NEW.draining) EXECUTE FUNCTION notify_all();
CREATE TRIGGER lease_ordered AFTER UPDATE OF ordered, parked_at ON leases FOR EACH ROW
    WHEN ((OLD.ordered, OLD.parked_at) IS DISTINCT FROM (NEW.ordered, NEW.parked_at)) EXECUTE FUNCTION notify_lease();
