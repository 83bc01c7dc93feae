"""A tenant's own script under its conductor: with and without the control object, alone and in ranks, to good and bad ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from builders_child import Child, tree_of
from builders_custom import STEPS, conductor, custom_config
from waiting import until

from trainers.protocol import Message

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
PLAIN = """
    import os, pathlib, signal, sys, time

    ticks = pathlib.Path(os.environ["HELIOSTAT_OUTPUT"], "ticks")
    kept = pathlib.Path(os.environ["HELIOSTAT_CHECKPOINTS"], "ticks")
    resumed = os.environ.get("HELIOSTAT_RESUME_FROM")
    count = int(pathlib.Path(resumed, "ticks").read_text()) if resumed else 0

    def leave(number, frame):
        kept.write_text(str(count))
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    print("ready", flush=True)
    while count < 1_000_000:
        count += 1
        ticks.write_text(str(count))
        time.sleep(0.001)
"""


def of(child: Child, type: str) -> list[Message]:
    return [message for message in child.messages if message["type"] == type]


def failure(child: Child) -> Message:
    with pytest.raises(AssertionError):
        child.until("finished")
    return child.messages[-1]


def ticks(folder: Path) -> int:
    """Of `PLAIN`; it may be writing."""
    file = folder / "out" / "output" / "ticks"
    return int(file.read_text() or 0) if file.exists() else 0


def test_a_script_that_takes_part_reports_and_leaves_an_artifact(tmp_path: Path) -> None:
    with conductor() as child:
        steps = child.run(custom_config(tmp_path, max_steps=5))
        done = child.messages[-1]
    assert [(step["step"], step["loss"], step["lr"]) for step in steps] == [(n, 1.0 / n, 0.1) for n in range(1, 6)]
    assert of(child, "ready")[0]["steps"] == 5 and of(child, "ready")[0]["start_step"] == 0
    assert list(done["sha256"]) == ["made-by-0"] and done["step"] == 5
    assert done["metrics"] == {"accuracy": 0.5, "train_loss": 0.2}
    assert Path(done["artifact"], "made-by-0").read_text() == "5"


def test_a_plain_script_sees_its_places_and_arguments(tmp_path: Path) -> None:
    script = """
        import json, os, sys
        from pathlib import Path
        names = ("MODEL", "DATA", "OUTPUT", "CHECKPOINTS", "RESUME_FROM", "PARAMS", "CODE")
        told = {name: os.environ.get(f"HELIOSTAT_{name}") for name in names}
        told |= {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
        told |= {"arguments": sys.argv[1:], "folder": os.getcwd(), "port": int(os.environ["MASTER_PORT"]) > 0}
        told |= {"rows": Path(told["DATA"], "train.jsonl").read_text(), "socket": "HELIOSTAT_CONTROL_FD" in os.environ}
        Path(told["OUTPUT"], "told.json").write_text(json.dumps(told))
    """
    config = custom_config(tmp_path, script, entrypoint=["train.py", "--lr", "1e-4"], params={"hidden": 64})
    with conductor() as child:
        child.run(config)
        told = json.loads(Path(child.messages[-1]["artifact"], "told.json").read_text())
    assert told["arguments"] == ["--lr", "1e-4"] and told["PARAMS"] == '{"hidden": 64}'
    assert told["MODEL"] == str(tmp_path / "model") and told["rows"] == '{"text": "a"}\n'
    assert told["folder"] == told["CODE"] == str(tmp_path / "program") and told["RESUME_FROM"] is None
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("0", "0", "1")
    assert told["port"] and not told["socket"]


def test_a_module_with_arguments(tmp_path: Path) -> None:
    config = custom_config(tmp_path, entrypoint=["-m", "pkg.train", "out.txt"])
    (tmp_path / "program" / "pkg").mkdir()
    script = "import os, sys, pkg\nopen(os.path.join(os.environ['HELIOSTAT_OUTPUT'], sys.argv[1]), 'w').write('x')\n"
    (tmp_path / "program" / "pkg" / "train.py").write_text(script)
    with conductor() as child:
        child.run(config)
    assert list(child.messages[-1]["sha256"]) == ["out.txt"]


def test_parked_between_two_steps_and_on_again(tmp_path: Path) -> None:
    with conductor() as child:
        child.start(custom_config(tmp_path, params={"steps": 80, "seconds": 0.03}))
        child.until("step")
        ack = child.command("park")
        assert ack["state"] == "parked" and child.command("ping", 2)["state"] == "parked"
        seen = len(child.steps)
        with pytest.raises(TimeoutError):
            child.until("step", timeout_s=0.2)
        assert child.command("resume", 3)["state"] == "training"
        child.until("finished")
    assert 0 < seen < 80 and [step["step"] for step in child.steps] == list(range(1, 81))


def test_who_is_parked_between_two_steps_computes_nothing_elsewhere_either(tmp_path: Path) -> None:
    """A thread and a process of its own go on while the script waits in `between`."""
    busy = """
        import subprocess, sys, threading

        def work():
            while True:
                pass

        threading.Thread(target=work, daemon=True).start()
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
    """
    config = custom_config(tmp_path, params={"steps": 10_000, "seconds": 0.01})
    script = tmp_path / "program" / "train.py"
    script.write_text(textwrap.dedent(busy) + script.read_text())
    with conductor() as child:
        child.start(config)
        child.until("step")
        assert child.command("park")["state"] == "parked"
        scripts = [psutil.Process(pid) for pid in tree_of(child.pid)[1:]]
        assert len(scripts) == 2
        until(lambda: {one.status() for one in scripts} == {psutil.STATUS_STOPPED})
        assert child.command("checkpoint", 2)["state"] == "parked" and of(child, "checkpoint"), (
            "it saves, and is still again"
        )
        until(lambda: {one.status() for one in scripts} == {psutil.STATUS_STOPPED})
        assert child.command("resume", 3)["state"] == "training"
        child.until("step")
        assert child.command("park", 4)["state"] == "parked"
        assert child.command("stop", 5)["state"] == "finished"


def test_a_checkpoint_on_command_and_a_resumed_run(tmp_path: Path) -> None:
    config = custom_config(tmp_path, params={"steps": 10_000, "seconds": 0.01})
    with conductor() as child:
        child.start(config)
        child.until("step")
        ack = child.command("checkpoint")
        kept = of(child, "checkpoint")[0]
        assert kept["step"] == ack["step"] and ack["state"] == "training"
        assert sorted(kept["sha256"]) == [".heliostat.json", "step"]
        assert child.command("stop", 2)["state"] == "finished" and "finished" not in child.types
        last = of(child, "checkpoint")[-1]
    assert Path(last["path"], "step").read_text() == str(last["step"])
    with conductor() as again:
        on = replace(
            config, resume_from=last["path"], params={"steps": last["step"] + 2}, output_dir=str(tmp_path / "out2")
        )
        steps = again.run(on)
    assert [step["step"] for step in steps] == [last["step"] + 1, last["step"] + 2]
    assert of(again, "ready")[0]["start_step"] == last["step"]


def test_checkpoints_go_by_time_and_older_ones_go_when_saved(tmp_path: Path) -> None:
    config = custom_config(tmp_path, params={"steps": 3}, checkpoint_every_s=0.0)
    with conductor() as child:
        child.start(config)
        first = child.until("checkpoint")
        second = child.until("checkpoint")
        child.channel.send("saved", step=second["step"])
        until(lambda: not Path(first["path"]).exists())
        child.until("finished")
    assert [one["step"] for one in of(child, "checkpoint")] == [1, 2, 3]
    assert of(child, "checkpoint")[0]["metrics"] == {"accuracy": 0.5, "train_loss": 1.0}


def test_ranks_are_cut_at_the_same_step(tmp_path: Path) -> None:
    script = STEPS.replace("        time.sleep(", "        time.sleep(0.02 * job.rank + ") + "    print('bye')\n"
    config = custom_config(tmp_path, script, world_size=3, params={"steps": 50})
    with conductor() as child:
        child.start(config)
        child.until("step")
        parked = child.command("park")
        assert parked["state"] == "parked" and child.command("checkpoint", 2)["state"] == "parked"
        child.command("resume", 3)
        child.until("finished")
    assert of(child, "checkpoint")[0]["step"] == parked["step"]
    assert sorted(child.messages[-1]["sha256"]) == ["made-by-0", "made-by-1", "made-by-2"]


def test_a_rank_that_fails_takes_all_along(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            print("first", end=" ", flush=True); time.sleep(0.1); print("line"); sys.exit("no such column: label")
        time.sleep(1000)
    """
    with conductor() as child:
        child.start(custom_config(tmp_path, script, world_size=2))
        told = failure(child)
        assert (told["code"], told["fixable_by"]) == ("script_failed", "user")
        assert "rank 1" in told["message"] and "exit code 1" in told["message"]
        assert told["message"].endswith("first line\nno such column: label")
        assert tree_of(child.pid) == [child.pid]
        assert child.command("checkpoint")["state"] == "failed"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", "output_empty"),
        ("import os; os.symlink('/etc/passwd', os.environ['HELIOSTAT_OUTPUT'] + '/x')", "output_refused"),
        ("import os; os.mkfifo(os.environ['HELIOSTAT_OUTPUT'] + '/x')", "output_refused"),
        ("import os; [open(f\"{os.environ['HELIOSTAT_OUTPUT']}/{n}\", 'w') for n in range(2000)]", "output_refused"),
        ("import os; os.abort()", "script_failed"),
        ("import no_such_module", "script_failed"),
        ("from heliostat import job; job._wire.send(b'x')", "script_failed"),
    ],
)
def test_bad_ends_have_names(tmp_path: Path, script: str, code: str) -> None:
    with conductor() as child:
        child.start(custom_config(tmp_path, script))
        told = failure(child)
    assert (told["code"], told["fixable_by"]) == (code, "user") and told["hint"]


def test_a_script_that_is_killed_may_go_better_again(tmp_path: Path) -> None:
    with conductor() as child:
        child.start(custom_config(tmp_path, params={"steps": 10_000, "seconds": 0.01}))
        child.until("step")
        os.kill(tree_of(child.pid)[1], signal.SIGKILL)
        told = failure(child)
    assert (told["code"], told["fixable_by"]) == ("rank_lost", "operator")


def test_a_plain_script_is_held_with_all_below_it(tmp_path: Path) -> None:
    helper = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)\n"
    )
    config = custom_config(tmp_path, PLAIN)
    file = tmp_path / "program" / "train.py"
    file.write_text(helper + file.read_text())
    with conductor() as child:
        child.start(config)
        until(lambda: ticks(tmp_path) > 0)
        assert child.command("park")["state"] == "parked"
        until(lambda: {state(pid) for pid in tree_of(child.pid)[1:]} == {"T"})  # a busy one stops when it gets a core
        assert len(tree_of(child.pid)) == 3
        before = ticks(tmp_path)
        assert ticks(tmp_path) == before
        assert child.command("resume", 2)["state"] == "training"
        until(lambda: ticks(tmp_path) > before)


def test_a_plain_script_writes_its_checkpoint_at_sigterm(tmp_path: Path) -> None:
    config = custom_config(tmp_path, PLAIN)
    with conductor() as child:
        child.start(config)
        until(lambda: ticks(tmp_path) > 0)
        child.command("park")
        ack = child.command("stop", 2)
        kept = of(child, "checkpoint")[0]
    assert ack["state"] == "finished" and "finished" not in child.types
    assert kept["step"] == 1 and int(Path(kept["path"], "ticks").read_text()) > 0


def test_what_a_script_left_that_did_not_leave_well_is_no_checkpoint(tmp_path: Path) -> None:
    script = """
        import os, time
        open(os.environ["HELIOSTAT_CHECKPOINTS"] + "/half", "w").write("h")
        print("up")
        time.sleep(1000)
    """
    with conductor() as child:
        child.start(custom_config(tmp_path, script))
        until((tmp_path / "out" / "checkpoints" / "half").exists)
        child.command("stop")
    assert not of(child, "checkpoint") and "exit code 0" in of(child, "log")[0]["message"]


def test_a_checkpoint_that_the_script_announces_is_moved_away(tmp_path: Path) -> None:
    script = """
        from heliostat import job
        job.report(step=7, loss=0.5)
        folder = job.checkpoints / "mine"
        folder.mkdir()
        (folder / "weights").write_text("w")
        job.checkpoint(folder)
        (job.output / "moved").write_text(str(not folder.exists()))
        try:
            job.checkpoint("/etc")
        except ValueError as error:
            (job.output / "why").write_text(str(error))
    """
    with conductor() as child:
        child.run(custom_config(tmp_path, script))
        artifact = Path(child.messages[-1]["artifact"])
        assert (artifact / "moved").read_text() == "True" and "does not lie below" in (artifact / "why").read_text()
        assert [one["step"] for one in of(child, "checkpoint")] == [7]


def test_a_loss_that_is_no_number_is_told_and_not_recorded(tmp_path: Path) -> None:
    script = "from heliostat import job\njob.report(step=1, loss=float('nan'))\n(job.output / 'x').touch()\n"
    with conductor() as child:
        child.run(custom_config(tmp_path, script))
    assert not child.steps and "loss is not finite" in of(child, "log")[0]["message"]


def test_nothing_is_left_when_the_worker_is_gone(tmp_path: Path) -> None:
    with conductor() as child:
        child.start(custom_config(tmp_path, PLAIN, world_size=2))
        until(lambda: ticks(tmp_path) > 0)
        pids = tree_of(child.pid)
        assert len(pids) == 3
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize("minor", ["3.10", "3.12", "3.13"])
def test_pythons_without_any_package(tmp_path: Path, minor: str) -> None:
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = sorted(pyenv.glob(f"{minor}.*/bin/python{minor}"))
    if not found:
        pytest.skip(f"there is no Python {minor} at hand")
    with conductor(str(found[0])) as child:
        steps = child.run(custom_config(tmp_path, world_size=2))
    assert len(steps) == 5 and child.messages[0]["python"].startswith(minor) and "torch" not in child.messages[0]


def test_it_runs_alone_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(custom_config(tmp_path, params={"steps": 2}).to_dict()))
    command = [sys.executable, "-m", "trainers.child.main", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    assert told == ["hello", "ready", "step", "step", "finished"]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
