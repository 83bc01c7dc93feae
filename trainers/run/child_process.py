"""Starts the child: the tenant's Python in a sandbox, on a copy of `trainers` that holds the child's modules only, with an
environment made from nothing; or takes over one that was started before. Ends it, too."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

import trainers
from cluster.errors import HeliostatError, Unavailable
from runtime_envs.sandbox.cgroup import Group, Plan, planned
from runtime_envs.sandbox.process import Prepared, exit_code, prepared
from trainers.config import launcher_of
from trainers.protocol import FD_VARIABLE, MARK_VARIABLE, Channel, pair
from trainers.run.confinement import WRITABLE, Confinement, confinement, memory_share, visible
from trainers.run.keeper import connected, end_group
from trainers.run.parts import WorkerTask

log = logging.getLogger(__name__)

SHIPPED = ("__init__.py", "protocol.py", "config.py", "child")


ADOPT_S = 30.0
"""For a keeper that is there to answer."""


class Process(Protocol):
    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """Until it has ended; its exit code, negative: the signal. Frees its number."""
        ...


@dataclass
class Child:
    """`logs`: the reading end of its output. `note`: what should be known about its isolation. `started`: it was told its
    configuration already. `failure`: why it was ended before this worker came. `overran`, once it has ended: the kernel killed
    some of it at its memory limit."""

    process: Process
    channel: Channel
    logs: int
    sandboxed: bool = False
    note: str = ""
    started: bool = False
    failure: dict[str, Any] | None = None
    group: Group = field(default_factory=Group)
    overran: bool = False

    def end(self, grace_s: float) -> int:
        """Waits for it to leave by itself, then kills what is left of its session; the exit code (negative: the
        signal). Killed before it is reaped: until then its number can mean nobody else. A sandbox dies with the process
        that made it."""
        with contextlib.suppress(ProcessLookupError):  # of a child whose keeper was killed
            _wait(self.process.pid, grace_s)
        self.kill()
        self.overran = self.group.overran()  # a keeper removes the group as soon as it has answered
        code = self.process.wait()
        self.group.remove()
        return exit_code(code) if self.sandboxed else code

    def kill(self) -> None:
        """Only before `end` has returned."""
        end_group(self.process.pid)


def _wait(pid: int, timeout_s: float) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        select.select([pidfd], [], [], timeout_s)
    finally:
        os.close(pidfd)


Spawn = Callable[[WorkerTask], Child]


@dataclass(frozen=True)
class Start:
    """What a child's process is made of, but for the socket that it talks over. `fds`: inherited. `group`: to be made by the
    process that starts it."""

    command: list[str]
    environment: dict[str, str]
    cwd: Path | None
    fds: tuple[int, ...]
    sandboxed: bool
    note: str
    group: Plan


@contextmanager
def starting(task: WorkerTask, command: Sequence[str] | None = None) -> Iterator[Start]:
    """Makes the attempt's folder ready for one start, inside of this context. `command`: the arguments of the tenant's
    Python; None: the launcher of the task's method. Raises `Unavailable` when this node cannot isolate it."""
    scratch = Path(task.scratch)
    code = ship_code(scratch / "code")
    command = command or ("-m", launcher_of(task.config.get("method", "")))
    confined = confinement(task)
    variables = {**environment(task, confined), "PYTHONPATH": str(code)}
    cwd = None if confined.sandbox else _folder(scratch / "work")
    with _around(confined) as box:
        words = [*box.command, task.python, *command]
        yield Start(words, variables, cwd, box.fds, confined.sandbox is not None, confined.note, _group(task, confined))


def _group(task: WorkerTask, confined: Confinement) -> Plan:
    if confined.sandbox is None:
        return Plan()
    return planned(f"{task.job_id}-a{task.attempt}", memory_share(task), confined.sandbox.limits.processes)


def spawn(task: WorkerTask, command: Sequence[str] | None = None) -> Child:
    """To be called from a thread that lives as long as the job: a parent-death signal follows the thread."""
    ours, theirs = pair()
    reading, writing = os.pipe()
    group = Group()
    try:
        with starting(task, command) as start:
            group = start.group.make()
            process = subprocess.Popen(  # it outlives this function
                [*group.command, *start.command],
                env={**start.environment, FD_VARIABLE: str(theirs.fileno())},
                cwd=start.cwd,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=(theirs.fileno(), *start.fds),
                start_new_session=True,
            )
    except (OSError, HeliostatError):
        group.remove()
        ours.close()
        os.close(reading)
        raise
    finally:
        theirs.close()
        os.close(writing)
    return Child(process, ours, reading, start.sandboxed, start.note, group=group)


def adopt_or_spawn(task: WorkerTask) -> Child:
    """The child that was started before this worker was there; a new one where none was, or where it is gone."""
    if task.keeper is not None:
        try:
            return adopt(Path(task.keeper))
        except OSError as error:
            log.info("the child of %s that was started early is gone: %s", task.mark, error)
    return spawn(task)


class KeptProcess:
    """A child whose parent is a keeper."""

    def __init__(self, pid: int, keeper: socket.socket) -> None:
        self.pid = pid
        self._keeper = keeper

    def wait(self) -> int:
        try:
            self._keeper.settimeout(None)
            self._keeper.send(b"?")
            answer = self._keeper.recv(16)
        except OSError:
            answer = b""
        finally:
            self.leave()
        return int(answer) if answer else -signal.SIGKILL  # a sandbox dies with its keeper

    def leave(self) -> None:
        """Its keeper ends it."""
        self._keeper.close()


def adopt(folder: Path) -> Child:
    """Takes a child over from its keeper. Raises OSError."""
    keeper = connected(folder, ADOPT_S)
    try:
        message, fds, _, _ = socket.recv_fds(keeper, 4096, 2)
        if not message:
            raise ConnectionResetError("its keeper left")
    except OSError:
        keeper.close()
        raise
    told = json.loads(message)
    channel, logs = fds
    return Child(
        KeptProcess(told["pid"], keeper),
        Channel.from_fd(channel),
        logs,
        told["sandboxed"],
        told["note"],
        started=True,
        failure=told["failure"],
        group=Group(**told["group"]),
    )


@contextmanager
def _around(confined: Confinement) -> Iterator[Prepared]:
    if confined.sandbox is None or confined.mode is None:
        yield Prepared((), ())
        return
    with prepared(confined.sandbox, confined.mode) as box:
        yield box


def environment(task: WorkerTask, confined: Confinement) -> dict[str, str]:
    """Nothing of the worker's own: it holds the cluster's token and the platform's settings."""
    home, threads = confined.home(task), str(task.threads)
    places = {name: home / name.lower() for name in WRITABLE}
    if confined.sandbox is None:
        for place in places.values():
            _folder(place)
    return {
        **{name: str(place) for name, place in places.items()},
        "PATH": f"{Path(task.python).parent}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **meeting_over(task.address),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible(task, confined),
        MARK_VARIABLE: task.mark,
    }


def meeting_over(address: str | None) -> dict[str, str]:
    """Ranks of one node meet on its loopback, those of several on the interface by which the other nodes reach this one. Raises
    `Unavailable`."""
    if address is None:
        return {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    raise Unavailable(
        f"no network interface of this node has the address {address}, by which other nodes reach it",
        code="node_unavailable",
        hint="Start Ray there with --node-ip-address set to an address of the node's own.",
    )


def ship_code(folder: Path) -> Path:
    """A copy of the child's modules that other users can read; what is put on the child's PYTHONPATH."""
    source, target = Path(trainers.__file__).parent, folder / "trainers"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SHIPPED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, target / name)
    for path in (folder, target, *target.rglob("*")):  # whatever the umask of the worker
        path.chmod(0o755 if path.is_dir() else 0o444)
    return folder


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
