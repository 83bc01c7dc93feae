"""What checks of environments on nodes have said: the newest of each kind."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

TABLE = """
CREATE TABLE environment_checks (
    fingerprint TEXT NOT NULL,
    node TEXT NOT NULL,
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    detail TEXT DEFAULT '' NOT NULL,
    checked_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (fingerprint, node, kind)
)
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE environment_checks")
