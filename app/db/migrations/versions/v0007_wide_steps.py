"""Steps and tokens of more than 31 bits: scripts count as they like, and tokens add up."""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("ALTER TABLE steps ALTER COLUMN step TYPE BIGINT, ALTER COLUMN tokens TYPE BIGINT")
    op.execute("ALTER TABLE checkpoints ALTER COLUMN step TYPE BIGINT")


def downgrade() -> None:
    raise NotImplementedError("wide numbers would be lost: restore a backup instead")
