"""Commands against scripts that are elsewhere: with a clock of our own, and scripts that are only told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainers.child.custom import processes
from trainers.child.custom.course import Course
from trainers.child.custom.kept import STATE, Custody, Nothing, Position, Refused, hashes_of, position_of
from trainers.child.custom.turns import PATIENCE_S, Turns


class Standing:
    """A script that is somewhere; `told`: what it was answered."""

    def __init__(self, **state: Any) -> None:
        self.waits: str | None = None
        self.saves = self.yields = self.is_here = False
        self.told: list[str] = []
        self.process = self
        vars(self).update(state)

    def tell(self, type: str, **fields: Any) -> None:
        self.told.append(type)

    def terminate(self) -> None:
        self.told.append("SIGTERM")


class Stage:
    def __init__(self, folder: Path, *scripts: Standing, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.now, self.sent, self.scripts, self.signals = 100.0, [], list(scripts), []
        self.course = Course(Custody(folder / "kept"), Position(), 60.0, lambda: self.now)
        self.turns = Turns(self.send, self.scripts, self.course, lambda: self.now)  # type: ignore[arg-type]
        if monkeypatch is not None:
            monkeypatch.setattr(processes, "hold", lambda: self.signals.append("hold"))
            monkeypatch.setattr(processes, "go_on", lambda: self.signals.append("go_on"))

    def send(self, type: str, **fields: Any) -> None:
        self.sent.append((type, fields.get("command"), fields.get("state")))

    def command(self, command: str, id: int = 1) -> None:
        self.turns.command({"type": "command", "id": id, "command": command})

    def arrive(self, what: str = "between") -> None:
        for script in self.scripts:
            script.waits, script.yields, script.saves = what, True, True
        self.turns.settle()


def test_one_that_takes_part_soon_is_waited_for_and_then_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the control object, and may never come to `between`."""
    stage = Stage(tmp_path, Standing(is_here=True), monkeypatch=monkeypatch)
    stage.command("stop")
    stage.turns.lose_patience()
    assert stage.scripts[0].told == []
    stage.now += PATIENCE_S + 1
    stage.turns.lose_patience()
    assert stage.scripts[0].told == ["SIGTERM"] and stage.turns.stopping


def test_a_park_holds_one_that_stays_away_and_a_resume_frees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, Standing(yields=True), monkeypatch=monkeypatch)
    stage.command("park")
    assert stage.sent == []
    stage.now += PATIENCE_S + 1
    stage.turns.lose_patience()
    assert stage.sent == [("ack", "park", "parked")] and stage.signals == ["hold"]
    stage.command("resume", 2)
    assert stage.sent[-1] == ("ack", "resume", "training") and stage.signals == ["hold", "go_on"]


def test_a_stop_waits_for_one_that_yields_however_long(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Standing(yields=True))
    stage.command("stop")
    stage.now += 10 * PATIENCE_S
    stage.turns.lose_patience()
    assert stage.scripts[0].told == [] and not stage.turns.stopping
    stage.arrive()
    assert stage.scripts[0].told == ["stop"] and stage.turns.stopping


def test_nobody_goes_on_before_all_are_there(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Standing(), Standing())
    stage.scripts[0].waits, stage.scripts[0].yields = "between", True
    stage.turns.settle()
    assert stage.scripts[0].told == []
    stage.arrive()
    assert [script.told for script in stage.scripts] == [["go"], ["go"]]


def test_a_park_that_is_taken_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, Standing(yields=True), monkeypatch=monkeypatch)
    stage.command("park", 1)
    stage.command("resume", 2)
    stage.arrive()
    assert [sent[2] for sent in stage.sent] == ["parked", "training"] and stage.scripts[0].told == ["go"]
    assert stage.signals == ["hold", "go_on"]


def test_parked_and_saved_and_still_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, Standing(yields=True), monkeypatch=monkeypatch)
    stage.course.fresh = True
    stage.command("park")
    stage.arrive()
    stage.command("checkpoint", 2)
    (stage.course.custody.open() / "x").write_text("x")
    stage.arrive("saved")
    stage.turns.settle()
    assert [sent[0] for sent in stage.sent] == ["ack", "checkpoint", "ack"] and stage.sent[-1][2] == "parked"
    assert stage.scripts[0].told == ["save"]
    stage.command("resume", 3)
    assert stage.scripts[0].told == ["save", "go"]
    assert stage.signals == ["hold", "go_on", "hold", "go_on"], "still while parked, but for the time that it saves"


def test_what_was_asked_for_last_is_answered_at_the_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Standing(yields=True))
    stage.command("checkpoint")
    stage.turns.answer_all("finished")
    assert stage.sent == [("ack", "checkpoint", "finished")]


def test_a_save_that_wrote_nothing_is_told(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Standing())
    stage.course.fresh = True
    stage.now += 61
    stage.arrive()
    stage.arrive("saved")
    assert stage.scripts[0].told == ["save", "go"] and stage.sent[0][0] == "log"


def test_checkpoints_of_a_script_without_steps_are_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    steps = []
    for _ in range(2):
        (stage.course.custody.open() / "x").write_text("x")
        kept = stage.course.keep()
        steps.append(kept["step"])
    assert steps == [1, 2] and position_of(kept["path"]) == Position(2, {})


def test_a_row_has_our_columns_and_the_metrics_the_rest(tmp_path: Path) -> None:
    course = Stage(tmp_path).course
    row = course.report({"step": 3, "loss": 0.5, "seconds": 0.1, "metrics": {"lr": 0.1, "tokens": 7.0, "f1": 0.9}})
    assert row == {"step": 3, "loss": 0.5, "seconds": 0.1, "lr": 0.1, "tokens": 7, "epoch": 0.0, "grad_norm": 0.0}
    assert course.position == Position(3, {"f1": 0.9, "train_loss": 0.5})
    bad: list[dict[str, Any]] = [
        {"step": 0, "loss": 1.0},
        {"step": 4, "loss": float("inf")},
        {"step": 2**63, "loss": 1.0},
        {"step": 4, "loss": 10**400},
        {"step": 4, "loss": 1.0, "metrics": {"tokens": 1e19}},
        {"step": 4, "loss": 1.0, "metrics": {"tokens": float("nan")}},
    ]
    for one in bad:
        with pytest.raises(Refused):
            course.report({"metrics": {}, "seconds": 0.1, **one})
    assert (
        course.report({"step": 3, "loss": 0.5, "seconds": 0.1, "metrics": {"tokens": 3e9, "f1": 0.9}})["tokens"]
        == 3 * 10**9
    )
    assert course.position.step == 3


def test_custody_takes_whole_folders_of_regular_files(tmp_path: Path) -> None:
    custody = Custody(tmp_path / "kept")
    with pytest.raises(Nothing):
        custody.open()
        custody.take(Position(1))
    folder = custody.open()
    (folder / "deep").mkdir()
    (folder / "deep" / "x").write_text("x")
    taken = custody.take(Position(4, {"f1": 1.0}))
    assert sorted(taken["sha256"]) == [STATE, "deep/x"] and taken["bytes"] > 1 and not folder.exists()
    assert Path(taken["path"]).name == "step-00000004" and hashes_of(Path(taken["path"])) == taken["sha256"]
    custody.prune(5)
    assert not Path(taken["path"]).exists()
    (custody.open() / "link").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="not a regular file"):
        custody.take(Position(5))
