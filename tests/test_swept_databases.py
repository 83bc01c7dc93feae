"""Databases of suites that were killed do not stay in memory; those of suites that run do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from fixtures_postgres import own_folder, sweep
from waiting import lives, until

SUITE = """
import sys, time
from pathlib import Path
from fixtures_postgres import SERVER, own_folder
from app.db.embedded import EmbeddedPostgres
with own_folder(Path(sys.argv[1])) as folder:
    server = EmbeddedPostgres(folder / SERVER)
    server.start()
    print(folder, server.pid, flush=True)
    time.sleep(300)
"""


def test_what_a_killed_suite_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    other = tmp_path / "heliostat-tests-of-another-kind"
    other.mkdir()
    os.utime(other, (0, 0))
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-c", SUITE, str(tmp_path)]
    with (
        own_folder(tmp_path) as own,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as suite,
    ):
        try:
            assert suite.stdout is not None
            folder, pid = suite.stdout.readline().split()
            server = psutil.Process(int(pid))
            sweep(tmp_path, young_s=0.0)
            assert lives(server) and Path(folder).exists(), "it runs"
            suite.kill()
            suite.wait()
            sweep(tmp_path)
            assert lives(server) and Path(folder).exists(), "it may have just begun"
        finally:
            suite.kill()
            suite.wait()
            sweep(tmp_path, young_s=0.0)
        until(lambda: not lives(server))
        assert not Path(folder).exists() and own.exists() and other.exists()
