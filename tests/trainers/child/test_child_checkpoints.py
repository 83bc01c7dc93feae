"""When a checkpoint is due, and what becomes of those that nobody stores: with a clock of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders_child import Recorder, make_config, numbers
from builders_methods import train
from waiting import until

from trainers.child.control import MAX_UNSAVED, MOST_OF_TIME, PROGRESS_S, Actions, Control
from trainers.child.custom.course import Course
from trainers.child.custom.kept import Custody, Position
from trainers.child.main import Printer, environment
from trainers.child.rank import run_rank
from trainers.child.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
EVERY_S = 60.0


class Run:
    """Steps of a minute; a checkpoint holds it up for `cost_s`. `gone`: what was dropped, `pruned`: what was saved."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.now, self.cost_s = 0.0, 0.0
        self.wire = Recorder()
        self.written: list[int] = []
        self.gone: list[int] = []
        self.pruned: list[int] = []
        self.control = Control(self.wire, World(), every_s, clock=lambda: self.now)
        self.control.attach(Actions(self._save, self.pruned.append, self.gone.append), 0)

    def _save(self) -> None:
        self.now += self.cost_s
        self.written.append(self.control.step)

    def steps(self, count: int, seconds: float = EVERY_S) -> None:
        for _ in range(count):
            self.now += seconds
            self.control.step += 1
            self.control.between()

    def hear(self, word: str, step: int) -> None:
        self.control._take({"type": word, "step": step})


def test_no_checkpoint_is_due_while_two_are_not_stored() -> None:
    run = Run()
    run.steps(6)
    assert run.written == [1, 2] and MAX_UNSAVED == 2
    run.hear("saved", 1)
    run.steps(3)
    assert run.written == [1, 2, 7] and run.pruned == [1]
    run.hear("saved", 7)  # uploads go in order: the second is stored, or was dropped
    run.steps(3)
    assert run.written == [1, 2, 7, 10, 11]


def test_one_that_will_not_be_stored_makes_room_for_the_next() -> None:
    run = Run()
    run.steps(3)
    run.hear("dropped", 2)
    run.steps(2)
    assert run.written == [1, 2, 4] and (run.gone, run.pruned) == ([2], [])


def test_a_commanded_checkpoint_waits_for_nothing() -> None:
    run = Run()
    run.steps(2)
    run.control.step += 1
    run.control.save()
    assert run.written == [1, 2, 3]


def test_dear_checkpoints_become_rarer_and_say_so_once() -> None:
    run = Run()
    run.cost_s = 23.0
    for _ in range(3):
        run.steps(4)
        run.hear("saved", run.control.step)
    assert run.written == [1, 5, 9], "230 s between them, and steps of a minute"
    assert run.now * MOST_OF_TIME >= run.cost_s * len(run.written[1:])
    (told,) = run.wire.of("log")
    assert "23.0 s" in told["message"] and "230 s" in told["message"]


def test_only_what_is_silent_for_a_minute_is_long() -> None:
    run = Run()
    for _ in range(100):
        run.now += 0.9 * PROGRESS_S
        run.control.progress("step, forward passes", 1, 2)
        run.control.emit("step", step=1)
    assert run.wire.of("progress") == []
    run.now += PROGRESS_S
    run.control.progress("evaluation, rows", 1, 2)
    run.control.progress("evaluation, rows", 2, 2)
    assert [one["done"] for one in run.wire.of("progress")] == [1]


def test_after_each_step_means_each_step() -> None:
    run = Run(every_s=0.0)
    run.cost_s = 23.0
    run.steps(5, seconds=1.0)
    assert run.written == [1, 2, 3, 4, 5] and run.wire.of("log") == []


def test_scripts_checkpoints_keep_to_the_same_rules(tmp_path: Path) -> None:
    now = 0.0
    course = Course(Custody(tmp_path), Position(), EVERY_S, lambda: now)

    def keep(step: int, cost_s: float) -> Path:
        nonlocal now
        course.position = Position(step)
        (course.open() / "x").write_text("x")
        now += cost_s
        kept = Path(str(course.keep()["path"]))
        course.fresh = True
        return kept

    keep(1, cost_s=23.0)
    now += 229.0
    assert not course.due, "one that takes 23 s is due after 230"
    now += 1.0
    assert course.due
    last = keep(2, cost_s=0.0)
    now += EVERY_S
    assert not course.due, "two that are not stored"
    course.dropped(2)
    assert course.due and not last.exists()
    last = keep(3, cost_s=0.0)
    now += EVERY_S
    course.saved(3)
    assert course.due and last.exists()


def test_without_a_worker_older_checkpoints_go_too(
    tiny_llama: Path, capitals: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As under torchrun."""
    run_rank(make_config(tiny_llama, capitals, tmp_path, keep_checkpoints=1), 0, 1, Printer())
    until(lambda: [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000006"])
    assert capfd.readouterr().out.count('"type": "checkpoint"') == 6


def test_ranks_of_several_nodes_choose_their_own_interface() -> None:
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    one, two = (environment({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": size}) for size in ("2", "4"))
    assert one == two | loopback and not two.keys() & loopback.keys()


def test_a_training_whose_storage_is_down_keeps_the_disk_small(
    tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """Nothing is ever stored; the steps are those of a run that stores all."""
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=12)
    undisturbed = train(config)
    wire = Recorder(
        lambda message: [{"type": "dropped", "step": message["step"]}] if message["type"] == "checkpoint" else []
    )
    run_rank(make_config(tiny_llama, capitals, tmp_path / "2", max_steps=12), 0, 1, wire)
    assert numbers(wire.of("step")) == numbers(undisturbed.of("step"))
    until(lambda: not list((tmp_path / "2" / "checkpoints").glob("step-*")))
    assert len(list((tmp_path / "1" / "checkpoints").glob("step-*"))) == 12
