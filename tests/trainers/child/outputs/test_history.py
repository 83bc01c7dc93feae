"""What a run leaves behind to look at: history, curves, TensorBoard events and the model card."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest
from fakes_driver import make_assignment
from packaging.requirements import Requirement

from cluster.storage.objects import ObjectStore
from trainers.child.failure import TrainFailure
from trainers.child.outputs.__main__ import main
from trainers.child.outputs.card import LINEAGE, Card, model_card
from trainers.child.outputs.curves import draw, write_events
from trainers.child.outputs.forms import add_curves
from trainers.child.outputs.history import History, Journal, read_history
from trainers.run.preparing import lineage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

MESSAGES = [
    {"type": "evaluated", "step": 0, "when": "before", "loss": 5.0, "rows": 3, "exact_match": 0.0, "samples": []},
    *({"type": "step", "step": n, "loss": 4.0 / n, "lr": 0.1, "grad_norm": 1.0, "tokens": 9} for n in (1, 2, 3)),
    {"type": "step", "step": 3, "loss": 1.25, "lr": 0.1, "grad_norm": 1.0, "tokens": 9},
    {"type": "log", "message": "hello"},
    {"type": "evaluated", "step": 3, "when": "after", "loss": 1.5, "rows": 3, "exact_match": 0.5},
]


def history() -> History:
    return read_history(json.dumps(message) for message in MESSAGES)


def test_a_step_computed_again_counts_as_the_last_time() -> None:
    found = history()
    assert found.steps == 3
    assert found.series["train/loss"] == ((1, 4.0), (2, 2.0), (3, 1.25))
    assert found.series["validation/exact_match"] == ((0, 0.0), (3, 0.5))
    assert "validation/rows" not in found.series


def test_accuracies_of_pairs_and_classes_have_their_curves() -> None:
    steps = [{"type": "step", "step": 1, "loss": 1.0, "tokens": 9, "reward_accuracy": 0.5, "reward_margin": 0.1}]
    steps += [{"type": "step", "step": 2, "loss": 0.5, "tokens": 9, "accuracy": 0.75}]
    series = read_history(json.dumps(step) for step in steps).series
    assert series["train/reward_accuracy"] == ((1, 0.5),) and series["train/accuracy"] == ((2, 0.75),)
    assert "train/tokens" not in series


@pytest.mark.integration  # matplotlib looks for fonts the first time: ten seconds
def test_the_curves_are_a_picture(tmp_path: Path) -> None:
    from matplotlib import pyplot

    draw(history(), tmp_path / "curves.png")
    height, width, colours = pyplot.imread(tmp_path / "curves.png").shape
    assert width > 800 and height > 800 and colours == 4
    with pytest.raises(TrainFailure, match="no step"):
        draw(read_history([]), tmp_path / "none.png")


def test_curves_without_their_library_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    assert add_curves(tmp_path, ["curves", "tensorboard"], journal) == [], "nothing to show"
    journal.add("step", 1, {"loss": 1.0})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (missing,) = add_curves(tmp_path, ["curves", "tensorboard"], journal)
    assert "curves" in missing and "matplotlib" in missing
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_the_libraries_of_the_forms_come_with_the_service() -> None:
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {Requirement(one).name for one in project["dependencies"]}
    assert {"gguf", "matplotlib", "tensorboardX"} <= needs


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    write_events(history(), tmp_path)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    data, values = file.read_bytes(), []
    while data:  # a record: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = Event.FromString(data[12 : 12 + length])
        values += [(event.step, one.tag, round(one.simple_value, 4)) for one in event.summary.value]
        data = data[16 + length :]
    assert {(3, "train/loss", 1.25), (3, "validation/loss", 1.5), (0, "validation/exact_match", 0.0)} <= set(values)


def test_the_card_says_where_it_comes_from_and_how_good_it_is(tmp_path: Path) -> None:
    assignment = make_assignment(ObjectStore(str(tmp_path)), validation_sha256="e" * 64)
    told = lineage(assignment)
    card = Card(
        base="llama-7b",
        method="sft",
        training_type="lora",
        precision="bf16",
        hyperparams={"lr": 2e-4},
        metrics={"validation_loss": 0.123456, "a|b": 1},
        metadata={**told, "other": 7},
        note="Mind the gap.",
    )
    text = model_card(card)
    assert text.startswith('---\nbase_model: "llama-7b"\nlibrary_name: peft\n')
    assert "| validation_loss | 0.1235 |" in text and "| a\\|b | 1 |" in text
    assert "Mind the gap." in text
    table = text.split("## Lineage")[1].split("## ")[0]
    assert f"| job | {assignment.job_id} |" in table and "None" not in table
    here = (importlib.metadata.version("heliostat"), assignment.base_model_sha256, assignment.fingerprint)
    for value in (*here, assignment.dataset_sha256, "e" * 64):
        assert f" | {value} |" in table
    assert set(LINEAGE) <= set(told), "a line that no job has"
    everything = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert everything["hyperparams"] == {"lr": 2e-4} and everything["other"] == 7
    compile(text.split("```python\n")[1].split("\n```")[0], "card", "exec")


def test_the_command_makes_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = tmp_path / "messages.jsonl"
    messages.write_text("".join(json.dumps(message) + "\n" for message in MESSAGES))
    assert main(["tensorboard", str(messages), str(tmp_path / "events")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
