"""A small conda channel that stands for conda-forge: this Python, a base of tiny packages, and some for tenants; served on
127.0.0.1, and able to fail."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from builders_wheels import write_wheel

from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import find_interpreter

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


def write_channel(folder: Path, wheels: Path) -> Path:
    """`polite` needs greeter<2, `rude` numpy<2; `big` has 100 modules; `greeter` is there as 1.0 and 2.0; `left` and
    `right` bring one path both."""
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
    write_wheel(wheels, "hijack", "1.0", files={"hijack-1.0.data/data/bin/python3.11": "#!/bin/sh\n"})
    build_channel(folder, sorted(wheels.glob("*.whl")), find_interpreter(Path(sys.executable)))
    return folder


class ChannelServer(ThreadingHTTPServer):
    """`broken`: packages (by the beginning of their names) whose download ends half way. `log`: the paths asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.broken: set[str] = set()
        self.log: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    def copyfile(self, source: Any, outputfile: Any) -> None:
        assert isinstance(self.server, ChannelServer)
        self.server.log.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        if any(name.startswith(start) for start in self.server.broken):
            outputfile.write(source.read(100))  # less than it has announced
            self.close_connection = True
            return
        super().copyfile(source, outputfile)

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
