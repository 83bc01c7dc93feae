"""A job may go on from a checkpoint of another one."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN parent_checkpoint_id TEXT REFERENCES checkpoints (id)")
    op.execute("CREATE INDEX ix_jobs_parent_checkpoint_id ON jobs (parent_checkpoint_id)")
    # who may lock a row must be allowed to update one of its columns
    op.execute("GRANT UPDATE (created_at) ON checkpoints TO heliostat_tenant")


def downgrade() -> None:
    raise NotImplementedError("what jobs have begun with would be lost: restore a backup instead")
