"""Behaves like `app.supervisor` towards the command line: state file, phases, SIGTERM. Run as
`python supervisor_stub.py app.supervisor --data-dir D [--port N]`; the variable STUB says how."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    data_dir, mode = Path(sys.argv[sys.argv.index("--data-dir") + 1]), os.environ.get("STUB", "good")
    state: dict[str, Any] = {"pid": os.getpid(), "url": "http://127.0.0.1:1", "dashboard_url": "http://127.0.0.1:2"}
    state |= {"started_at": time.time(), "ready": False, "phase": "database", "error": None}
    state["components"] = {"ray": {"pid": 1, "state": "running"}}
    state["arguments"], state["token_given"] = sys.argv[1:], "HELIOSTAT_TOKEN" in os.environ
    for folder in ("run", "keys"):
        (data_dir / folder).mkdir(exist_ok=True)
    (data_dir / "heliostat.data").touch()
    file = data_dir / "run" / "supervisor.json"

    def say(**changes: Any) -> None:
        state.update(changes)
        aside = file.with_suffix(".new")
        aside.write_text(json.dumps(state))
        aside.replace(file)

    def stop(*_args: object) -> None:
        file.unlink()
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    say()
    if mode == "crash":
        sys.exit("no room for a database")
    if mode == "error":
        say(phase="failed", error={"message": "port 8000 is taken", "hint": "--port auto", "code": "port_taken"})
        sys.exit(1)
    for name in ("default", "operator"):
        (data_dir / "keys" / f"{name}.token").write_text(f"{name}-token")
    say(phase="ready", ready=True)
    while True:
        signal.pause()


main()
