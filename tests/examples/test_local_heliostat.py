"""What demo and benchmark share, against a small real server and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import until

from examples.local_heliostat import Failed, Heliostat, steps_of

EVENTS = [{"type": "metrics", "seq": number, "data": {"steps": [{"step": number}]}} for number in (1, 2, 3, 4)]


class BreaksOnce(BaseHTTPRequestHandler):
    """Four events; the first connection breaks after two of them, in the middle of the third."""

    asked_after: list[str | None] = []  # noqa: RUF012 (the fixture empties it)

    def do_GET(self) -> None:
        if not self.path.endswith("/events"):
            self._answer(200, {"status": "succeeded"})
            return
        last = self.headers.get("Last-Event-ID")
        self.asked_after.append(last)
        body = b"".join(self._event(event) for event in EVENTS if event["seq"] > int(last or 0))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if last else body[: 2 * len(body) // 4 + 20])

    def do_POST(self) -> None:
        self._answer(422, {"error": {"code": "unknown_gpu_type"}})

    def _event(self, event: dict[str, object]) -> bytes:
        return f"id: {event['seq']}\nevent: metrics\ndata: {json.dumps(event)}\n\n: ping\n\n".encode()

    def _answer(self, status: int, body: dict[str, object]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def heliostat(tmp_path: Path) -> Iterator[Heliostat]:
    BreaksOnce.asked_after.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), BreaksOnce)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    heliostat = Heliostat(tmp_path)
    heliostat.connect(f"http://127.0.0.1:{server.server_port}", "token")
    yield heliostat
    heliostat.http.close()
    server.shutdown()
    thread.join()
    server.server_close()


def test_events_survive_a_broken_connection(heliostat: Heliostat) -> None:
    told = list(heliostat.events("ftjob-1"))
    assert [event["seq"] for event in told] == [1, 2, 3, 4]
    assert BreaksOnce.asked_after == [None, "2"]
    assert [step["step"] for event in told for step in steps_of(event)] == [1, 2, 3, 4]


def test_a_refusal_says_what_the_service_said(heliostat: Heliostat) -> None:
    with pytest.raises(Failed, match=r"422.*unknown_gpu_type"):
        heliostat.post("/finetune", {})


def test_other_events_have_no_steps() -> None:
    assert steps_of({"type": "ready", "data": {"steps": 48}}) == []


def test_leftovers_are_found_by_the_folder_they_carry(tmp_path: Path) -> None:
    environment = {**os.environ, "ANY_NAME": f"{tmp_path}/x"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment) as process:
        found = Heliostat(tmp_path)
        until(lambda: found.leftovers(limit_s=0))  # /proc shows it a moment after the start
        assert [line.split()[0] for line in found.leftovers(limit_s=0)] == [str(process.pid)]
        process.kill()
    assert Heliostat(tmp_path).leftovers(limit_s=60) == []


def test_the_command_is_told_nothing_of_the_users_own_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIOSTAT_URL", "http://127.0.0.1:9")
    heliostat = Heliostat(tmp_path)
    assert heliostat.cli("context", "ls")["data"] == []
    with pytest.raises(Failed, match="context use nowhere"):
        heliostat.cli("context", "use", "nowhere")
    assert "nowhere" in capfd.readouterr().err
