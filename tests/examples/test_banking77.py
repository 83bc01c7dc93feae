"""The benchmark script: rows from the CSV, what it reads out of events, and its table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import banking77

INTENTS = ["card_lost", "top_up"]


def event(type: str, **data: Any) -> dict[str, Any]:
    return {"type": type, "data": data}


def finished_run() -> banking77.Run:
    run = banking77.Run(job_id="ftjob-1", seed=3)
    run.absorb(event("stage", stage="imports", seconds=5.0), 6.0)
    run.absorb(event("evaluated", when="before", exact_match=0.0, loss=4.0), 7.0)
    run.absorb(event("metrics", steps=[{"step": 1, "tokens": 100, "seconds": 2.0}]), 9.0)
    run.absorb(event("metrics", steps=[{"step": 2, "tokens": 200, "seconds": 1.0}]), 12.0)
    run.absorb(event("evaluated", when="after", exact_match=0.75, loss=0.5), 13.0)
    return run


def test_rows_of_the_asked_intents_only(tmp_path: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text('text,category\n"I lost it, help",card_lost\nHow?,exchange_rate\nAdd money,top_up\n')
    rows = banking77.read_rows(file, INTENTS)
    answers = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows}
    assert answers == {"I lost it, help": "card_lost", "Add money": "top_up"}
    assert rows[0]["messages"][0]["content"] == "Name the intent of the message of a bank customer."
    assert rows == banking77.read_rows(file, INTENTS)


def test_events_become_figures() -> None:
    run = finished_run()
    assert run.first_step_s == 9.0
    assert run.stages == {"imports": 5.0}
    assert (run.steps, run.tokens, run.train_s, run.tokens_per_s) == (2, 300, 3.0, 100.0)
    assert run.exact_match == {"before": 0.0, "after": 0.75}


def test_table_says_where_the_seconds_went() -> None:
    run = {**asdict(finished_run()), "tokens_per_s": 100.0}
    hyperparams = {"max_steps": 2, "batch_size": 8}
    result = {"intents": INTENTS, "hyperparams": hyperparams, "hardware": banking77.hardware()}
    text = banking77.as_markdown({**result, "runs": [run], "starts": {"cold": run}})
    assert "| 3 | 0.0% | 75.0% | 100 | 0 |" in text
    assert "| start | POST to first step, s | imports | rest |" in text
    assert "| cold | 9.0 | 5.0 | 4.0 |" in text


def test_without_the_data_it_says_so(tmp_path: Path) -> None:
    assert banking77.main(banking77.parse(["--data", str(tmp_path / "none"), "--out", str(tmp_path)])) == 2
    assert not list(tmp_path.iterdir())
