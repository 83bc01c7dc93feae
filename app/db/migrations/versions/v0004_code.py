"""Tenants' code, and jobs of method `custom` that run it."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute(
        """CREATE TABLE code (
            id TEXT NOT NULL PRIMARY KEY,
            tenant_id TEXT NOT NULL REFERENCES tenants (id),
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            files JSONB NOT NULL,
            bytes BIGINT NOT NULL,
            sha256 TEXT NOT NULL,
            source_sha256 TEXT NOT NULL,
            prefix TEXT NOT NULL,
            created_at timestamptz DEFAULT now() NOT NULL,
            deleted_at timestamptz,
            UNIQUE (tenant_id, name, version)
        )"""
    )
    op.execute("CREATE INDEX ix_code_tenant_id ON code (tenant_id)")
    op.execute("GRANT SELECT, INSERT, UPDATE ON code TO heliostat_tenant")
    op.execute("ALTER TABLE code ENABLE ROW LEVEL SECURITY")
    own = "tenant_id = current_setting('heliostat.tenant', true)"
    op.execute(f"CREATE POLICY own_rows ON code TO heliostat_tenant USING ({own}) WITH CHECK ({own})")
    op.execute("ALTER TABLE jobs ADD COLUMN code_id TEXT REFERENCES code (id), ADD COLUMN script JSONB")


def downgrade() -> None:
    raise NotImplementedError("tenants' code would be lost: restore a backup instead")
