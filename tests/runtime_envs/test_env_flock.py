from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from runtime_envs.flock import held, try_lock

HOLD = """
import subprocess, sys, time
from pathlib import Path
from runtime_envs.flock import held
with held(Path(sys.argv[1]), 10) as descriptor:
    helper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    print(subprocess.Popen(helper, pass_fds=(descriptor,), stdin=0).pid, flush=True)
    time.sleep(600)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    with held(path, 1):
        with pytest.raises(TimeoutError, match="held by another"), held(path, 0.01):
            pass
    with held(path, 1) as descriptor:
        assert descriptor > 0


def test_it_outlives_its_holder_while_the_installer_still_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    arguments = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert int(holder.stdout.readline()) > 0
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        descriptor = os.open(path, os.O_RDWR)
        assert not try_lock(descriptor)
        holder.stdin.close()  # at its end the helper leaves
        until(lambda: try_lock(descriptor))
        os.close(descriptor)
