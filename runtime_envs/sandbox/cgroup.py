"""A control group of its own for each sandbox: the kernel keeps its memory and its number of processes within limits. Version 2
or 1, where this platform may make groups below its own. Standard library alone: the keeper of a child imports it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

OURS = "heliostat"
"""The folder of all our groups, below the group that the platform runs in."""
LEAF = "heliostat-platform"
"""Version 2: beside it, for the platform itself. A group whose groups have limits may have no processes."""
NEEDED = frozenset({"memory", "pids"})
END_S, LOOK_S = 5.0, 0.005
"""For what was killed to be gone, its memory with it."""
TRIES = 10
"""The last of another owner's groups may take the folder of all along at any moment."""
NEAR_BYTES = 4 << 20
"""Memory is charged in batches: who is refused one may be this far below the limit."""


@dataclass(frozen=True)
class Group:
    """`folders`: one for each hierarchy, the one with the memory first. Without any it is no group: it limits nothing."""

    version: int = 1
    folders: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """To be put before a command: joins, then becomes it. So nothing of it ever runs outside."""
        joins = [f"echo 0 > {shlex.quote(folder)}/cgroup.procs" for folder in self.folders]
        return ["/bin/sh", "-ec", "; ".join([*joins, 'exec "$@"']), "sh"] if joins else []

    def overran(self) -> bool:
        """Whether the kernel killed somebody in it because of this limit. When all of the machine's memory is gone, that
        counts as a kill too, and is nobody's fault here."""
        if not self.folders:
            return False
        folder = Path(self.folders[0])
        if self.version == 2:
            events = _numbers(folder / "memory.events")
            return events.get("oom", 0) > 0 and events.get("oom_kill", 0) > 0
        killed = _numbers(folder / "memory.oom_control").get("oom_kill", 0) > 0
        most = (_text(folder / f"memory.{name}max_usage_in_bytes") for name in ("", "memsw."))
        limit = int(_text(folder / "memory.limit_in_bytes") or 0)
        return killed and max(int(used or 0) for used in most) >= limit - NEAR_BYTES

    def remove(self) -> None:
        """Kills what is in it. May be repeated. What outlives that stays, for the next sweep."""
        deadline = time.monotonic() + END_S
        while [folder for folder in self.folders if not _removed(Path(folder))]:
            if time.monotonic() > deadline:
                return
            time.sleep(LOOK_S)
        for folder in self.folders:
            with suppress(OSError):  # others have groups there
                Path(folder).parent.rmdir()


@dataclass(frozen=True)
class Plan:
    """A group that is still to be made, by the process that starts what runs in it: a sandbox dies with that, so that the
    groups of dead owners are left-overs. `parents`: where, one for each hierarchy; without any nothing is made."""

    version: int = 1
    parents: tuple[str, ...] = ()
    label: str = "trial"
    memory_bytes: int = 64 << 20
    processes: int = 16

    def make(self) -> Group:
        """Raises OSError."""
        name = ".".join([f"{self.label}-{os.urandom(3).hex()}", *_owner(os.getpid())])
        group = Group(self.version, tuple(f"{parent}/{OURS}/{name}" for parent in self.parents))
        try:
            for folder in group.folders:
                self._make(Path(folder))
            if group.folders:
                self._limit(Path(group.folders[0]), Path(group.folders[-1]))
        except OSError:
            group.remove()
            raise
        return group

    def _make(self, folder: Path) -> None:
        for _ in range(TRIES):
            with suppress(FileNotFoundError):
                for above in (folder.parent.parent, folder.parent):
                    above.mkdir(exist_ok=True)
                    if self.version == 2:
                        _pass_on(above)
                folder.mkdir()
                return

    def _limit(self, memory: Path, pids: Path) -> None:
        (pids / "pids.max").write_text(str(self.processes))
        most = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        (memory / most).write_text(str(self.memory_bytes))
        with suppress(OSError):  # a kernel that does not count swap
            if self.version == 2:
                (memory / "memory.oom.group").write_text("1")
                (memory / "memory.swap.max").write_text("0")
            else:
                (memory / "memory.memsw.limit_in_bytes").write_text(str(self.memory_bytes))


def planned(label: str, memory_bytes: int, processes: int) -> Plan:
    return replace(here() or Plan(), label=label, memory_bytes=memory_bytes, processes=processes)


@cache
def here() -> Plan | None:
    """Found by trying, once a process: some milliseconds."""
    return found(Path("/proc/self"))


def found(process: Path) -> Plan | None:
    """Where the platform of that process (its folder in /proc) makes its groups, if this one may do so there."""
    return next((plan for plan in possible(process) if _works(plan)), None)


def possible(process: Path) -> list[Plan]:
    """By what the kernel says of a process."""
    belongs, mounts = _text(process / "cgroup"), _text(process / "mountinfo")
    unified, memory, pids = (_folder(name, belongs, mounts) for name in ("", "memory", "pids"))
    plans = []
    if unified and set(_text(unified / "cgroup.controllers").split()) >= NEEDED:
        plans.append(Plan(2, (str(unified.parent if unified.name == LEAF else unified),)))
    if memory and pids:
        plans.append(Plan(1, (str(memory), str(pids))))
    return plans


def settle(process: Path = Path("/proc/self")) -> None:
    """Version 2: moves this process, and with it all that it starts from now on, into a leaf beside the groups to come. Works
    where its group is its alone, and lasts where nobody else minds that: under systemd with Delegate=yes."""
    unified = next((Path(plan.parents[0]) for plan in possible(process) if plan.version == 2), None)
    if unified is None or not (unified / "cgroup.type").exists():  # the root group may have both
        return
    leaf = unified / LEAF
    try:
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text("0")
        _pass_on(unified)
    except OSError:  # others are in it
        with suppress(OSError):
            (unified / "cgroup.procs").write_text("0")
            leaf.rmdir()


def sweep() -> None:
    """Removes the groups of owners that were killed. Those of living ones stay, and those of other process namespaces, where
    numbers mean other processes."""
    plan = here() or Plan()
    left = [one for parent in plan.parents for one in Path(parent, OURS).glob("*.*") if _is_left_over(one.name)]
    Group(plan.version, tuple(map(str, left))).remove()


def _is_left_over(name: str) -> bool:
    _, *owner = name.rsplit(".", 3)
    now = _owner(int(owner[1])) if len(owner) == 3 and owner[1].isdecimal() else owner
    return owner[:1] == now[:1] and owner != now


def _works(plan: Plan) -> bool:
    """To make a group and to move into it are two rights."""
    try:
        group = plan.make()
    except OSError:
        return False
    done = subprocess.run([*group.command, "/bin/sh", "-c", ":"], env={}, capture_output=True, check=False)
    group.remove()
    return done.returncode == 0


def _folder(controller: str, belongs: str, mounts: str) -> Path | None:
    """Of the group that a process belongs to, as it sees it. "": version 2."""
    groups = [line.split(":", 2) for line in belongs.splitlines()]
    own = next((path for _, names, path in groups if controller in names.split(",")), None)
    for line in mounts.splitlines():
        place, _, what = line.partition(" - ")
        root, point = place.split()[3:5]
        kind, _, options = what.split(" ", 2)
        suits = controller in options.split(",") if kind == "cgroup" else kind == "cgroup2" and not controller
        if own and suits and Path(own).is_relative_to(root):
            return Path(point) / Path(own).relative_to(root)
    return None


def _pass_on(folder: Path) -> None:
    """Version 2: the groups below it may have limits."""
    control = folder / "cgroup.subtree_control"
    if not set(control.read_text().split()) >= NEEDED:
        control.write_text(" ".join(f"+{name}" for name in sorted(NEEDED)))


def _removed(folder: Path) -> bool:
    try:
        _kill(folder)
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # what was killed is not gone yet
        return False
    return True


def _kill(folder: Path) -> None:
    if (everybody := folder / "cgroup.kill").exists():  # version 2, since Linux 5.14
        everybody.write_text("1")
        return
    for pid in _pids(folder):
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if pid in _pids(folder):  # its number may have come to mean another process
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)


def _pids(folder: Path) -> list[int]:
    """0 is somebody whom this process namespace does not know."""
    return [int(pid) for pid in (folder / "cgroup.procs").read_text().split() if pid != "0"]


def _numbers(file: Path) -> dict[str, int]:
    return {name: int(number) for name, number in (line.split() for line in _text(file).splitlines())}


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text()
    return ""


def _owner(pid: int) -> list[str]:
    """Its namespace, its number, and when it started, which makes the number mean one process; "" if it is dead."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    state, *fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["Z"]
    return [str(namespace), str(pid), "" if state == "Z" else fields[18]]
