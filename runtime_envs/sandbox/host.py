"""What sandboxes this host can make, found by making one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from runtime_envs.errors import EnvironmentProblem
from runtime_envs.sandbox import seccomp
from runtime_envs.sandbox.process import prepared
from runtime_envs.sandbox.spec import Isolation, Mode, Sandbox
from runtime_envs.sandbox.tools import missing_packages

ISOLATION_UNAVAILABLE = "isolation_unavailable"
TRIAL_S = 15.0
_TRIAL_UID = 65533


@dataclass(frozen=True)
class Ability:
    """`mode` None: no sandbox here, because of `problem`; `remedy` says what to do. `weaker`: what a root platform with all
    parts installed has and this one lacks."""

    mode: Mode | None
    problem: str = ""
    remedy: str = ""
    weaker: tuple[str, ...] = ()


@cache
def ability() -> Ability:
    """Tried once a process: the host's tools and rules do not change under it (some ten milliseconds)."""
    if packages := missing_packages():
        return Ability(
            None, f"{', '.join(packages)} not installed", f"apt install {' '.join(packages)} (or dnf, pacman)"
        )
    mode = Mode.ROOT if os.geteuid() == 0 else Mode.USERNS
    if mode is Mode.ROOT and seccomp.program() is None:
        return Ability(None, "libseccomp not installed: a tenant could make user namespaces", "apt install libseccomp2")
    if reason := _trial(mode):
        return Ability(None, f"bubblewrap cannot make a sandbox: {reason}", _remedy(mode))
    return Ability(mode, weaker=_weaker(mode))


def needed(isolation: Isolation) -> Mode | None:
    """How to make sandboxes here; None: run without. Raises EnvironmentProblem where one is required and cannot be made."""
    if isolation is Isolation.OFF:
        return None
    found = ability()
    if found.mode is None and isolation is Isolation.REQUIRED:
        raise EnvironmentProblem(
            ISOLATION_UNAVAILABLE, f"Isolation is required, and this node cannot isolate: {found.problem}.",
            hint=f"{found.remedy}. `heliostat doctor` on the node tells more.", fixable_by="operator",
        )  # fmt: skip
    return found.mode


def _trial(mode: Mode) -> str:
    """Why it does not work; empty: it does."""
    try:
        with prepared(Sandbox(uid=_TRIAL_UID, python=Path(sys.executable)), mode) as box:
            done = subprocess.run(
                [*box.command, "/bin/true"],
                env={},
                pass_fds=box.fds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TRIAL_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return f"no answer in {TRIAL_S:.0f} s"
    return "" if done.returncode == 0 else done.stderr.strip()[:300] or f"exit status {done.returncode}"


def _remedy(mode: Mode) -> str:
    if mode is Mode.ROOT:
        return "give the container CAP_SYS_ADMIN and an unmasked /proc, or run Heliostat on the host"
    return (
        "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000 "
        "kernel.apparmor_restrict_unprivileged_userns=0"
    )


def _weaker(mode: Mode) -> tuple[str, ...]:
    if mode is Mode.ROOT:
        return ()
    shared = (
        f"all tenants run as user {os.getuid()}: namespaces alone stand between them, and they share its process limit"
    )
    return (shared,) if seccomp.program() is not None else (shared, "no system call is refused: libseccomp2 is missing")
