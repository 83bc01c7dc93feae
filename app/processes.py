"""Operating-system processes of one Heliostat: free ports, starting marked processes, ending all that carry the mark."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import Unavailable

EXEC_S = 0.05
"""For a moment while it starts a program, a process shows no environment: one empty look is not enough."""

PORTS = range(20_000, 30_000)
INSTANCE_VARIABLE = "HELIOSTAT_INSTANCE"
"""Every process that a supervisor starts, and all that those start, carry the instance's id in this variable."""
_AGAIN = "HELIOSTAT_SAME_INSTANCE"
"""And in this one: Ray's agents write their titles over the first 63 bytes of what /proc shows as their environment, and
which variables lie there is chance. Of the two at least one keeps its end."""


def mark(instance: str) -> dict[str, str]:
    """The variables that make a process, and all that it starts, one of this instance."""
    return {INSTANCE_VARIABLE: instance, _AGAIN: instance}


def free_port(host: str = "127.0.0.1") -> int:
    """Below the range from which the kernel gives out ports: one that it finds free stays free until it is bound."""
    for port in random.sample(PORTS, 100):
        if not port_taken(host, port):
            return port
    raise Unavailable(
        f"no free port between {PORTS.start} and {PORTS.stop}",
        code="no_free_port",
        hint="See `ss -ltn`; name ports in the settings.",
    )


def port_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def holder_of(port: int) -> str:
    """Who listens on a port, as text for an error message."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return "a process that this user may not see"
    for connection in connections:
        address = tuple(connection.laddr)  # empty, or (host, port)
        if connection.status == psutil.CONN_LISTEN and address[1:] == (port,) and connection.pid:
            try:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.NoSuchProcess:
                continue
    return "an unknown process"


@dataclass
class Started:
    """A process that the supervisor started, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def end_all(started: list[Started], timeout_s: float) -> None:
    """SIGTERM to all at once, SIGKILL to those that are left after the timeout."""
    living = [one for one in started if one.alive]
    for one in living:
        one.process.terminate()
    deadline = time.monotonic() + timeout_s
    for one in living:
        try:
            one.process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def start(name: str, command: list[str], environment: dict[str, str], log: Path) -> Started:
    """A process in a session of its own (a Ctrl-C in the terminal reaches the supervisor only)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(name, process, log)


def marked(instance: str) -> Iterator[psutil.Process]:
    """Every process of this instance but this one."""
    needle = f"_INSTANCE={instance}".encode()
    for pid in psutil.pids():
        if pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if any(variable.endswith(needle) for variable in environment.split(b"\0")):
            try:
                yield psutil.Process(pid)
            except psutil.NoSuchProcess:
                continue


def end_marked(instance: str, sessions: Iterable[int] = (), timeout_s: float = 10.0) -> int:
    """SIGKILL to every process of the instance until none is left: all of them are made to be killed. How many there were.

    Those too in the `sessions` that it leads or has led: a program may rewrite the memory that /proc shows as its environment,
    as Ray's agents do with their titles."""
    ended: set[int] = set()
    led = set(sessions)
    deadline = time.monotonic() + timeout_s
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < deadline:
        left = list(marked(instance))
        led |= {process.pid for process in left if _session(process.pid) == process.pid}
        left += [process for process in in_sessions(led) if process not in left]
        ended.update(process.pid for process in left)
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, 1.0)
        empty_looks = 0 if left else empty_looks + 1
        time.sleep(0 if left else EXEC_S)
    return len(ended)


def in_sessions(led: set[int]) -> list[psutil.Process]:
    """Living processes of these sessions but this one; a session outlives its leader."""
    found = []
    for pid in psutil.pids():
        if pid != os.getpid() and _session(pid) in led:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def remove_folder(folder: Path, timeout_s: float = 5.0) -> None:
    """Again while a process that is just being killed still writes into it."""
    deadline = time.monotonic() + timeout_s
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1 if folder.exists() else 0)


def last_lines(file: Path, count: int = 15) -> str:
    if not file.is_file():
        return ""
    return "\n".join(file.read_text(errors="replace").splitlines()[-count:])
