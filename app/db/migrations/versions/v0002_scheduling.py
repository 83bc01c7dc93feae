"""Shares, quotas and budgets; turns and orders of leases; markets and prices of nodes. Written in SQL, beside this file."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    cursor = op.get_bind().connection.cursor()  # the bare one: many statements at once
    cursor.execute(Path(__file__).with_suffix(".sql").read_text())
    cursor.close()


def downgrade() -> None:
    raise NotImplementedError("what jobs have used would be lost: restore a backup instead")
