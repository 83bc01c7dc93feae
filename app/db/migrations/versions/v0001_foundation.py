"""The first schema: all tables, row-level security, notifications. Written in SQL, beside this file."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # Through the bare cursor: it takes many statements at once, and leaves the % of format() alone.
    cursor = op.get_bind().connection.cursor()
    cursor.execute(Path(__file__).with_suffix(".sql").read_text())
    cursor.close()


def downgrade() -> None:
    raise NotImplementedError("there is nothing before the first schema: restore a backup instead")
