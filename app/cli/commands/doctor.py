"""`doctor`: what of this machine will get in the way, and what to do about it. Loads no torch: it reads what is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import typer
from rich.console import RenderableType
from rich.text import Text

from app.cli import local_service
from app.cli.command import command
from app.cli.commands.service import Place, settings_of
from app.cli.output import table
from app.cli.session import Session
from app.processes import holder_of, port_taken
from app.settings import Settings
from runtime_envs.sandbox import cgroup
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Mode
from runtime_envs.sandbox.tools import found_programs

MIN_DISK_GB, GOOD_DISK_GB = 5.0, 20.0
MIN_RAM_GB, GOOD_RAM_GB = 3.0, 8.0
MIN_SHM_GB = 1.0
PROBE_S = 15.0
RAY_SOCKET_CHARS = 40
"""Ray puts sockets of up to 107 characters under its scratch folder; its own part takes about 65."""


@dataclass(frozen=True)
class Check:
    """`state`: ok, warn or fail."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    command(app, "doctor")(doctor)


def doctor(session: Session, place: Place) -> None:
    """Checks this machine. Exit: 0 it will do, 1 something must be mended."""
    settings = settings_of(place)
    checks = [check(settings) for check in CHECKS]
    data = {
        "object": "list",
        "ok": all(check.state != "fail" for check in checks),
        "data": [asdict(one) for one in checks],
    }
    session.out.show(data, lambda: drawn(checks))
    if not data["ok"]:
        raise typer.Exit(1)


def drawn(checks: list[Check]) -> RenderableType:
    rows = [(one.state.upper() if one.state != "ok" else "ok", one.name, _told(one)) for one in checks]
    return table(("", "check", "found"), rows) if rows else Text("")


def _told(check: Check) -> str:
    return f"{check.detail}\n→ {check.remedy}" if check.remedy else check.detail


def python(_settings: Settings) -> Check:
    inside = sys.prefix != sys.base_prefix
    told = f"{platform.python_version()} ({sys.executable})"
    remedy = "" if inside else "use a virtual environment: `make install` makes one"
    return Check("python", "ok" if inside else "warn", told, remedy)


def system(_settings: Settings) -> Check:
    if sys.platform != "linux":
        return Check("system", "fail", sys.platform, "Heliostat runs on Linux; use a virtual machine or WSL 2")
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return Check(
            "system", "warn", f"{platform.machine()}, no C compiler", "install gcc: DeepSpeed's own kernels need one"
        )
    return Check("system", "ok", f"Linux {platform.release()}, {platform.machine()}, {compiler}")


def gpu(_settings: Settings) -> Check:
    """An NVIDIA driver and a torch build that agree, or neither."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return Check("gpu", "fail", "torch is not installed", "run `make install`")
    names = nvidia_gpus()
    return judge_gpu(torch, has_cuda_packages(), names)


def judge_gpu(torch: str, cuda: bool, names: list[str] | None) -> Check:
    """`names` None: no driver answers."""
    built = f"torch {torch} ({'CUDA' if cuda else 'CPU'} build)"
    if names and not cuda:
        detail = f"{', '.join(names)}, but {built}"
        return Check("gpu", "fail", detail, "run `make install ACCEL=cuda`; until then jobs train on the CPU")
    if not names and cuda:
        return Check(
            "gpu", "warn", f"{built}, but no GPU answers", "install the NVIDIA driver, or `make install ACCEL=cpu`"
        )
    return Check("gpu", "ok", f"{', '.join(names)}, {built}" if names else f"none, {built}: jobs train on the CPU")


def has_cuda_packages() -> bool:
    """A CUDA build of torch says so in its version, or brings NVIDIA's run-time packages with it."""
    if "+cu" in version("torch"):
        return True
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13"):
        try:
            return bool(version(package))
        except PackageNotFoundError:
            continue
    return False


def nvidia_gpus() -> list[str] | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    done = _probe([command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    return [line.strip() for line in done[1].splitlines() if line.strip()] if done[0] == 0 else None


def _probe(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what it said); 124 when it hangs."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {PROBE_S:.0f} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout or done.stderr


def sandbox(settings: Settings) -> Check:
    """What stands between tenants' code and this machine, by making a sandbox."""
    wanted = settings.isolation
    if wanted == "off":
        return Check(
            "sandbox",
            "warn",
            "switched off (isolation: off)",
            "tenants' code runs with your rights: only for your own data",
        )
    found = ability()
    if found.mode is None:
        return Check("sandbox", "fail" if wanted == "required" else "warn", found.problem, found.remedy)
    made = _probe([found_programs()["bwrap"], "--version"])[1].strip()
    told = "each tenant as a user of its own" if found.mode is Mode.ROOT else "in user namespaces"
    return Check("sandbox", "ok", "; ".join([f"{made}, {told}", *found.weaker]))


def memory_limit(settings: Settings) -> Check:
    """Who keeps a job within its memory, by making a group where the service would; only what is isolated gets one."""
    running = local_service.supervisor_of(settings.data_dir, local_service.read_state(settings.data_dir))
    group = cgroup.found(Path(f"/proc/{running.pid if running else 'self'}"))
    if group is not None and settings.isolation != "off" and ability().mode is not None:
        return Check("memory limit", "ok", f"cgroup v{group.version}")
    remedy = "run it as root, or as a service that systemd delegates a group to (docs/operators.md)"
    return Check("memory limit", "warn", "watched once a second", remedy)


def disk(settings: Settings) -> Check:
    free = local_service.disk_free_gb(settings.data_dir)
    detail = f"{free:.0f} GiB free for {settings.data_dir}"
    if free < MIN_DISK_GB:
        return Check(
            "disk", "fail", detail, f"free at least {MIN_DISK_GB:.0f} GiB, or choose another place with --data-dir"
        )
    return Check(
        "disk",
        "warn" if free < GOOD_DISK_GB else "ok",
        detail,
        "models and checkpoints take tens of GiB" if free < GOOD_DISK_GB else "",
    )


def hard_links(settings: Settings) -> Check:
    """Environments and staged models share files by hard link with the cache beside them."""
    existing = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".heliostat-doctor-") as folder:
            source = Path(folder) / "a"
            source.touch()
            (Path(folder) / "b").hardlink_to(source)
    except OSError as error:
        remedy = "choose a data folder on ext4, xfs or btrfs with --data-dir"
        return Check(
            "hard links",
            "warn",
            f"not possible in {existing}: {error.strerror}: every copy takes its full size",
            remedy,
        )
    parts = [settings.data_dir / name for name in ("node", "objects") if (settings.data_dir / name).exists()]
    if any(not local_service.same_filesystem(existing, part) for part in parts):
        return Check(
            "hard links",
            "warn",
            "parts of the data folder lie on other filesystems",
            "keep `node` and `objects` on one",
        )
    return Check("hard links", "ok", f"one filesystem under {existing}")


def port(settings: Settings) -> Check:
    number = settings.http.port
    if number == 0:
        return Check("port", "ok", "any free one")
    if not port_taken(settings.http.host, number):
        return Check("port", "ok", f"{number} is free")
    state = local_service.read_state(settings.data_dir)
    if local_service.supervisor_of(settings.data_dir, state) is not None:
        return Check("port", "ok", f"{number} is held by this Heliostat, which runs")
    return Check("port", "fail", f"{number} is taken by {holder_of(number)}", "stop it, or `heliostat up --port auto`")


def memory(_settings: Settings) -> Check:
    total = psutil.virtual_memory().total / 2**30
    if total < MIN_RAM_GB:
        return Check("memory", "fail", f"{total:.1f} GiB", f"at least {MIN_RAM_GB:.0f} GiB are needed")
    remedy = "only small models will train" if total < GOOD_RAM_GB else ""
    return Check("memory", "warn" if remedy else "ok", f"{total:.1f} GiB, {os.cpu_count()} processors", remedy)


def shared_memory(_settings: Settings) -> Check:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else 0.0
    if free < MIN_SHM_GB:
        remedy = "mount -o remount,size=4G /dev/shm (containers: --shm-size=4g); Ray falls back to slower files"
        return Check("shared memory", "warn", f"{free:.1f} GiB free in {folder}", remedy)
    return Check("shared memory", "ok", f"{free:.1f} GiB free in {folder}")


def scratch(settings: Settings) -> Check:
    place = settings.ray.temp_dir or Path(tempfile.gettempdir())
    if len(str(place)) > RAY_SOCKET_CHARS:
        return Check(
            "ray scratch",
            "fail",
            f"{place} is too long a path for Ray's sockets",
            "set ray.temp_dir to a short one, such as /tmp",
        )
    return Check("ray scratch", "ok", str(place))


CHECKS: tuple[Callable[[Settings], Check], ...] = (
    python,
    system,
    gpu,
    sandbox,
    memory_limit,
    memory,
    shared_memory,
    disk,
    hard_links,
    scratch,
    port,
)
