"""Byte code, once for a package on a node: compiled into a folder beside the package cache and hard-linked into every prefix.
Python takes it there too, because size and time of the source are the same file's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime_envs.conda.prefix import Linked
from runtime_envs.materialize import COMPILE_TIMEOUT_S
from runtime_envs.uv import READABLE_UMASK
from runtime_envs.verify import sha256_of, walk

PROCESS = Path(__file__).with_name("compile_process.py")
INDEX, TREE = "index.json", "tree"
FOLDERS_AT_ONCE = 500
"""For one command line."""

Hashes = dict[str, str]
"""Path from the prefix → SHA-256."""


@dataclass(frozen=True)
class Compiler:
    """`python`: of the base, not of the prefix, which holds the tenant's packages. `cache`: for this Python minor."""

    python: Path
    cache: Path
    lock_fd: int

    @property
    def tag(self) -> str:
        return f"cpython-{self.cache.name.replace('.', '')}"


def link_byte_code(prefix: Path, packages: Sequence[Linked], compiler: Compiler) -> Hashes:
    """Compiles what the cache lacks, then links all of it into the prefix."""
    folders = [(package, compiler.cache / package.key) for package in packages]
    missing = [(package, folder) for package, folder in folders if not (folder / INDEX).is_file()]
    if missing:
        _fill(prefix, missing, compiler)
    _link([folder / TREE for _, folder in folders], prefix)
    hashes: Hashes = {}
    for _, folder in folders:
        hashes |= json.loads((folder / INDEX).read_bytes())
    return hashes


def _fill(prefix: Path, missing: Iterable[tuple[Linked, Path]], compiler: Compiler) -> None:
    compiler.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=compiler.cache) as scratch:
        aside = [(folder, Path(scratch) / folder.name, package) for package, folder in missing]
        compile_files(
            [
                (prefix / source, new / TREE / target)
                for _, new, package in aside
                for source, target in _sources(package, compiler.tag)
            ],
            compiler,
        )
        for folder, new, _ in aside:
            (new / TREE).mkdir(parents=True, exist_ok=True)
            hashes = {path.relative_to(new / TREE).as_posix(): sha256_of(path) for path in walk(new / TREE)}
            (new / INDEX).write_text(json.dumps(hashes), encoding="utf-8")
            with suppress(FileExistsError, NotADirectoryError):
                _rename(new, folder)  # else another process was first


def _rename(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError as error:
        if not (folder / INDEX).is_file():
            raise
        raise FileExistsError(folder) from error


def _sources(package: Linked, tag: str) -> Iterable[tuple[str, str]]:
    """Files that are the same in every prefix, and whose byte code the package does not bring itself."""
    for name, file in package.files.items():
        target = byte_code_name(name, tag)
        if name.endswith(".py") and "/python" in name and not file.rewritten and target not in package.files:
            yield name, target


def byte_code_name(name: str, tag: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/__pycache__/{base.removesuffix('.py')}.{tag}.pyc"


def compile_files(pairs: Sequence[tuple[Path, Path]], compiler: Compiler) -> None:
    """In as many processes as there are cores. What does not compile in time is left to Python."""
    workers = min(os.cpu_count() or 1, len(pairs))
    processes = [_start(pairs[part::workers], compiler) for part in range(workers)]
    for process in processes:
        try:
            process.wait(COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def question_of(pairs: Sequence[tuple[Path, Path]]) -> str:
    """For `PROCESS`."""
    return json.dumps([(str(source), str(target)) for source, target in pairs])


def _start(pairs: Sequence[tuple[Path, Path]], compiler: Compiler) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile("w+") as question:
        question.write(question_of(pairs))
        question.seek(0)
        return subprocess.Popen(
            [compiler.python, "-I", "-S", PROCESS],
            stdin=question,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(compiler.lock_fd,),
            umask=READABLE_UMASK,
        )


def _link(trees: Sequence[Path], prefix: Path) -> None:
    """`cp` is a third of the time of a loop in Python."""
    for first in range(0, len(trees), FOLDERS_AT_ONCE):
        sources = [f"{tree}/." for tree in trees[first : first + FOLDERS_AT_ONCE]]
        command = ["cp", "--recursive", "--link", "--force", *sources, f"{prefix}/"]
        subprocess.run(command, check=True, capture_output=True, text=True)


def forget(cache: Path, package: Linked) -> None:
    """Of one package, for all Python minors: it is compiled again when next needed."""
    for minor in cache.iterdir() if cache.is_dir() else ():
        shutil.rmtree(minor / package.key, ignore_errors=True)
