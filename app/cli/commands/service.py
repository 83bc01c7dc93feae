"""`up`, `down`, `status`: the whole service on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Group, RenderableType

from app.cli import local_service
from app.cli.command import command
from app.cli.contexts import OPERATOR, Context, Contexts, load_contexts, save_contexts
from app.cli.errors import UNREACHABLE, HostProblem
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago
from app.processes import holder_of, last_lines, port_taken
from app.settings import Settings, load_settings
from cluster.errors import InvalidRequest

DEFAULT = "default"
LOCAL = (DEFAULT, OPERATOR)
KILLED = "ended the processes of a service that was killed"


@dataclass(frozen=True)
class Place:
    data_dir: Annotated[Path | None, typer.Option(help="Default: ~/.heliostat.")] = None
    config: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Settings as TOML.")] = None


@dataclass(frozen=True)
class UpOptions:
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is ready.")] = False
    port: Annotated[str | None, typer.Option(help="A number, or auto for any free one.")] = None


def register(app: typer.Typer) -> None:
    command(app, "up")(up)
    command(app, "down")(down)
    command(app, "status")(status)


def up(session: Session, options: UpOptions, place: Place) -> None:
    """Starts everything on this machine; Ctrl-C stops it. Data stays in the data folder."""
    settings = settings_of(place)
    data_dir = settings.data_dir
    state = local_service.read_state(data_dir)
    running = local_service.supervisor_of(data_dir, state)
    if running is not None:
        _welcome(
            session, data_dir, local_service.wait_ready(data_dir, running.is_running, session.out.note), already=True
        )
        return
    if local_service.end_left_behind(data_dir, state):
        session.out.note(KILLED)
    launch = local_service.Launch(data_dir, place.config and place.config.resolve(), _port(options.port))
    _check_port(settings.http.host, settings.http.port if launch.port is None else launch.port)
    local_service.check_folder(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _run(session, launch, detach=options.detach)


def settings_of(place: Place) -> Settings:
    """Raises `InvalidRequest` with what the settings say is wrong."""
    try:
        settings = load_settings(place.config.resolve() if place.config else None)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InvalidRequest(
            f"the settings do not hold: {wrong}", code="bad_settings", hint="mend --config or HELIOSTAT_*"
        ) from error
    data_dir = (place.data_dir or settings.data_dir).expanduser().resolve()
    return settings.model_copy(update={"data_dir": data_dir})


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "auto":
        return 0
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise InvalidRequest(f"--port {text!r} is neither a port nor auto", param="--port")
    return int(text)


def _check_port(host: str, port: int) -> None:
    if port and port_taken(host, port):
        raise HostProblem(
            f"port {port} is taken by {holder_of(port)}",
            code="port_taken",
            hint="stop it, or start with `heliostat up --port auto` (or `--port N`)",
        )


def _run(session: Session, launch: local_service.Launch, *, detach: bool) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    process = local_service.start(launch, session.environ)
    try:
        state = local_service.wait_ready(launch.data_dir, lambda: process.poll() is None, session.out.note)
        _welcome(session, launch.data_dir, state, already=False)
        if detach:
            process.returncode = 0  # left running on purpose: Popen would warn of a child that nobody waited for
            return
        session.out.note("Ctrl-C stops it")
        process.wait()
    except HostProblem:
        _end(process)
        raise
    except KeyboardInterrupt:
        session.out.note("\nstopping …")
        _end(process)
        return
    lines = last_lines(local_service.log_file(launch.data_dir), local_service.LOG_LINES)
    if process.returncode:
        raise HostProblem(f"the service ended with code {process.returncode}:\n{lines}", code="service_ended")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(local_service.STOP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise HostProblem(f"the service (process {process.pid}) does not stop", code="stop_timed_out") from error


def _welcome(session: Session, data_dir: Path, state: dict[str, Any], *, already: bool) -> None:
    url, keys = state["url"], data_dir / "keys"
    saved = with_local(load_contexts(), url, keys)
    file = save_contexts(saved)
    token = keys / f"{DEFAULT}.token"
    data = {
        **state,
        "data_dir": str(data_dir),
        "already_running": already,
        "contexts": str(file),
        "token_file": str(token),
    }
    session.out.show(data, lambda: _greeting(data, saved))


def with_local(saved: Contexts, url: str, keys: Path) -> Contexts:
    """Contexts `default` and `operator` for a service on this machine. A current context of another service stays."""
    for name in LOCAL:
        token_file = keys / f"{name}.token"
        if token_file.is_file():
            saved = saved.with_context(name, Context(url, None, str(token_file)))
    if saved.current in (None, *LOCAL) and DEFAULT in saved.contexts:
        saved = Contexts(saved.current or DEFAULT, saved.contexts)
    return saved


def _greeting(data: dict[str, Any], saved: Contexts) -> RenderableType:
    url, token = data["url"], data["token_file"]
    context = "" if saved.current == DEFAULT else f" --context {DEFAULT}"
    program = "heliostat" if sys.prefix == sys.base_prefix else str(Path(sys.executable).with_name("heliostat"))
    lines = [
        f"Heliostat {'already runs' if data['already_running'] else 'is up'}: {url}   (API: {url}/docs, Ray: {data['dashboard_url']})",
        "",
        f"{program} whoami{context}",
        f'curl -H "Authorization: Bearer $(cat {token})" {url}/api/v1/me',
        f'client = OpenAI(base_url="{url}/v1", api_key=open("{token}").read().strip())',
    ]
    return "\n".join(lines)


def down(
    session: Session,
    place: Place,
    purge: Annotated[bool, typer.Option("--purge", help="Remove all data, too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Stops the service on this machine. Data stays, unless --purge."""
    data_dir = settings_of(place).data_dir
    if purge and not yes:
        _confirm(session, data_dir)
    state = local_service.read_state(data_dir)
    process = local_service.supervisor_of(data_dir, state)
    if process is not None:
        session.out.note("stopping …")
        local_service.stop(process)
    elif local_service.end_left_behind(data_dir, state):
        session.out.note(KILLED)
    if purge and data_dir.exists():
        local_service.purge(data_dir)
        _forget(data_dir)
    data = {"stopped": process is not None, "purged": purge, "data_dir": str(data_dir)}
    session.out.show(data, lambda: _farewell(data))


def _confirm(session: Session, data_dir: Path) -> None:
    if session.out.json or not sys.stdin.isatty():
        raise InvalidRequest("--purge removes all data", param="--purge", hint="add --yes where nobody can be asked")
    typer.confirm(f"Remove {data_dir} with all datasets, models and jobs?", abort=True)


def _forget(data_dir: Path) -> None:
    """Contexts whose token went with the data folder."""
    saved = load_contexts()
    gone = [
        name for name, one in saved.contexts.items() if one.token_file and Path(one.token_file).is_relative_to(data_dir)
    ]
    for name in gone:
        saved = saved.without(name)
    if gone:
        save_contexts(saved)


def _farewell(data: dict[str, Any]) -> str:
    stopped = "stopped" if data["stopped"] else "it was not running"
    return f"{stopped}; {data['data_dir']} is {'removed' if data['purged'] else 'kept'}"


def status(session: Session, place: Place) -> None:
    """Each part of the service on this machine. Exit: 0 ready, 3 not."""
    data_dir = settings_of(place).data_dir
    state = local_service.read_state(data_dir)
    process = local_service.supervisor_of(data_dir, state)
    running = process is not None
    data = {"running": running, "data_dir": str(data_dir), **(state or {"ready": False})}
    data["ready"] = bool(running and data["ready"])
    session.out.show(data, lambda: _status(data))
    if not data["ready"]:
        raise typer.Exit(UNREACHABLE)


def _status(data: dict[str, Any]) -> RenderableType:
    if not data["running"]:
        error = (data.get("error") or {}).get("message")
        return f"not running ({data['data_dir']}){': ' + error if error else ''}"
    head = pairs(
        [
            ("url", data["url"]),
            ("dashboard", data.get("dashboard_url")),
            ("phase", data.get("phase")),
            ("up since", ago(data.get("started_at"), time.time())),
            ("data", data["data_dir"]),
        ]
    )
    rows = [("supervisor", "running", data["pid"])]
    rows += [(name, part.get("state"), part.get("pid")) for name, part in data.get("components", {}).items()]
    return Group(head, table(("part", "state", "process"), rows))
