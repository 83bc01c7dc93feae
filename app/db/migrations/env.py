"""Run by Alembic inside `app.db.migrate.migrate`, which hands over an open connection."""

from __future__ import annotations

from alembic import context

from app.db.models import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
context.run_migrations()
