"""`heliostat up`'s parent on one machine: starts PostgreSQL, the Ray head and the control process, starts again what dies, and
ends every process of this instance when told to. It holds nothing; everything that matters is in rows and objects."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from app import ray_head
from app.bootstrap import prepare_database
from app.db.embedded import EmbeddedPostgres
from app.processes import (
    Started,
    end_all,
    end_marked,
    free_port,
    holder_of,
    last_lines,
    mark,
    port_taken,
    remove_folder,
    start,
)
from app.settings import CONFIG_VARIABLE, Settings, load_settings
from cluster.errors import Conflict, HeliostatError, Unavailable
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.sandbox.cgroup import settle
from runtime_envs.sandbox.host import needed
from runtime_envs.sandbox.spec import Isolation

log = logging.getLogger("heliostat.supervisor")

LOOK_EVERY_S = 0.5
READY_LIMIT_S = 180.0
ORDERLY_S = 1.5
"""Ray would drain for half a minute; nothing here needs it, since everything is made to be killed."""
MARKER = "heliostat.data"
"""A file in the data folder that says it is ours: `down --purge` removes no other."""


@dataclass
class State:
    """What `heliostat status` reads from `run/supervisor.json`."""

    pid: int = field(default_factory=os.getpid)
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)
    url: str = ""
    dashboard_url: str = ""
    started_at: float = field(default_factory=time.time)
    ready: bool = False
    phase: str = "starting"
    error: dict[str, str | None] | None = None
    components: dict[str, dict[str, str | int]] = field(default_factory=dict)
    scratch: str | None = None
    """Ray's temporary folder, where it is ours to remove."""


class Supervisor:
    """`settings` with ports 0 are resolved at `run`; what was resolved is written for every process that is started."""

    def __init__(self, settings: Settings) -> None:
        self.state = State()
        self._settings = settings
        self._stopping = threading.Event()
        self._postgres: EmbeddedPostgres | None = None
        self._head: Started | None = None
        self._control: Started | None = None
        self._scratch: Path | None = None
        self._restarts = 0
        self._lock: FileLock | None = None

    def stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        self._stopping.set()

    def run(self) -> int:
        """Until told to stop; the exit code."""
        try:
            self._claim_data_dir()
        except Conflict as error:  # nothing here is ours to end or to write
            log.error("%s %s", error.message, error.hint)
            return 1
        try:
            self._start_all()
            while not self._stopping.wait(LOOK_EVERY_S):
                self._keep()
        except HeliostatError as error:
            log.error("%s %s", error.message, error.hint or "")
            self._say(error=error.as_dict(), phase="failed")
            return 1
        finally:
            self._end_all()
        return 0

    # Starting

    def _claim_data_dir(self) -> None:
        for folder in (self._settings.data_dir, self._settings.run_dir, self._settings.data_dir / "keys"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._settings.data_dir / MARKER).touch()
        lock = FileLock(self._settings.run_dir / "lock", is_singleton=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Conflict(
                f"another Heliostat runs on {self._settings.data_dir}",
                code="already_running",
                hint="`heliostat status` shows it, `heliostat down` stops it.",
            ) from None
        self._lock = lock  # held until this process ends, however it ends
        earlier = read_state(self._settings.data_dir)
        if earlier is not None and "instance" in earlier:
            # A supervisor that was killed leaves its processes; they belong to nobody now.
            left = end_marked(str(earlier["instance"]))
            if left:
                log.warning("ended %s processes of an earlier instance that was killed", left)
            if scratch := earlier.get("scratch"):
                remove_folder(Path(str(scratch)))

    def _start_all(self) -> None:
        settle()
        check_isolation(self._settings)
        self._settings = resolve(self._settings)
        self._say(phase="database")
        self._start_postgres()
        prepare_database(self._settings)
        self._say(phase="ray")
        ray_head.make_token(self._settings)
        self._start_ray()
        self._say(phase="services")
        self._wait_ready(READY_LIMIT_S)
        self._say(phase="ready", ready=True)

    def _start_postgres(self) -> None:
        if self._settings.database.dsn is None or self._postgres is not None:
            self._postgres = self._postgres or EmbeddedPostgres(self._settings.postgres_dir)
            self._postgres.start()
            database = self._settings.database.model_copy(update={"dsn": self._postgres.dsn()})
            self._settings = self._settings.model_copy(update={"database": database})
        write_resolved(self._settings)

    def _start_ray(self) -> None:
        self._scratch = ray_head.temp_dir(self._settings)
        self.state.scratch = None if self._settings.ray.temp_dir else str(self._scratch)
        self._say()  # before anything is in it: whoever comes after a SIGKILL knows what to remove
        environment = self._environment(self._scratch)
        log_dir = self._settings.log_dir
        self._head = start("ray", ray_head.command(self._settings, self._scratch), environment, log_dir / "ray.log")
        self._wait_for_ray()
        self._start_control()

    def _start_control(self) -> None:
        assert self._scratch is not None
        environment = self._environment(self._scratch)
        command = [sys.executable, "-m", "app.control"]
        self._control = start("control", command, environment, self._settings.log_dir / "control.log")

    def _environment(self, scratch: Path) -> dict[str, str]:
        """Ours, without the caller's HELIOSTAT_* variables: what they said is in the resolved file."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HELIOSTAT_", "RAY_"))}
        return {
            **inherited,
            **ray_head.environment(self._settings, scratch),
            **mark(self.state.instance),
            CONFIG_VARIABLE: str(resolved_file(self._settings.data_dir)),
            "HELIOSTAT_ENV_ROOT": str(self._settings.node_root),
            # For `ray job submit … -- heliostat …`: the client finds the service and a token on the node.
            "HELIOSTAT_URL": public_url(self._settings),
            "HELIOSTAT_TOKEN_FILE": str(self._settings.data_dir / "keys" / "default.token"),
        }

    def _wait_for_ray(self) -> None:
        deadline = time.monotonic() + READY_LIMIT_S
        url = f"http://127.0.0.1:{self._settings.ray.dashboard_port}/api/version"
        while not self._stopping.is_set():
            if self._head is None or not self._head.alive or time.monotonic() > deadline:
                raise Unavailable(
                    "the Ray head did not start:\n" + last_lines(self._settings.log_dir / "ray.log"),
                    code="ray_not_started",
                    hint="`heliostat doctor` checks the host.",
                )
            if answers(url, any_status=True):
                return
            self._stopping.wait(0.2)

    def _wait_ready(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not self._stopping.is_set() and not answers(f"{public_url(self._settings)}/readyz"):
            self._look()
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the API did not answer within {limit_s:.0f} s:\n"
                    + last_lines(self._settings.log_dir / "control.log"),
                    code="api_not_started",
                    hint="`heliostat doctor` checks the host; the logs lie in `logs` under the data folder.",
                )
            self._stopping.wait(LOOK_EVERY_S)

    # Keeping

    def _keep(self) -> None:
        """What does not come back now (a full disk, a port that is taken for a moment) may do so later: giving up would
        end what still runs."""
        try:
            self._look()
        except (Unavailable, OSError) as error:
            log.error("starting again what died failed, trying again: %s", error)
            self._backoff()

    def _look(self) -> None:
        """Starts again what died."""
        if self._postgres is not None and self._postgres.pid is None:
            log.warning("PostgreSQL died; starting it again")
            self._backoff()
            self._postgres.start()
        if self._head is not None and not self._head.alive:
            log.warning("the Ray head died; starting a new one")
            self._backoff()
            self._end_ray()
            self._start_ray()
        elif self._control is not None and not self._control.alive:
            log.warning("the control process died; starting it again:\n%s", last_lines(self._control.log, 5))
            self._backoff()
            self._start_control()
        self._say()

    def _backoff(self) -> None:
        self._restarts += 1
        self._stopping.wait(min(0.2 * 2 ** min(self._restarts, 6), 10.0))

    # Ending

    def _end_ray(self) -> None:
        """The head, the control process and all that Ray started; training children leave at the end of their sockets."""
        roots = [one for one in (self._control, self._head) if one is not None]
        end_all(roots, ORDERLY_S)
        end_marked(self.state.instance, [one.process.pid for one in roots])
        if self._scratch is not None and self._settings.ray.temp_dir is None:
            try:
                keep_ray_logs(self._scratch, self._settings.log_dir / "ray-last")
            except OSError as error:
                log.warning("the logs of Ray were not kept: %s", str(error)[:300])
            remove_folder(self._scratch)

    def _end_all(self) -> None:
        with suppress(OSError):  # on a full disk, too, nothing is left behind
            self._say(phase="stopping", ready=False)
        self._end_ray()
        if self._postgres is not None:
            self._postgres.stop()
        if self.state.error is None:
            state_file(self._settings.data_dir).unlink(missing_ok=True)

    def _say(self, **changes: object) -> None:
        for name, value in changes.items():
            if name == "phase" and value != self.state.phase:
                log.info("%s", value)
            setattr(self.state, name, value)
        self.state.url = public_url(self._settings)
        self.state.dashboard_url = f"http://127.0.0.1:{self._settings.ray.dashboard_port}"
        self.state.components = {
            started.name: {"pid": started.process.pid, "state": "running" if started.alive else "dead"}
            for started in (self._head, self._control)
            if started is not None
        }
        if self._postgres is not None:
            pid = self._postgres.pid
            self.state.components["postgres"] = {"pid": pid or 0, "state": "running" if pid else "dead"}
        replace_text(state_file(self._settings.data_dir), json.dumps(vars(self.state)))


def keep_ray_logs(scratch: Path, kept: Path) -> None:
    """Of the head that has just ended: its temporary folder goes, and with it what would say why it died."""
    for logs in scratch.glob("session_2*/logs"):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True)


def check_isolation(settings: Settings) -> None:
    """Raises `Unavailable` where this machine cannot isolate tenants' code and has to, `Conflict` where a production service
    would not insist on it."""
    if settings.profile == "production" and settings.isolation != "required":
        raise Conflict(
            f"a production service isolates tenants' code; isolation is {settings.isolation}",
            code="isolation_not_required",
            hint='Set `isolation = "required"`, or `profile = "laptop"` where all tenants trust each other.',
        )
    try:
        needed(Isolation(settings.isolation))
    except EnvironmentProblem as problem:
        raise Unavailable(problem.message, code=problem.code, hint=problem.hint) from problem


def resolve(settings: Settings) -> Settings:
    """Every port 0 becomes a free one. Raises `Conflict` when the HTTP port is taken."""
    http = settings.http
    if http.port == 0:
        http = http.model_copy(update={"port": free_port(http.host)})
    elif port_taken(http.host, http.port):
        raise Conflict(
            f"port {http.port} is taken by {holder_of(http.port)}",
            code="port_taken",
            hint="Stop it, or start with `heliostat up --port auto` (or `--port N`).",
        )
    ray = settings.ray.model_copy(
        update={
            "port": settings.ray.port or free_port(),
            "dashboard_port": settings.ray.dashboard_port or free_port(),
        }
    )
    return settings.model_copy(update={"http": http, "ray": ray, "data_dir": settings.data_dir.absolute()})


def public_url(settings: Settings) -> str:
    host = "127.0.0.1" if settings.http.host == "0.0.0.0" else settings.http.host
    return settings.http.public_url or f"http://{host}:{settings.http.port}"


def resolved_file(data_dir: Path) -> Path:
    return data_dir / "run" / "settings.json"


def state_file(data_dir: Path) -> Path:
    return data_dir / "run" / "supervisor.json"


def write_resolved(settings: Settings) -> None:
    """0600: it may hold the database's password."""
    replace_text(resolved_file(settings.data_dir), settings.model_dump_json())


def read_state(data_dir: Path) -> dict[str, object] | None:
    try:
        state: dict[str, object] = json.loads(state_file(data_dir).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state


def replace_text(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.touch(mode=0o600)
    aside.write_text(text)
    aside.replace(file)


def answers(url: str, *, any_status: bool = False) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3):
            return True
    except urllib.error.HTTPError:
        return any_status
    except (OSError, ValueError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = load_settings(arguments.config)
    if arguments.data_dir is not None:
        settings = settings.model_copy(update={"data_dir": arguments.data_dir})
    if arguments.port is not None:
        settings = settings.model_copy(update={"http": settings.http.model_copy(update={"port": arguments.port})})
    supervisor = Supervisor(settings)
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, supervisor.stop)  # the terminal was closed
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
