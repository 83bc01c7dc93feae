"""What needs no service: numbers and text, estimate, doctor, and what the command does not load."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from cli_said import Run
from fake_service import job, step
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from app.cli.commands.doctor import judge_gpu, sandbox
from app.cli.commands.finetune import NumberLoader, gpus_of, merged
from app.cli.output import clean
from app.cli.progress import Progress
from app.cli.units import ago, scalar, seconds_of, size, span, sparkline
from app.settings import Settings
from cluster.errors import InvalidRequest

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def test_neither_torch_nor_ray_nor_the_database_is_loaded() -> None:
    code = "import sys, app.cli.main; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert {"typer", "httpx"} <= loaded
    assert not loaded & {"torch", "ray", "sqlalchemy", "psycopg", "transformers", "pyarrow", "fastapi"}


def test_estimate_of_a_7b_model(offline: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    said = offline("estimate", str(tmp_path), "--gpu-type", "a100", "--json")
    per_gpu = said.json["per_gpu"]
    assert said.json["parameters"] == 6_738_415_616
    assert 13 < per_gpu[0]["memory_gb"] < 48
    assert per_gpu[0]["fits"] is True
    assert [one["slots"] for one in per_gpu] == [1, 2, 4, 8]
    full = offline(
        "estimate", str(tmp_path / "config.json"), "--training-type", "full", "--gpus", "1", "--gpu-type", "T4"
    )
    assert full.out.splitlines()[-1].split()[-1] == "no"


def test_estimate_chooses_the_rows_of_a_pass(offline: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    way = ["--task", "sequence_classification", "--seq-len", "256", "--batch-size", "64", "--gpus", "1", "--json"]
    (chosen,) = offline("estimate", str(tmp_path), *way, "--gpu-type", "A100-80GB").json["per_gpu"]
    (one,) = offline("estimate", str(tmp_path), *way, "--micro-batch", "1").json["per_gpu"]
    assert chosen["micro_batch"] > 8 and chosen["fits"] and one["micro_batch"] == 1
    assert chosen["parts_gb"]["activations"] > 8 * one["parts_gb"]["activations"]
    assert "logits" not in chosen["parts_gb"] or chosen["parts_gb"]["logits"] == 0


def test_estimate_of_ways_to_need_less(offline: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))

    def needed(*way: str) -> float:
        found: float = offline("estimate", str(tmp_path), "--gpus", "2", "--json", *way).json["per_gpu"][0]["memory_gb"]
        return found

    plain = needed()
    assert needed("--training-type", "qlora") < plain - 8
    assert needed("--checkpointing") < plain - 5
    full = needed("--training-type", "full", "--zero-stage", "3")
    assert needed("--training-type", "full", "--zero-stage", "3", "--offload", "optimizer") < full - 30
    assert needed("--method", "dpo") > plain + 5
    assert offline("estimate", str(tmp_path), "--offload", "moon").code == 2


@pytest.mark.parametrize("content", [None, "no json", "[]"])
def test_estimate_of_what_is_no_model(offline: Run, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert offline("estimate", str(tmp_path)).code == 2


def test_version(offline: Run) -> None:
    assert set(offline("version", "--json").json) == {"heliostat", "python"}


def test_doctor_looks_at_everything(offline: Run) -> None:
    said = offline("doctor", "--json")
    found = {check["name"]: check for check in said.json["data"]}
    assert {"python", "gpu", "sandbox", "disk", "hard links", "port", "memory", "memory limit", "shared memory"} <= set(
        found
    )
    kinds = ("cgroup v2", "cgroup v1", "watched once a second")
    assert found["memory limit"]["detail"] in kinds
    assert all(check["remedy"] for check in found.values() if check["state"] == "fail")
    assert said.code == (0 if said.json["ok"] else 1)


@pytest.mark.usefixtures("bare_host")
@pytest.mark.parametrize(("isolation", "state"), [("required", "fail"), ("preferred", "warn"), ("off", "warn")])
def test_doctor_on_a_host_that_cannot_isolate(isolation: Literal["required", "preferred", "off"], state: str) -> None:
    check = sandbox(Settings(isolation=isolation))
    assert check.state == state and check.remedy
    assert ("bubblewrap" in check.remedy) == (isolation != "off")


@pytest.mark.parametrize(
    ("cuda", "gpus", "state"),
    [(False, None, "ok"), (True, ["A100"], "ok"), (False, ["A100"], "fail"), (True, None, "warn"), (True, [], "warn")],
)
def test_doctor_on_gpus_and_torch(cuda: bool, gpus: list[str] | None, state: str) -> None:
    check = judge_gpu("2.13.0", cuda, gpus)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A100:8", {"gpu_type": "A100", "num_gpus": 8}),
        ("A100", {"gpu_type": "A100"}),
        ("4", {"num_gpus": 4}),
        ("A100,H100:2", {"gpu_type": ["A100", "H100"], "num_gpus": 2}),
        ("cpu", {"gpu_type": "cpu"}),
        (None, {}),
    ],
)
def test_gpus(text: str | None, expected: dict[str, Any]) -> None:
    assert gpus_of(text) == expected


@pytest.mark.parametrize("text", ["A100:", "A100:0", "A100:-1", "A100:x"])
def test_gpus_that_are_none(text: str) -> None:
    if text == "A100:":
        assert gpus_of(text) == {"gpu_type": "A100"}
        return
    with pytest.raises(InvalidRequest):
        gpus_of(text)


@pytest.mark.parametrize("text", ["3e-5", "1E3", "-2e-1", "1.5e2", ".5e1"])
def test_yaml_numbers_as_people_write_them(text: str) -> None:
    assert yaml.load(f"lr: {text}", Loader=NumberLoader) == {"lr": float(text)}
    assert yaml.load("name: e5\nhex: 1e", Loader=NumberLoader) == {"name": "e5", "hex": "1e"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-5", 3e-5), ("2", 2), ("true", True), ("null", None), ("cosine", "cosine"), ('["q"]', ["q"]), ("nan", "nan")],
)
def test_scalars(text: str, value: Any) -> None:
    assert scalar(text) == value


MAPPINGS = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
BODIES = st.dictionaries(st.sampled_from("abc"), MAPPINGS)


@given(under=BODIES, over=BODIES)
def test_options_win_over_the_file(under: dict[str, Any], over: dict[str, Any]) -> None:
    both = merged(under, over)
    assert merged(both, over) == both
    assert merged(under, {}) == under
    assert set(both) == set(under) | set(over)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=200))
def test_sparklines_take_everything(values: list[float]) -> None:
    assert len(sparkline(values, 40)) <= 40


def test_sparkline_falls() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"


@given(st.text())
def test_nothing_steers_the_terminal(text: str) -> None:
    assert not any((ord(letter) < 32 and letter not in "\t\n") or 0x7F <= ord(letter) < 0xA0 for letter in clean(text))


def test_units() -> None:
    assert [seconds_of(text, "-") for text in ("90", "30m", "24h", "7d")] == [90, 1800, 86400, 604800]
    assert [span(seconds) for seconds in (5, 600, 10_000, 400_000)] == ["5 s", "10 min", "2.8 h", "4.6 d"]
    assert [size(count) for count in (5, 2048, 5 * 2**30)] == ["5 B", "2.0 KiB", "5.0 GiB"]
    assert ago(100, now=160) == "60 s ago"
    assert ago("1970-01-01T00:01:40Z", now=160) == "60 s ago"
    assert ago(None) == "–"


def test_the_picture_fits_a_terminal_of_80_columns() -> None:
    progress = Progress(job(id="ftjob-" + "x" * 24, progress={"step": 0, "steps": 400}))
    for number in range(1, 200):
        progress.absorb(step(number, number, 5.0 - number / 100))
    console = Console(width=80, file=io.StringIO())
    console.print(progress.picture())
    drawn = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(drawn) == 3
    assert "x" * 24 in drawn[0]
    assert drawn[1].startswith("step 199/400  loss 3.0100  0.5 s/step  about 100 s left")
    assert "▇" in drawn[2]


def test_a_step_computed_again_after_a_fault_counts_once() -> None:
    progress = Progress(job())
    for number, (at, loss) in enumerate([(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.0), (3, 1.0)], start=1):
        progress.absorb(step(number, at, loss))
    assert progress.losses == [3.0, 2.0, 1.0]
    assert progress.step == 3
