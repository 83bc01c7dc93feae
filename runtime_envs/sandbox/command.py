"""The command line that makes a sandbox: bubblewrap around setpriv and prlimit. Pure but for looking at which of the
system's folders exist; `process` runs it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime_envs.sandbox.interpreter import folders_of
from runtime_envs.sandbox.spec import Mode, Sandbox

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Programs and libraries; where /bin is a link into /usr, it is one inside too."""
CONFIGURATION = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts", "/etc/ssl/certs")
NAMES = ("/etc/resolv.conf",)
"""For sandboxes that share the host's network."""
PROCESSORS = ("/sys/devices/system/cpu", "/sys/devices/system/node")
BUSES = ("/sys/bus", "/sys/class", "/sys/devices", "/sys/module")
"""With GPUs: where their libraries read how cards are joined."""
OOM_SCORE = 900
"""Of 1000, which is "first"."""
UNSHARED = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")


@dataclass(frozen=True)
class Given:
    """What the host gives: its programs by name, with absolute paths (a tenant's folder comes first on PATH, and some of
    them still run as root), and descriptors to read small files (by path) and the system call filter from."""

    programs: Mapping[str, str]
    files: Mapping[str, int]
    seccomp_fd: int | None


def command_line(sandbox: Sandbox, mode: Mode, given: Given) -> list[str]:
    """To be followed by the program, with its absolute path."""
    return [
        given.programs["bwrap"],
        *UNSHARED,
        *(() if sandbox.network else ("--unshare-net",)),
        # As root without a user namespace: inside one, root would be root to the host's own /proc/sys.
        *(("--unshare-user", "--disable-userns") if mode is Mode.USERNS else ()),
        *("--die-with-parent", "--new-session", "--hostname", "job"),
        *(() if given.seccomp_fd is None else ("--seccomp", str(given.seccomp_fd))),
        *_system(sandbox, given),
        *_devices(sandbox),
        *_own(sandbox),
        # Their roots are tmpfs without a size.
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", str(sandbox.work), "--"),
        *(_give_up_root(given, sandbox.uid) if mode is Mode.ROOT else ()),
        *_limits(given, sandbox),
    ]


def _system(sandbox: Sandbox, given: Given) -> list[str]:
    named = (*CONFIGURATION, *(NAMES if sandbox.network else ()))
    shared = [Path(name) for name in named if os.access(name, os.F_OK)]
    return [
        *(word for name in SYSTEM if os.access(name, os.F_OK) for word in _as_it_is(Path(name))),
        *_parents([Path("/etc/passwd"), Path("/var/tmp"), *shared]),
        *_bound("--ro-bind", shared),
        *(word for path, fd in given.files.items() for word in ("--perms", "0644", "--ro-bind-data", str(fd), path)),
        *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"),
    ]


def _as_it_is(folder: Path) -> tuple[str, ...]:
    if folder.is_symlink():
        return ("--symlink", str(folder.readlink()), str(folder))
    return ("--ro-bind", str(folder), str(folder))


def _devices(sandbox: Sandbox) -> list[str]:
    named = BUSES if sandbox.devices else PROCESSORS
    seen = [Path(name) for name in named if os.access(name, os.F_OK)]
    limits = sandbox.limits
    return [
        *("--dev", "/dev", "--perms", "1777", "--size", str(limits.shm_bytes), "--tmpfs", "/dev/shm"),
        *_bound("--dev-bind", sandbox.devices),
        *_parents(seen),
        *_bound("--ro-bind", seen),
    ]


def _own(sandbox: Sandbox) -> list[str]:
    read_only = [*folders_of(sandbox.python), *sandbox.read_only]
    places = [place for place in read_only if not place.is_relative_to("/usr")]
    return [
        *("--perms", "1777", "--size", str(sandbox.limits.tmp_bytes), "--tmpfs", "/tmp"),
        *("--symlink", "/tmp", "/var/tmp"),
        *_parents([*places, *sandbox.writable]),
        *(word for folder in sandbox.folders for word in ("--perms", "1777", "--dir", str(folder))),
        *_bound("--ro-bind", places),
        *_bound("--bind", sandbox.writable),
    ]


def _bound(option: str, places: Iterable[Path]) -> list[str]:
    return [word for place in dict.fromkeys(places) for word in (option, str(place), str(place))]


def _parents(places: Iterable[Path]) -> list[str]:
    """bubblewrap would make them for their owner alone, who is root."""
    above = {parent for place in places for parent in place.parents} - {Path("/"), Path("/tmp")}
    return [word for parent in sorted(above) for word in ("--perms", "0755", "--dir", str(parent))]


def _give_up_root(given: Given, uid: int) -> tuple[str, ...]:
    user = ("--reuid", str(uid), "--regid", str(uid), "--clear-groups")
    return (given.programs["setpriv"], *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--")


def _limits(given: Given, sandbox: Sandbox) -> tuple[str, ...]:
    limits = sandbox.limits
    sizes = (f"--nofile={limits.open_files}", f"--nproc={limits.processes}", f"--fsize={limits.file_bytes}")
    # When the machine's memory is gone, the kernel should end this and not the platform.
    patience = (given.programs["choom"], "-n", str(OOM_SCORE), "--")
    return (*patience, given.programs["prlimit"], *sizes, "--core=0", "--")
