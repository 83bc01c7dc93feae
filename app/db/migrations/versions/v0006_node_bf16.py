"""Whether a node's processors compute in bf16, which decides what memory a training on them needs."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("ALTER TABLE nodes ADD COLUMN bf16 BOOLEAN DEFAULT false NOT NULL")


def downgrade() -> None:
    op.execute("ALTER TABLE nodes DROP COLUMN bf16")
