"""The parent of a training child that was started before its worker: holds the conversation until the worker comes for it, then
only the child's end. A small process of its own (standard library alone): an agent that dies takes no training along, and
what nobody comes for is ended. `python -S -m trainers.run.keeper`, with the agent's socket as standard input."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime_envs.sandbox.cgroup import Group, Plan
from trainers.protocol import FD_VARIABLE, Channel, Message, pair

SOCKET = "worker"
NICE = 10
"""A tenth of a running job's share: at 19 imports take minutes where all cores train."""
WAIT_S = 60.0
"""For the agent to say that the job may still come."""
WORKER_S = 300.0
"""For the worker, once the child was told to start: more than Ray has for starting it."""
FORK_S = 0.2
"""More than the making of a process takes, with namespaces of its own too."""
_BACKLOG = 1


@dataclass(frozen=True)
class Kept:
    """What the agent says first. `command` and `environment` of the child, which inherits `fds`; `folder`: where the worker
    finds the socket, for this user alone; `sandboxed` and `note` for the worker. `waits`: at a low priority until it is
    told to start. `usual`: its priority then. `group`: the fields of a `Plan`."""

    command: list[str]
    environment: dict[str, str]
    cwd: str | None
    fds: list[int]
    folder: str
    sandboxed: bool
    note: str
    usual: int
    waits: bool = False
    group: dict[str, Any] = field(default_factory=dict)


class Keeper:
    def __init__(self, kept: Kept, agent: Channel) -> None:
        self._kept = kept
        self._agent = agent
        self._group = Group()
        self._failure: Message | None = None
        self._deadline = 0.0

    def run(self) -> None:
        """Returns when the child has ended, however that came."""
        ours, theirs = pair()
        reading, writing = os.pipe()
        with listening(Path(self._kept.folder)) as door, self._grouped():
            with _at_priority(max(NICE, self._kept.usual) if self._kept.waits else self._kept.usual):
                child = self._start(theirs, writing)
            for fd in (writing, *self._kept.fds):
                os.close(fd)
            theirs.close()
            try:
                self._keep(child, ours, reading, door)
            finally:
                end_group(child.pid)
                child.wait()

    @contextlib.contextmanager
    def _grouped(self) -> Iterator[None]:
        """The group is this process's to make, and dies with it as the sandbox does."""
        self._group = Plan(**self._kept.group).make()
        try:
            yield
        finally:
            self._group.remove()

    def _start(self, theirs: Channel, output: int) -> subprocess.Popen[bytes]:
        kept = self._kept
        return subprocess.Popen(
            [*self._group.command, *kept.command],
            env={**kept.environment, FD_VARIABLE: str(theirs.fileno())},
            cwd=kept.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(theirs.fileno(), *kept.fds),
            start_new_session=True,
        )

    def _keep(self, child: subprocess.Popen[bytes], ours: Channel, reading: int, door: socket.socket) -> None:
        group = asdict(self._group)
        self._agent.send("kept", pid=child.pid, group=group)
        if not self._wait_for_worker(child.pid, ours, door):
            return
        worker, _ = door.accept()
        of_start = {"sandboxed": self._kept.sandboxed, "note": self._kept.note}
        told = {"pid": child.pid, **of_start, "failure": self._failure, "group": group}
        socket.send_fds(worker, [json.dumps(told).encode()], [ours.fileno(), reading])
        ours.close()
        os.close(reading)
        self._agent.close()
        if worker.recv(1):  # it has ended the child, and wants to know how; else the worker itself has ended
            worker.send(str(child.wait()).encode())

    def _wait_for_worker(self, pid: int, ours: Channel, door: socket.socket) -> bool:
        """Whether it is there."""
        poll = select.poll()
        for one in (self._agent, door):
            poll.register(one, select.POLLIN)
        self._deadline = time.monotonic() + WAIT_S
        while (left_s := self._deadline - time.monotonic()) > 0:
            ready = [fd for fd, _ in poll.poll(left_s * 1000)]
            if self._agent.fileno() in ready:  # first: the worker was told of the child after it was told to start
                message = self._agent.receive()
                if message is None or message["type"] == "end":
                    return False
                self._obey(message, pid, ours)
            elif ready:
                return True
        return False

    def _obey(self, message: Message, pid: int, ours: Channel) -> None:
        """`wait`: longer; `start` {config}; `failed` with the fields of that message: what the worker shall say of it."""
        self._deadline = time.monotonic() + (WAIT_S if message["type"] == "wait" else WORKER_S)
        if message["type"] == "failed":
            self._failure = message
            end_group(pid)
        elif message["type"] == "start":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead: the worker finds it so
                ours.send("start", config=message["config"])
            if self._kept.waits:
                set_priority(pid, self._kept.usual)


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[socket.socket]:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with door, _short(folder) as place:
        door.bind(place)
        door.listen(_BACKLOG)
        try:
            yield door
        finally:
            Path(place).unlink(missing_ok=True)


def connected(folder: Path, timeout_s: float) -> socket.socket:
    """To the keeper. Raises OSError when there is none."""
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire.settimeout(timeout_s)
    try:
        with _short(folder) as place:
            wire.connect(place)
    except OSError:
        wire.close()
        raise
    return wire


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """The socket's path, wherever the data folder lies: it may have 107 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def _at_priority(nice: int) -> Iterator[None]:
    """What starts inside has it from its first moment on."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if nice != before:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    yield
    if nice != before:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def set_priority(pid: int, nice: int) -> None:
    """Of a process and all below it, thread by thread, as Linux has it. Twice: what is just being made has its parent's old one,
    and is not to be seen yet."""
    _set_priority(pid, nice)
    time.sleep(FORK_S)
    _set_priority(pid, nice)


def _set_priority(pid: int, nice: int) -> None:
    tasks = [int(task.name) for task in _listed(Path(f"/proc/{pid}/task"))]
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, task, nice)
    for task in tasks:
        for child in _children(pid, task):
            _set_priority(child, nice)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _children(pid: int, task: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def main() -> None:
    agent = Channel.from_fd(0)
    message = agent.receive()
    if message is not None:
        del message["type"]
        Keeper(Kept(**message), agent).run()


if __name__ == "__main__":
    main()
