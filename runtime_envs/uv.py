"""Runs the `uv` binary in a clean environment. What it is asked for is decided in `pip` and `materialize`."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uv import find_uv_bin

from runtime_envs.errors import INDEX_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex

INHERITED = frozenset(
    ("HOME", "PATH", "LANG", "LC_ALL", "TMPDIR", "NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_CACHE_HOME")
) | frozenset(name for proxy in ("http", "https", "all", "no") for name in (f"{proxy}_proxy", f"{proxy}_proxy".upper()))
SETTINGS = {
    "UV_NO_CONFIG": "1",
    "UV_NO_PROGRESS": "1",
    "UV_PYTHON_DOWNLOADS": "never",
    # As pip does: the best version over all indexes, not the first index that has the name.
    "UV_INDEX_STRATEGY": "unsafe-best-match",
}
TIMEOUT_S = 900.0
READABLE_UMASK = 0o022
"""Prefixes are read by other users (the tenants' uids), whatever the umask of the service is."""


@dataclass(frozen=True)
class UvResult:
    returncode: int
    message: str
    """What uv says, as plain sentences, without passwords and without paths of the scratch folder."""


def run_uv(arguments: Sequence[str], index: PipIndex, *, scratch: Path, keep_fd: int | None = None) -> UvResult:
    """`keep_fd` is handed down, so that a lock on it lives as long as uv does, even when this process is killed."""
    hosts = [part for host in index.trusted_hosts for part in ("--allow-insecure-host", host)]
    try:
        done = subprocess.run(
            [find_uv_bin(), *arguments, *hosts, "--color", "never", "--quiet"],
            env=clean_environment(os.environ, index),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            pass_fds=() if keep_fd is None else (keep_fd,),
            umask=READABLE_UMASK,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(
            INDEX_FAILED, f"The package index did not deliver within {TIMEOUT_S:.0f} s.", hint="Try again later.",
            fixable_by="operator",
        ) from None  # fmt: skip
    return UvResult(done.returncode, _plain(done.stderr, scratch))


def clean_environment(environ: Mapping[str, str], index: PipIndex) -> dict[str, str]:
    """No UV_* or VIRTUAL_ENV of the caller: the answer depends on the file, the base and the index only."""
    inherited = {name: value for name, value in environ.items() if name in INHERITED}
    certificate = {"SSL_CERT_FILE": index.cert} if index.cert else {}
    return {**inherited, **SETTINGS, **certificate}


def drop_unused(cache: Path) -> None:
    """Unpacked wheels of which no environment holds a file: `archive-v0/<id>/`, and first what leads there from
    `wheels-v8/…/<version>-<tags>` (a link, with files of that name beside it). Not while uv runs."""
    unused = {archive for archive in cache.glob("archive-v*/*") if not _has_linked_file(archive)}
    for pointer in cache.glob("wheels-v*/**/*"):
        if pointer.is_symlink() and (
            pointer.resolve() in unused or not pointer.exists()
        ):  # uv fails on one into nothing
            for one in pointer.parent.glob(f"{glob.escape(pointer.name)}*"):
                one.unlink()
    for archive in unused:
        shutil.rmtree(archive)


def _has_linked_file(folder: Path) -> bool:
    """A file with a second name."""
    files = (os.lstat(f"{parent}/{name}") for parent, _, names in os.walk(folder) for name in names)
    return any(status.st_nlink > 1 for status in files)


def _plain(stderr: str, scratch: Path) -> str:
    text = re.sub(r"[×╰─▶│├┬·]", " ", stderr).replace(str(scratch), "")
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    return re.sub(r"\s+", " ", text).strip()
