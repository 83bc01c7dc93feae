"""A whole Heliostat for tests: started by its own command on a data folder and ports of its own, and gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.db.embedded import EmbeddedPostgres
from app.processes import end_marked, marked
from app.supervisor import read_state

BIN = Path(sys.executable).parent
TERMINAL = ("succeeded", "failed", "cancelled")
Row = dict[str, Any]


SETTINGS = {
    "NODE__KIND": "cpu",
    "NODE__SLOTS": "2",
    "TRAINING__CHECKPOINT_EVERY_S": "0.5",
    "SCHEDULER__LEASE_TTL_S": "12",
    "SCHEDULER__MARGIN_S": "3",
    "SCHEDULER__POLL_S": "0.5",
}


def rows(count: int) -> list[Row]:
    """Arithmetic that a tiny model can fit: enough to see a loss fall."""
    return [
        {"prompt": f"the colour of {n % 7} is", "completion": f" {'red' if n % 7 < 4 else 'blue'}"}
        for n in range(count)
    ]


def short_folder() -> Path:
    """Ray and PostgreSQL put unix sockets below it: its path must be short."""
    return Path(tempfile.mkdtemp(prefix="ht-"))


@dataclass
class Service:
    """`settings`: HELIOSTAT_* variables without the prefix."""

    data_dir: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    instance: str = ""
    _clients: list[httpx.Client] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HELIOSTAT_", "RAY_"))}
        ours = {f"HELIOSTAT_{key}": value for key, value in self.settings.items()}
        return {**kept, **ours, "XDG_CONFIG_HOME": str(self.data_dir / "config")}

    def heliostat(
        self, *arguments: str, check: bool = True, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """The `heliostat` command, as a user calls it."""
        done = subprocess.run(
            [str(BIN / "heliostat"), *arguments],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def up(self) -> None:
        self.heliostat("up", "--detach", "--port", "auto", "--data-dir", str(self.data_dir))
        self.instance = str(self.state()["instance"])

    def down(self) -> None:
        for client in self._clients:
            client.close()
        try:
            self.heliostat("down", "--data-dir", str(self.data_dir), check=False, timeout_s=240)
        finally:
            left = [process.name() for process in marked(self.instance)] if self.instance else []
            end_marked(self.instance or "none")
        assert not left, f"processes outlived `heliostat down`: {left}"

    def state(self) -> Row:
        state = read_state(self.data_dir)
        assert state is not None, "no supervisor runs"
        return dict(state)

    @property
    def url(self) -> str:
        return str(self.state()["url"])

    def dsn(self) -> str:
        return EmbeddedPostgres(self.data_dir / "postgres").dsn()

    def token(self, name: str) -> str:
        return (self.data_dir / "keys" / f"{name}.token").read_text().strip()

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {token or self.token('default')}"}
        client = httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=240)
        self._clients.append(client)
        return client

    def operator(self) -> httpx.Client:
        return self.client(self.token("operator"))

    def tenant(self, name: str) -> httpx.Client:
        """A client of another tenant, which its first token makes."""
        made = self.heliostat("token", "create", "--tenant", name, "--role", "admin", "--expires-in", "2h")
        return self.client(made.stdout.strip())

    def add_base_model(self, name: str, source: Path, timeout_s: float = 400) -> None:
        self.heliostat("--context", "operator", "base-model", "add", name, str(source), timeout_s=timeout_s)

    def pids(self, wanted: Callable[[psutil.Process], bool]) -> list[int]:
        found = []
        for process in marked(self.instance):
            try:
                if wanted(process):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return found


def started(settings: Mapping[str, str] | None = None) -> Service:
    service = Service(short_folder(), settings or {})
    try:
        service.up()
    except BaseException:
        log = service.data_dir / "logs" / "supervisor.log"
        print(log.read_text()[-4000:] if log.exists() else "no supervisor log", file=sys.stderr)
        raise
    return service


def ended(service: Service) -> None:
    service.down()
    shutil.rmtree(service.data_dir)


def upload(client: httpx.Client, name: str, rows: list[Row]) -> Row:
    data = "".join(json.dumps(row) + "\n" for row in rows)
    answer = client.post("/datasets", files={"file": (f"{name}.jsonl", data)}, data={"name": name})
    assert answer.status_code in (200, 201), answer.text
    return dict(answer.json())


def submit(client: httpx.Client, **body: Any) -> str:
    answer = client.post("/finetune", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(client: httpx.Client, job_id: str) -> Row:
    answer = client.get(f"/finetune/{job_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for(what: Callable[[], Any], timeout_s: float, every_s: float = 0.2) -> Any:
    """Polls until `what()` is true; connection errors and 5xx (a part is being started again) count as not yet."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if found := what():
                return found
        except (httpx.TransportError, AssertionError) as error:
            last = error
        time.sleep(every_s)
    raise AssertionError(f"not within {timeout_s} s; last: {last}")


def wait_done(client: httpx.Client, job_id: str, timeout_s: float = 400) -> Row:
    def done() -> Row | None:
        seen = job(client, job_id)
        return seen if seen["status"] in TERMINAL else None

    return dict(wait_for(done, timeout_s))


def events(client: httpx.Client, job_id: str) -> list[Row]:
    found: list[Row] = []
    while True:
        after = f"&after={found[-1]['id']}" if found else ""
        page = client.get(f"/finetune/{job_id}/events?limit=100{after}").json()
        found += page["data"]
        if not page["has_more"]:
            return found


def explain_failure(service: Service, client: httpx.Client, job_id: str) -> str:
    lines = [json.dumps(job(client, job_id), indent=1)]
    lines += [f"{event['type']} {event['message']}" for event in events(client, job_id)]
    lines.append(client.get(f"/finetune/{job_id}/logs").text[-3000:])
    return "\n".join(lines)
