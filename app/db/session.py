"""Sessions: one transaction each, for the platform (sees all) or for one tenant (row-level security shows it its own
rows only).

A lost connection, a deadlock or a timeout becomes `Unavailable` here, so that nothing above knows the driver's
errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine, create_engine, exc, make_url, text
from sqlalchemy.orm import Session

from cluster.errors import InvalidRequest, Unavailable

TENANT_ROLE = "heliostat_tenant"
KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
"""A server that vanished without a word is noticed in half a minute, not in a quarter of an hour. Unix sockets ignore it."""
_CONFINE = text("SELECT set_config('role', :role, true), set_config('heliostat.tenant', :tenant, true)")  # SET LOCAL


@dataclass(frozen=True)
class PoolSettings:
    """`statement_timeout_s` None: no limit (migrations, drivers); the HTTP side sets one."""

    size: int = 10
    wait_s: float = 10.0
    connect_timeout_s: int = 5
    statement_timeout_s: float | None = None
    idle_in_transaction_s: float = 60.0


class Database:
    """The engine and its pool. Not picklable: each process makes its own from the DSN."""

    def __init__(self, dsn: str, pool: PoolSettings | None = None) -> None:
        self.dsn = dsn
        self._engine = make_engine(dsn, pool or PoolSettings())
        self._frozen = self._engine.execution_options(isolation_level="REPEATABLE READ")

    @contextmanager
    def platform(self) -> Iterator[Session]:
        """One transaction that sees every tenant. Raises `Unavailable`."""
        with errors_of_the_house(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """As `platform`, but every read sees the same moment; for reading only. Raises `Unavailable`."""
        with errors_of_the_house(), Session(self._frozen, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def tenant(self, tenant_id: str) -> Iterator[Session]:
        """One transaction that sees this tenant's rows only. Raises `Unavailable`."""
        # `begin` refuses any statement after a commit inside the block, so nothing can run without the role.
        with errors_of_the_house(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.execute(_CONFINE, {"role": TENANT_ROLE, "tenant": tenant_id})
            yield session

    def ping(self) -> None:
        """Raises `Unavailable`."""
        with self.platform() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self._engine.dispose()


def make_engine(dsn: str, pool: PoolSettings) -> Engine:
    """`dsn`: postgresql://… as libpq takes it."""
    options = f"-c idle_in_transaction_session_timeout={int(pool.idle_in_transaction_s * 1000)}"
    options += " -c plan_cache_mode=force_custom_plan"  # a plan made for small tables outlived their growth: 295 jobs/s, not 900
    if pool.statement_timeout_s is not None:
        options += f" -c statement_timeout={int(pool.statement_timeout_s * 1000)}"
    return create_engine(
        make_url(dsn).set(drivername="postgresql+psycopg"),
        pool_size=pool.size,
        max_overflow=0,
        pool_timeout=pool.wait_s,
        pool_pre_ping=True,
        hide_parameters=True,  # errors end up in logs, tenants' values must not
        connect_args={"connect_timeout": pool.connect_timeout_s, "options": options, **KEEPALIVE},
    )


@contextmanager
def errors_of_the_house() -> Iterator[None]:
    """Turns the driver's errors that a caller can do something about into ours."""
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        raise _down(error) from error
    except exc.DataError as error:
        raise InvalidRequest(
            f"a value cannot be stored ({_first_line(error)})",
            code="invalid_value",
            hint="Leave out NUL characters and numbers beyond 64 bits.",
        ) from error
    except exc.DBAPIError as error:
        if error.connection_invalidated:  # the server closed it, for idling in a transaction, say
            raise _down(error) from error
        raise


def _down(error: exc.SQLAlchemyError) -> Unavailable:
    return Unavailable(
        f"the database did not answer ({_first_line(error)})",
        code="database_unavailable",
        hint="Try again in a few seconds; if it goes on, look at the database's log.",
    )


def _first_line(error: exc.SQLAlchemyError) -> str:
    """Of the server's own message: neither the statement nor its parameters."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return (str(cause).strip().splitlines() or [type(error).__name__])[0]
