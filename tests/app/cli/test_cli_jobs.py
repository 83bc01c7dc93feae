"""`finetune` and `jobs`: what is sent, what is shown, exit codes, streams that break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_said import Run
from fake_service import TOKEN, FakeService, error, event, job, step
from fastapi import Response

TRAIN = ("finetune", "--base-model", "tiny", "--dataset", "rows")


def test_options_become_the_body(cli: Run, service: FakeService) -> None:
    said = cli(
        *TRAIN, "--hyper", "lr=3e-5", "--hyper", "epochs=2", "--gpus", "A100:8", "--mem-limit-gb", "48", "--json"
    )
    assert said.code == 0
    assert said.json["id"] == "ftjob-1"
    assert service.bodies == [
        {
            "base_model": "tiny",
            "dataset_id": "rows",
            "hyperparams": {"lr": 3e-5, "epochs": 2},
            "resource_config": {"gpu_type": "A100", "num_gpus": 8, "mem_limit_gb": 48.0},
        }
    ]


def test_a_file_is_the_body_and_options_win(cli: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("base_model: tiny\ndataset_id: rows\nhyperparams: {lr: 3e-5, epochs: 1}\npriority: low\n")
    assert cli("finetune", "-f", str(file), "--hyper", "epochs=4").code == 0
    assert service.bodies[0]["hyperparams"] == {"lr": 3e-5, "epochs": 4}
    assert service.bodies[0]["priority"] == "low"


@pytest.mark.parametrize(
    "wrong",
    [
        ("finetune", "--dataset", "rows"),
        (*TRAIN, "--hyper", "lr"),
        (*TRAIN, "--gpus", "A100:many"),
        (*TRAIN, "--from", "other@1"),
        (*TRAIN, "--max-runtime", "soon"),
        ("finetune", "-f", "/nowhere.yaml"),
        ("finetune", "--no-such-option"),
        ("jobs", "show"),
    ],
)
def test_wrong_use_is_2_and_reaches_no_service(cli: Run, service: FakeService, wrong: tuple[str, ...]) -> None:
    said = cli(*wrong)
    assert said.code == 2
    assert said.err
    assert service.requests == []


def test_dry_run_creates_nothing(cli: Run, service: FakeService) -> None:
    service.objects["POST /finetune/estimate"] = {"base_model": "tiny", "estimate": {"memory_gb": 3.5}}
    said = cli(*TRAIN, "--dry-run", "--json")
    assert said.json["estimate"] == {"memory_gb": 3.5}
    assert service.created == {}


def test_a_post_is_sent_again_with_the_same_key(cli: Run, service: FakeService) -> None:
    service.answers = [error(503, "unavailable", "later", headers={"retry-after": "0"}), Response(status_code=502)]
    assert cli(*TRAIN).code == 0
    keys = {headers["idempotency-key"] for headers in service.headers}
    assert len(service.headers) == 3
    assert len(keys) == 1
    assert len(service.created) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, 4), (403, 4), (404, 2), (409, 2), (422, 2), (429, 4), (500, 3)],
)
def test_exit_code_of_an_error(cli: Run, service: FakeService, status: int, code: int) -> None:
    service.answers = [error(status, "some_code", "it went wrong", hint="mend it", param="hyperparams.lr")]
    said = cli(*TRAIN)
    assert said.code == code
    for part in ("it went wrong", "mend it", "hyperparams.lr", "some_code", "req-7"):
        assert part in said.err
    assert said.out == ""
    assert len(service.requests) == 1


def test_should_retry_false_ends_it(cli: Run, service: FakeService) -> None:
    service.answers = [error(503, "x", "no", headers={"x-should-retry": "false"})]
    assert cli("jobs", "ls").code == 3
    assert len(service.requests) == 1


def test_an_error_as_json(cli: Run, service: FakeService) -> None:
    import json

    service.answers = [error(422, "unknown_key", "no", param="lr")]
    said = cli(*TRAIN, "--json")
    assert json.loads(said.err)["error"]["code"] == "unknown_key"
    assert json.loads(said.err)["error"]["request_id"] == "req-7"


def test_unreachable_is_3(offline: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.client.Retry.wait_s", lambda *_: 0.0)
    said = offline("--url", "http://127.0.0.1:9", "jobs", "ls")
    assert said.code == 3
    assert "127.0.0.1:9" in said.err


def test_pages_are_followed(cli: Run, service: FakeService) -> None:
    service.jobs = {f"ftjob-{n}": job(id=f"ftjob-{n}") for n in range(250)}
    assert len(cli("jobs", "ls", "--limit", "230", "--json").json["data"]) == 230
    assert [query["limit"] for query in service.seen("GET", "/finetune")] == ["100", "100", "30"]


@pytest.mark.parametrize("words", [("jobs", "ls"), ("job", "list"), ("jobs", "list"), ("job", "ls")])
def test_singular_plural_and_synonyms(cli: Run, service: FakeService, words: tuple[str, ...]) -> None:
    service.jobs = {"ftjob-1": job()}
    said = cli(*words)
    assert said.code == 0
    assert "ftjob-1" in said.out


@pytest.mark.parametrize("words", [("--json", "jobs", "ls"), ("jobs", "--json", "ls"), ("jobs", "ls", "--json")])
def test_json_stands_anywhere(cli: Run, words: tuple[str, ...]) -> None:
    assert cli(*words).json == {"object": "list", "data": []}


# Watching


def watched(service: FakeService, *events: dict[str, Any]) -> None:
    service.jobs = {"ftjob-1": job(progress={"step": 0, "steps": 3})}
    service.events = list(events)


STEPS = (step(1, 1, 3.0), step(2, 2, 2.0), step(3, 3, 1.0), event(4, "state", "done", state="succeeded"))


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 5)])
def test_watch_leaves_with_the_jobs_fate(cli: Run, service: FakeService, status: str, code: int) -> None:
    watched(service, *STEPS)
    service.ends_as = status
    said = cli("jobs", "watch", "ftjob-1")
    assert said.code == code
    assert "step 2/3  loss 2.0000" in said.out
    assert status in said.out


def test_watch_as_json_is_an_object_a_line(cli: Run, service: FakeService) -> None:
    watched(service, *STEPS)
    lines = cli("jobs", "watch", "ftjob-1", "--json").lines
    assert [line.get("seq") for line in lines] == [1, 2, 3, 4, None]
    assert lines[-1]["status"] == "succeeded"


@pytest.mark.parametrize("cuts", [[0], [1], [2, 0, 1], [1, 1, 1]])
def test_watch_survives_a_broken_connection_and_503(cli: Run, service: FakeService, cuts: list[int]) -> None:
    """Every event once, in order, wherever the stream broke."""
    watched(service, *STEPS)
    service.cut_after = list(cuts)
    said = cli("jobs", "watch", "ftjob-1", "--json")
    assert said.code == 0
    assert [line["seq"] for line in said.lines[:-1]] == [1, 2, 3, 4]
    assert service.cut_after == []


def test_watch_waits_out_a_service_that_is_down(cli: Run, service: FakeService) -> None:
    watched(service, *STEPS)
    service.cut_after = [2]
    service.down_for = 12
    said = cli("jobs", "watch", "ftjob-1", "--json")
    assert said.code == 0
    assert [line["seq"] for line in said.lines[:-1]] == [1, 2, 3, 4]
    assert service.answers == []


def test_a_stream_that_is_closed_early_is_opened_again(
    cli: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.commands.watch.REOPEN_S", 0.01)
    watched(service, *STEPS)
    service.ends_as = "running"
    monkeypatch.setattr("app.cli.commands.watch.time.sleep", lambda _s: setattr(service, "ends_as", "succeeded"))
    said = cli("jobs", "watch", "ftjob-1", "--json")
    assert [line.get("seq") for line in said.lines] == [1, 2, 3, 4, None]


def test_ctrl_c_detaches_with_130(service: FakeService, home: Path) -> None:
    watched(service, STEPS[0])
    service.ends_as = None
    environment = {**os.environ, "HELIOSTAT_URL": service.url, "HELIOSTAT_TOKEN": TOKEN}
    command = [sys.executable, "-m", "app.cli.main", "jobs", "watch", "ftjob-1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "step 1/3" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "heliostat jobs watch ftjob-1" in said


def test_show_of_a_failed_job_says_what_to_do(cli: Run, service: FakeService) -> None:
    failed = {"code": "out_of_memory", "message": "no memory left", "hint": "smaller rows", "fixable_by": "user"}
    service.jobs["ftjob-1"] = job(
        "failed",
        error=failed,
        progress={"step": 9, "steps": 40},
        resource_config={"mem_limit_gb": 4},
    )
    service.logs = {1: ["first", "last words\x1b[2J"]}
    said = cli("jobs", "show", "ftjob-1")
    for part in (
        "out_of_memory",
        "no memory left",
        "yours",
        "smaller rows",
        "step 9 of 40",
        "limit 4 GiB",
    ):
        assert part in said.out
    assert "step 8" in said.out
    assert "heliostat jobs logs ftjob-1" in said.out
    assert "last words" in said.out
    assert "\x1b" not in said.out


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
def test_steering(cli: Run, service: FakeService, verb: str) -> None:
    service.objects[f"POST /finetune/ftjob-1/{verb}"] = job("queued")
    said = cli("jobs", verb, "ftjob-1")
    assert said.code == 0
    assert "ftjob-1 is queued" in said.out


def test_events_and_explain(cli: Run, service: FakeService) -> None:
    watched(service, *STEPS)
    service.objects["GET /finetune/ftjob-1/explain"] = {
        "position": 2,
        "reasons": [{"code": "busy", "message": "no slot"}],
    }
    assert "done" in cli("jobs", "events", "ftjob-1").out
    assert [line["seq"] for line in cli("jobs", "events", "ftjob-1", "-f", "--json").lines] == [1, 2, 3, 4]
    assert "no slot" in cli("jobs", "explain", "ftjob-1").out


def test_logs(cli: Run, service: FakeService) -> None:
    service.jobs["ftjob-1"] = job()
    service.logs = {1: ["a1"], 2: ["b1", "b2", "b3"]}
    assert cli("jobs", "logs", "ftjob-1").out == "b1\nb2\nb3\n"
    assert cli("jobs", "logs", "ftjob-1", "--tail", "2").out == "b2\nb3\n"
    assert cli("jobs", "logs", "ftjob-1", "--attempt", "1", "--json").lines == [{"line": "a1", "attempt": 1, "rank": 0}]


@pytest.mark.parametrize("cuts", [[], [1], [0, 2]])
def test_followed_logs_go_on_over_breaks_and_attempts(cli: Run, service: FakeService, cuts: list[int]) -> None:
    service.jobs["ftjob-1"] = job()
    service.logs = {1: ["a1", "a2", "a3"]}
    service.cut_after = list(cuts)
    assert cli("jobs", "logs", "-f", "ftjob-1").out == "a1\na2\na3\n"
    service.jobs["ftjob-1"] = job()
    service.logs[2] = ["b1"]
    assert cli("jobs", "logs", "-f", "ftjob-1", "--attempt", "1").out == "a1\na2\na3\n"
    service.logs = {1: ["a1"], 2: ["b1"]}
    service.jobs["ftjob-1"] = job()
    service.newest = 1
    assert cli("jobs", "logs", "-f", "ftjob-1").out == "a1\nb1\n"


def test_nothing_sleeps_long() -> None:
    """The first tries are quick: a service on this machine that is down is told of within seconds."""
    from app.cli.client import Retry

    started = time.monotonic()
    assert sum(Retry().wait_s(attempt, None) for attempt in range(Retry().attempts - 1)) < 5
    assert time.monotonic() - started < 1
