"""A small conda channel that stands for conda-forge: this Python, a base of tiny packages, and some for tenants; served on
127.0.0.1, and able to fail."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from builders_wheels import write_wheel

from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import find_interpreter
from runtime_envs.channels.package import Entry, Package, write_package

BASE = {
    "torch": "2.5.0+cpu",
    "transformers": "4.50",
    "tokenizers": "0.20",
    "peft": "0.13",
    "accelerate": "1.0",
    "deepspeed": "0.19",
    "safetensors": "0.5",
    "numpy": "2.0",
}
MODULES = 100
HOSTILE: tuple[tuple[Package, tuple[Entry, ...]], ...] = (
    (
        Package("shadows", "1.0", "py_0", ("python",), noarch=True, entry_points=("python3.11 = shadows:main",)),
        (Entry("site-packages/shadows.py", b"def main(): pass\n"),),
    ),
    (
        Package("climbs", "1.0", "0"),
        (Entry("planted", b"mine\n"), Entry("../climbs-1.0-0/planted", b"mine\n")),
    ),
    (Package("forges", "1.0", "0"), (Entry("conda-meta/forged-1.0-0.json", b"{}"),)),
    (Package("holds", "1.0", "0"), (Entry("share/place/planted", b"mine\n"),)),
    (Package("links", "1.0", "0"), (Entry("share/place", link_to="../.."),)),
)
"""`shadows` has the installer write over Python; `climbs` out of the prefix; `forges` what the installer believes; what `holds` has
goes where `links` says."""


def write_channel(folder: Path, wheels: Path) -> Path:
    """`polite` needs greeter<2, `rude` numpy<2; `big` has 100 modules; `greeter` is there as 1.0 and 2.0; `left` and
    `right` bring one path both; `tilts` needs `left`, and with it the path is right's."""
    wheels.mkdir()
    for name, version in BASE.items():
        write_wheel(wheels, name, version)
    write_wheel(wheels, "greeter", "1.0")
    write_wheel(wheels, "greeter", "2.0")
    write_wheel(wheels, "polite", "1.0", requires=["greeter<2"])
    write_wheel(wheels, "rude", "1.0", requires=["numpy<2"])
    modules = {f"big/m{i}.py": f"VALUE = {i}\n" for i in range(MODULES)}
    write_wheel(wheels, "big", "1.0", files=modules | {"big/__init__.py": ""})
    for side in ("left", "right"):
        write_wheel(wheels, side, "1.0", files={f"{side}.py": "", "common.py": f"SIDE = '{side}'\n"})
    write_wheel(wheels, "tilts", "1.0", requires=["left"])
    write_wheel(wheels, "hijack", "1.0", files={"hijack-1.0.data/data/bin/python3.11": "#!/bin/sh\n"})
    for package, entries in HOSTILE:
        write_package(folder, package, entries)
    build_channel(folder, sorted(wheels.glob("*.whl")), find_interpreter(Path(sys.executable)))
    return folder


class ChannelServer(ThreadingHTTPServer):
    """`broken`: packages (by the beginning of their names) whose download ends after `breaks_after` bytes, `breaks` times at
    most. `other`: packages of which another file is sent. `ranges`: it goes on where it is asked to. `log`: the paths asked
    for; `sent`: (path, first byte, bytes sent)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        self.sent: list[tuple[str, int, int]] = []
        self.behave()
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    def behave(self) -> None:
        self.broken: set[str] = set()
        self.other: set[str] = set()
        self.breaks_after, self.breaks, self.ranges = 100, 1000, True
        self.log.clear()
        self.sent.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    server: ChannelServer
    start = 0

    def send_head(self) -> Any:
        asked = self.headers.get("Range", "")
        if not (self.server.ranges and asked):
            return super().send_head()
        source = Path(self.translate_path(self.path)).open("rb")  # noqa: SIM115 - the caller closes it
        size = os.fstat(source.fileno()).st_size
        self.start = source.seek(int(asked.removeprefix("bytes=").removesuffix("-")))
        self.send_response(206 if self.start < size else 416)
        self.send_header("Content-Length", str(max(0, size - self.start)))
        self.send_header("Content-Range", f"bytes {self.start}-{size - 1}/{size}")
        self.end_headers()
        return source

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.server.log.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        data = source.read()
        if name.startswith(tuple(self.server.other)):
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.server.breaks and name.startswith(tuple(self.server.broken)):
            self.server.breaks -= 1
            data = data[: self.server.breaks_after]  # less than it has announced
            self.close_connection = True
        self.server.sent.append((self.path, self.start, len(data)))
        with suppress(ConnectionError):  # it has heard enough
            outputfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[ChannelServer]:
    server = ChannelServer(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def conda_yml(*conda: str, pip: tuple[str, ...] = (), base: str = "cpu") -> str:
    lines = [f"  - {package}\n" for package in conda]
    lines += ["  - pip:\n", *(f"    - {package}\n" for package in pip)] if pip else []
    return f"name: tuned\nbase: {base}\ndependencies:{'' if lines else ' []'}\n" + "".join(lines)
