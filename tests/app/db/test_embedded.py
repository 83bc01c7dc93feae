"""The embedded server: starts, keeps its data, survives a kill, and does not run as root."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from waiting import lives, until

from app.db.embedded import EmbeddedPostgres
from cluster.errors import Conflict

FAST = {"fsync": "off", "shared_buffers": "16MB", "max_connections": "20"}


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("embedded") / "pg", FAST)
    yield server
    server.stop()


@pytest.fixture
def server(one_server: EmbeddedPostgres) -> EmbeddedPostgres:
    one_server.start()
    return one_server


def _count(server: EmbeddedPostgres) -> int:
    with psycopg.connect(server.dsn()) as connection:
        row = connection.execute("SELECT count(*) FROM t").fetchone()
        assert row is not None
        return int(row[0])


def test_data_survives_sigkill_and_a_server_left_behind(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS x")
    assert server.pid is not None
    first = psutil.Process(server.pid)
    first.kill()
    until(lambda: server.pid is None)
    assert (server.folder / "data" / "postmaster.pid").exists()
    server.start()  # over the stale pid file
    assert _count(server) == 1

    left_behind = psutil.Process(server.pid)
    successor = EmbeddedPostgres(server.folder, FAST)
    successor.start()  # as a new supervisor would
    assert not lives(left_behind)
    assert _count(successor) == 1
    successor.stop()
    assert successor.pid is None


def test_it_never_runs_as_root_and_asks_for_a_password(server: EmbeddedPostgres) -> None:
    assert psutil.Process(server.pid).uids().effective != 0
    passfile = server.folder / "pgpass"
    assert stat.S_IMODE(passfile.stat().st_mode) == 0o600
    assert passfile.read_text().strip().rsplit(":", 1)[1] not in server.dsn()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(server.dsn().replace(str(passfile), os.devnull))


def test_a_pid_file_with_another_programs_number_is_no_obstacle(server: EmbeddedPostgres) -> None:
    server.stop()
    pid_file = server.folder / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n")
    server.start()
    assert server.pid is not None


def test_data_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pg" / "data").mkdir(parents=True)
    (tmp_path / "pg" / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(Conflict) as caught:
        EmbeddedPostgres(tmp_path / "pg").start()
    assert caught.value.code == "database_version"


def test_the_socket_path_stays_short(tmp_path: Path) -> None:
    deep = EmbeddedPostgres(tmp_path / ("d" * 80) / "pg")
    assert len(deep.dsn().split("host=")[1].split("&")[0]) < 90
    assert deep.dsn() == EmbeddedPostgres(tmp_path / ("d" * 80) / "pg").dsn()


def test_a_kill_while_the_database_is_made_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """initdb writes PG_VERSION first: what lies there must not be taken for a database."""
    first = EmbeddedPostgres(tmp_path / "pg", FAST)

    def killed(command: list[str], **_: object) -> None:
        (Path(command[command.index("--pgdata") + 1]) / "PG_VERSION").write_text("18\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("app.db.embedded.subprocess.run", killed)
        with pytest.raises(KeyboardInterrupt):
            first.start()
    second = EmbeddedPostgres(tmp_path / "pg", FAST)
    second.start()
    try:
        psycopg.connect(second.dsn()).close()
        assert list((tmp_path / "pg").glob("making-*")) == []
    finally:
        second.stop()
