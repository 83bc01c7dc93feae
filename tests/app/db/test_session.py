"""Transactions, tenant isolation below the code, and a database that is down."""

from __future__ import annotations

import pytest
from builders_db import make_job, queued_job
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import InvalidRequestError as SqlalchemyInvalidRequest
from sqlalchemy.exc import ProgrammingError

from app.db.models import Control, Event, Job, LeaseSlot, Table, Tenant
from app.db.session import Database, PoolSettings
from cluster.errors import InvalidRequest, Unavailable


def test_a_tenant_sees_its_own_rows_even_without_a_filter(database: Database) -> None:
    mine, theirs = queued_job(database, "acme"), queued_job(database, "rival")
    with database.tenant("acme") as session:
        assert session.scalars(select(Job.id)).all() == [mine]
        assert session.scalars(select(Tenant.id)).all() == ["acme"]
        session.execute(update(Job).values(reason="touched"))
    with database.platform() as session:
        reasons = {row.id: row.reason for row in session.execute(select(Job.id, Job.reason))}
    assert reasons == {mine: "touched", theirs: ""}


def test_nothing_can_run_after_a_commit_inside_a_tenant_s_block(database: Database) -> None:
    """It would run without the tenant's role."""
    with database.tenant("acme") as session:
        session.commit()
        with pytest.raises(SqlalchemyInvalidRequest, match="closed transaction"):
            session.execute(select(Job))


def test_the_next_user_of_a_pooled_connection_is_not_confined(dsn: str) -> None:
    database = Database(dsn, PoolSettings(size=1))
    queued_job(database, "acme")
    with database.tenant("rival") as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1
    database.close()


def test_a_tenant_cannot_write_a_row_of_another(database: Database) -> None:
    job_id = queued_job(database, "acme")
    event = {"job_id": job_id, "seq": 9, "id": "e", "tenant_id": "acme", "type": "log", "level": "info"}
    with pytest.raises(ProgrammingError, match="row-level security"):
        with database.tenant("rival") as session:
            session.execute(insert(Event).values(**event, message="", data={}, attempt=0))


def test_every_table_with_a_tenant_stands_under_row_level_security(database: Database) -> None:
    with database.platform() as session:
        guarded = session.scalars(text("SELECT relname FROM pg_class WHERE relrowsecurity")).all()
    with_tenant = {table.name for table in Table.metadata.sorted_tables if "tenant_id" in table.columns}
    assert set(guarded) == with_tenant | {"tenants"}


def test_a_tenant_has_no_rights_on_the_scheduler_s_tables(database: Database) -> None:
    for statement in (select(LeaseSlot), insert(Control).values(name="x", value=1), delete(Event)):
        with pytest.raises(ProgrammingError, match="permission denied"):
            with database.tenant("acme") as session:
                session.execute(statement)


def test_an_exception_rolls_back(database: Database) -> None:
    with pytest.raises(KeyError), database.platform() as session:
        make_job(session)
        raise KeyError
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_a_database_that_is_down_is_unavailable() -> None:
    database = Database("postgresql://nobody@127.0.0.1:9/none")
    with pytest.raises(Unavailable) as caught:
        database.ping()
    assert caught.value.code == "database_unavailable"


def test_a_statement_that_takes_too_long_is_unavailable(dsn: str) -> None:
    database = Database(dsn, PoolSettings(statement_timeout_s=0.05))
    with pytest.raises(Unavailable, match="statement timeout"), database.platform() as session:
        session.execute(text("SELECT pg_sleep(5)"))
    database.close()


def test_text_that_postgres_cannot_hold_is_the_callers_mistake(database: Database) -> None:
    with pytest.raises(InvalidRequest), database.platform() as session:
        session.scalar(select(Job).where(Job.id == "a\0b"))


def test_connections_cut_by_a_restart_are_replaced(database: Database) -> None:
    with database.platform() as session:
        pid = session.scalar(select(func.pg_backend_pid()))
    other = Database(database.dsn)
    with other.platform() as session:
        session.execute(select(func.pg_terminate_backend(pid)))
    other.close()
    database.ping()
    with database.platform() as session:
        assert session.scalar(select(func.pg_backend_pid())) != pid


def test_no_plan_outlives_the_growth_of_its_tables(database: Database) -> None:
    with database.platform() as session:
        assert session.scalar(text("SHOW plan_cache_mode")) == "force_custom_plan"
