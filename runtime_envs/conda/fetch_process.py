"""Fetches conda packages over HTTP and unpacks them into rattler's package cache, where its installer finds them. Speaks as
`engine_process` does, and is a process of its own for the same reason.

A package has a folder of its own until it is whole: its file as far as it has arrived, and `unpacked/`. What broke off goes on where
it ended, at once or when asked again. An archive is opened only when its hash is the expected one. Loads nothing of the house."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

from rattler import Client
from rattler.exceptions import ExtractError, IoError
from rattler.package_streaming import download_and_extract, download_to_writer

AT_ONCE = 4
"""More connections than a plain web server lets wait are dropped, and the kernel asks again after 1, 3, 7, 15 s; these keep the
cores busy. Each unpacks before the next begins, so the largest, which takes longest, goes first and gets its core."""
TRIES = 4
"""Without a new byte."""
PAUSE_S = 0.5
"""Doubled each time."""
FOLDER_TRIES, FOLDER_PAUSE_S = 200, 0.005
"""Others remove a folder once for each time that one of them has finished."""
STALLED_S = 60.0
PROGRESS_BYTES: Final = 8 * 1024 * 1024
SAMPLE_BYTES: Final = 64 * 1024
URL = re.compile(r" for url \(.*\)")
"""It may hold a token."""
STATUS = re.compile(r"HTTP status client error \((\d+)")
TRANSIENT = {"408", "429"}
NOT_SATISFIABLE = "416"
"""There is nothing after what is here."""


class Failed(Exception):
    """The channel does not deliver."""


@dataclass(frozen=True)
class Package:
    """`size` in bytes; `place`: its folder in the cache."""

    url: str
    sha256: str
    size: int
    folder: Path
    place: Path

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def file(self) -> Path:
        return self.folder / self.name


class Progress:
    """Says how much of all has arrived."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._said = 0
        self._lock = threading.Lock()  # rattler calls from threads of its own

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._done - self._said >= PROGRESS_BYTES or self._done >= self._total:
                self._said = self._done
                say(stage="download", bytes=self._done, total=self._total)


class Arriving:
    """The file as it grows, and its hash."""

    def __init__(self, file: BinaryIO, package: Package, progress: Progress) -> None:
        self._file = file
        self._size = package.size
        self._progress = progress
        self._first = True
        self.patched = False  # from several answers, which may be of different files
        self.problem: OSError | None = None  # of this disk; what fails on the way is an OSError too
        self.count = 0
        self.digest = hashlib.sha256()
        while chunk := file.read(1 << 20):  # of an earlier time
            self.patched = True
            self._note(chunk)

    @property
    def whole(self) -> bool:
        return self.count >= self._size

    def write(self, chunk: bytes) -> None:
        """Called by rattler, which passes on what is raised here."""
        if self._first and self._is_beginning(chunk):
            self.restart()
        self._first = False
        try:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.problem = error
            raise
        self._note(chunk)
        if self.count > self._size:
            raise RuntimeError("it is larger than the lock says")

    def ask_again(self) -> Client:
        """For the rest."""
        self._first = True
        self.patched |= self.count > 0
        return client(self.count)

    def restart(self) -> None:
        self._progress.add(-self.count)
        self._file.truncate(0)
        self._file.seek(0)
        self.count, self.digest = 0, hashlib.sha256()

    def _is_beginning(self, chunk: bytes) -> bool:
        """A server that knows no ranges sends all again. rattler does not tell the status, but the bytes are known."""
        head = os.pread(self._file.fileno(), min(len(chunk), self.count, SAMPLE_BYTES), 0)
        return bool(head) and chunk.startswith(head)

    def _note(self, chunk: bytes) -> None:
        self.count += len(chunk)
        self.digest.update(chunk)
        self._progress.add(len(chunk))


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


@cache
def client(start: int) -> Client:
    """What asks for a file from its byte `start` on. As the installer's: with its credentials and proxies. Costs 4 ms to make."""
    return Client.default_client(max_retries=0, headers={"Range": f"bytes={start}-"} if start else None)


async def fetch(question: dict[str, Any]) -> None:
    """`packages`: {url, sha256, size, place}; `downloads`: where what is not whole is kept; `cache`: rattler's."""
    downloads, kept = Path(question["downloads"]), Path(question["cache"])
    packages = [
        Package(one["url"], one["sha256"], one["size"], downloads / one["sha256"], kept / one["place"])
        for one in question["packages"]
    ]
    packages.sort(key=lambda package: -package.size)
    progress, places = Progress(sum(package.size for package in packages)), asyncio.Semaphore(AT_ONCE)

    async def one(package: Package) -> None:
        async with places:
            try:
                await bring(package, progress)
            except Failed as error:
                raise Failed(f"{package.name} from {urlsplit(package.url).hostname}: {error}") from None

    await asyncio.gather(*(one(package) for package in packages))


async def bring(package: Package, progress: Progress) -> None:
    """One package into the cache, unless somebody else does meanwhile. Raises Failed, OSError."""
    if package.place.exists():
        progress.add(package.size)
        return
    descriptor = await asyncio.to_thread(alone, package.file)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        if package.place.exists():
            discard(package.folder)
            progress.add(package.size)
            return
        arriving = await asyncio.to_thread(Arriving, file, package, progress)
        await download(package, arriving)
        if arriving.digest.hexdigest() != package.sha256 and arriving.patched:
            arriving.restart()
            await download(package, arriving)
        if arriving.digest.hexdigest() != package.sha256:
            discard(package.folder)
            raise Failed("it is another file than the lock says (SHA-256)")
        await unpack(package)
        discard(package.folder)


def alone(path: Path) -> int:
    """A descriptor that holds the lock on this file, which others may have removed while it was waited for. Raises OSError."""
    tries = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except (FileExistsError, FileNotFoundError):  # the folder was there, and is gone again
            tries += 1
            if tries >= FOLDER_TRIES:  # or a file has its place, or a link that leads nowhere
                raise
            time.sleep(FOLDER_PAUSE_S)
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Whoever holds the lock on its file. Another may make a file of his own meanwhile; he finds the folder his to remove."""
    shutil.rmtree(folder, ignore_errors=True)


async def download(package: Package, arriving: Arriving) -> None:
    """Until it is whole; goes on where it broke off. Raises Failed when `TRIES` in a row bring nothing new."""
    tries, most = 0, arriving.count
    while not arriving.whole:
        try:
            await request(package, arriving)
            why = "the answer was too short"
        except (RuntimeError, OSError) as error:  # rattler has no class of its own for these
            if arriving.problem:
                raise arriving.problem from None
            why = URL.sub("", str(error))
        if arriving.whole:
            return
        tries = 0 if arriving.count > most else tries + 1
        most = max(most, arriving.count)
        status = STATUS.search(why)
        if status and status[1] == NOT_SATISFIABLE:
            arriving.restart()
        elif tries >= TRIES or (status and status[1] not in TRANSIENT):
            raise Failed(f"{why} ({arriving.count} of {package.size} bytes are here)")
        await asyncio.sleep(PAUSE_S * 2**tries)


async def request(package: Package, arriving: Arriving) -> None:
    """As long as something arrives."""
    transfer = asyncio.ensure_future(download_to_writer(arriving.ask_again(), package.url, arriving))
    before = -1
    while not transfer.done() and arriving.count != before:
        before = arriving.count
        await asyncio.wait({transfer}, timeout=STALLED_S)
    if not transfer.done():
        transfer.cancel()
        raise TimeoutError(f"nothing has arrived for {STALLED_S:.0f} s")
    await transfer


async def unpack(package: Package) -> None:
    """Beside the cache, then into it in one step."""
    unpacked = package.folder / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # somebody was killed
    await download_and_extract(client(0), package.file.as_uri(), unpacked)
    await asyncio.to_thread(publish, package, unpacked)


def publish(package: Package, unpacked: Path) -> None:
    with cache_locked(package.place.parent):
        if not package.place.exists():
            # rattler's note beside each folder: how often it was made, and from what
            note = (1).to_bytes(8, "big") + bytes.fromhex(package.sha256)
            package.place.with_name(f"{package.place.name}.lock").write_bytes(note)
            unpacked.rename(package.place)


@contextmanager
def cache_locked(cache: Path) -> Iterator[None]:
    """As rattler locks it, for as long as it installs."""
    with (cache / ".cache.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def answer(question: dict[str, Any]) -> None:
    """Leaves at once: other downloads may wait for somebody's lock."""
    try:
        await fetch(question)
        say(result={})
    except Failed as error:
        say(error={"kind": "channel", "message": str(error)})
    except (OSError, RuntimeError, IoError, ExtractError) as error:
        say(error={"kind": "install", "message": str(error)})
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(answer(json.loads(sys.stdin.readline())))
