"""What a sandbox is made of: who runs in it, what it sees, how much it may take. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

GIB = 1024**3
HOME = Path("/tmp/home")
WORK = Path("/tmp/work")
"""Inside: on the sandbox's own tmpfs, gone with it."""


class Isolation(StrEnum):
    """What an operator asks for. PREFERRED: as much as the host can do, told where that is nothing."""

    REQUIRED = "required"
    PREFERRED = "preferred"
    OFF = "off"


class Mode(StrEnum):
    """How a sandbox is made on this host. ROOT: by a root platform, each tenant as its own user, no user namespace.
    USERNS: by anybody else, in a user namespace; all tenants are the platform's user."""

    ROOT = "root"
    USERNS = "userns"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one sandbox. Processes, and threads, are counted by user id: a tenant's sandboxes on one node share that limit."""

    tmp_bytes: int = 4 * GIB
    shm_bytes: int = 2 * GIB
    file_bytes: int = 256 * GIB
    """Of one file that it writes."""
    processes: int = 4096
    open_files: int = 4096


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Places keep their paths inside. What is not named here is not there, apart from the system's programs and libraries.

    `uid`: the tenant's own user and group id (Mode.ROOT). `network`: the host's; else loopback alone. `devices`: of the
    host's /dev, by path."""

    uid: int
    python: Path
    read_only: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    """Folders; they must belong to `uid`."""
    folders: tuple[Path, ...] = field(default=(HOME, WORK))
    """Made empty, below /tmp, parents first; all may write there."""
    work: Path = WORK
    network: bool = False
    devices: tuple[Path, ...] = ()
    limits: Limits = Limits()
