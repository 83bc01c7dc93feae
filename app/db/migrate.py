"""Brings a database to the newest schema. Several processes may ask at once: one does it, the others wait."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from app.db.session import PoolSettings, errors_of_the_house, make_engine

LOCK_NUMBER = 0x48454C49  # any fixed number: "HELI"


def migrate(dsn: str, to: str = "head") -> None:
    """One transaction: all of the missing migrations or none. Raises `Unavailable`."""
    engine = make_engine(dsn, PoolSettings(size=1))
    try:
        with errors_of_the_house(), engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK_NUMBER})
            command.upgrade(_config(connection), to)
    finally:
        engine.dispose()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
