"""`env run`: a command in an environment, on this machine, in the sandbox that trainings run in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.command import command
from app.cli.commands.service import Place, settings_of
from app.cli.errors import HostProblem
from app.cli.session import Session
from app.settings import Settings
from cluster.detect import CPU_SHARE, machine_memory_gb
from cluster.ports import PreparedEnvironment
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.sandbox.cgroup import planned
from runtime_envs.sandbox.host import ability, needed
from runtime_envs.sandbox.process import exit_code, prepared
from runtime_envs.sandbox.spec import GIB, HOME, Isolation, Mode, Sandbox
from runtime_envs.usage import using

NOBODY = 65533
"""No tenant's user: what runs here belongs to no job."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/etc", "/proc", "/sys", "/dev")


def register(app: typer.Typer) -> None:
    command(app, "run")(run)


def run(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="NAME", help="Name, name@version or id.")],
    words: Annotated[list[str], typer.Argument(metavar="CMD…", help="After `--`, for instance: -- python -V")],
    place: Place,
) -> None:
    """Runs a command in an environment, on this machine. It sees the folder where you stand (as root: what others may read
    of it), writes only below /tmp, and has no network."""
    settings = settings_of(place)
    environment = session.client().get(f"/environments/{ref}")
    session.out.note(f"preparing {environment['ref']} …")
    made = _materialized(settings, environment["lock"])
    with using(settings.node_root, made.fingerprint):
        code = in_sandbox(settings, made.python, words)
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def _materialized(settings: Settings, lock: dict[str, Any]) -> PreparedEnvironment:
    from app.wiring.environments import NodeEnvironments, node_environments  # other commands do without the solver

    return NodeEnvironments(node_environments(settings)).materialize(lock)


def in_sandbox(settings: Settings, python: Path, words: list[str]) -> int:
    """The exit code; negative: the signal. Raises `HostProblem` where isolation is required and impossible, and for a command
    that takes too much memory."""
    wanted = Isolation(settings.isolation)
    try:
        mode = needed(wanted)
    except EnvironmentProblem as problem:
        raise HostProblem(problem.message, code=problem.code, hint=problem.hint) from problem
    path = f"{python.parent}:/usr/local/bin:/usr/bin:/bin"
    if mode is None:
        if wanted is not Isolation.OFF:
            sys.stderr.write(f"not isolated: {ability().problem}\n")
        return subprocess.run(["/usr/bin/env", *words], env={**os.environ, "PATH": path}, check=False).returncode
    return _in_group(_sandbox(settings, python), mode, ["/usr/bin/env", *words], _variables(path))


def _in_group(sandbox: Sandbox, mode: Mode, words: list[str], variables: dict[str, str]) -> int:
    """What trainings beside GPUs may take of the machine's memory is for it, too."""
    limit = int(machine_memory_gb() * CPU_SHARE * GIB)
    group = planned("env-run", limit, sandbox.limits.processes).make()
    try:
        with prepared(sandbox, mode) as box:
            command = [*group.command, *box.command, *words]
            code = exit_code(subprocess.run(command, env=variables, pass_fds=box.fds, check=False).returncode)
        if code and group.overran():
            raise HostProblem(
                f"the command wanted more memory than it may have here, {limit / GIB:.1f} GiB",
                code="memory_limit_exceeded",
                hint="What is left is for the service and for the jobs on this machine; run it on a larger one.",
            )
        return code
    finally:
        group.remove()


def _sandbox(settings: Settings, python: Path) -> Sandbox:
    """Where the user stands in a folder of the system, or at the top, there is nothing to show."""
    here = Path.cwd()
    shown = here != Path("/") and here != Path("/tmp") and not any(here.is_relative_to(name) for name in SYSTEM)
    return Sandbox(
        uid=NOBODY,
        python=python,
        read_only=(here,) if shown else (),
        work=here if shown else HOME,
        limits=settings.sandbox.limits(),
    )


def _variables(path: str) -> dict[str, str]:
    """Nothing of the caller's own but the terminal's."""
    kept = {name: os.environ[name] for name in ("TERM", "LANG", "COLUMNS", "LINES") if name in os.environ}
    return {**kept, "PATH": path, "HOME": str(HOME), "TMPDIR": "/tmp", "PYTHONNOUSERSITE": "1"}
