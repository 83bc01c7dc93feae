"""A job's life as its tenant sees it: states, actions, events as pages and streams, logs, metrics, checkpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from builders_api import Api
from builders_db import make_job
from httpx_sse import connect_sse
from sqlalchemy import text

from app.db.events import NewEvent, append_event
from app.db.models import Checkpoint, Job, Model, ModelVersion, Step
from app.db.transitions import Change, transition
from app.services import events
from app.services.job_view import STATUS
from cluster.core.job import JobState

MINIMAL = {"base_model": "tiny", "dataset_id": "rows"}


@pytest.fixture
def job(acme: httpx.Client) -> str:
    return str(acme.post("/finetune", json=MINIMAL).json()["id"])


def move(api: Api, job_id: str, *states: JobState, error: dict[str, str | None] | None = None) -> None:
    for state in states:
        with api.database.platform() as session:
            row = session.get_one(Job, job_id, with_for_update=True)
            assert transition(session, row, Change(state, f"to {state}", error if state == "failed" else None))


def say(api: Api, job_id: str, message: str, type: str = "log", **data: Any) -> None:
    with api.database.platform() as session:
        append_event(session, job_id, NewEvent(type, message, data=data))


def followed(client: httpx.Client, path: str, last_id: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    headers = {"accept": "text/event-stream", **({"last-event-id": last_id} if last_id else {})}
    with connect_sse(client, "GET", path, headers=headers) as source:
        assert source.response.status_code == 200, source.response.read()
        for event in source.iter_sse():
            yield event.id, json.loads(event.data)


def test_every_state_has_its_status(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        made = {make_job(session, "acme", state=state).id: STATUS[state] for state in JobState}
    shown = {one["id"]: one["status"] for one in acme.get("/finetune", params={"limit": 100}).json()["data"]}
    assert made == shown
    for status in ("running", "queued", "paused"):
        page = acme.get("/finetune", params={"status": status}).json()["data"]
        assert {one["id"] for one in page} == {key for key, value in made.items() if value == status}
    assert acme.get("/finetune", params={"status": "odd"}).status_code == 422


def test_lists_have_order_fields_and_pages(acme: httpx.Client) -> None:
    ids = [acme.post("/finetune", json=MINIMAL).json()["id"] for _ in range(3)]
    page = acme.get("/finetune", params={"fields": "id,status", "sort": "created_at", "limit": 2}).json()
    assert page == {"object": "list", "data": [{"id": key, "status": "queued"} for key in ids[:2]], "has_more": True}
    rest = acme.get("/finetune", params={"sort": "created_at", "after": ids[1]}).json()
    assert [one["id"] for one in rest["data"]] == ids[2:]
    assert [one["id"] for one in acme.get("/finetune").json()["data"]] == ids[::-1]
    assert acme.get("/finetune", params={"fields": "id,sttus"}).status_code == 422


def test_actions(api: Api, acme: httpx.Client, job: str) -> None:
    def act(what: str) -> httpx.Response:
        return acme.post(f"/finetune/{job}/{what}")

    assert act("pause").json()["status"] == "paused"
    assert act("resume").json()["status"] == "queued"
    refused = act("resume")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    move(api, job, JobState.PREPARING, JobState.RUNNING)
    assert act("cancel").json()["status"] == "running"  # a wish: the driver ends it
    with api.database.platform() as session:
        assert session.get_one(Job, job).wish == "cancel"
    failure = {"code": "out_of_memory", "message": "m", "param": None, "hint": "h", "fixable_by": "user"}
    move(api, job, JobState.FAILED, error=failure)
    assert acme.get(f"/finetune/{job}").json()["error"] == failure
    assert act("retry").json()["status"] == "queued"
    assert act("cancel").json()["status"] == "cancelled"
    assert act("retry").status_code == act("pause").status_code == 409


def test_a_retry_needs_its_data(api: Api, acme: httpx.Client, job: str) -> None:
    move(api, job, JobState.FAILED, error={"code": "c", "message": "m"})
    assert acme.delete("/datasets/rows").status_code == 200
    assert acme.post(f"/finetune/{job}/retry").json()["error"]["code"] == "dataset_deleted"


def test_a_retry_needs_the_model_that_it_continues_from(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        first = make_job(session, "acme", state="succeeded")
        session.add(Model(id="model-1", tenant_id="acme", name="tuned", last_version=1))
        session.flush()
        keys = {"id": "mv-1", "model_id": "model-1", "job_id": first.id, "tenant_id": "acme", "version": 1}
        session.add(ModelVersion(**keys, kind="adapter", prefix="p", files={}, metrics={}, lineage={}))
        session.flush()
        failed = make_job(session, "acme", state="failed", parent_version_id="mv-1").id
    assert acme.delete("/models/tuned").status_code == 200
    answer = acme.post(f"/finetune/{failed}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_deleted")


def test_events_as_pages(api: Api, acme: httpx.Client, job: str) -> None:
    for number in range(3):
        say(api, job, f"m{number}")
    path = f"/finetune/{job}/events"
    first = acme.get(path, params={"limit": 2}).json()
    assert [event["seq"] for event in first["data"]] == [1, 2] and first["has_more"]
    for after in (first["data"][-1]["id"], "2"):
        rest = acme.get(path, params={"after": after}).json()
        assert [event["seq"] for event in rest["data"]] == [3, 4, 5] and not rest["has_more"]
    assert acme.get(path, params={"after": "ftevent-nope"}).status_code == 422
    assert acme.get(path, params={"after": "x"}).status_code == 422


def test_a_follower_misses_nothing_and_ends_with_the_job(api: Api, acme: httpx.Client, job: str) -> None:
    def live() -> None:
        for number in range(50):
            say(api, job, f"live {number}")
        move(api, job, JobState.CANCELLED)

    writer = threading.Thread(target=live)
    writer.start()
    seen = list(followed(acme, f"/finetune/{job}/events"))
    writer.join()
    assert [int(key) for key, _ in seen] == [event["seq"] for _, event in seen] == list(range(1, 54))
    assert seen[-1][1]["data"]["status"] == "cancelled"
    assert [key for key, _ in followed(acme, f"/finetune/{job}/events", "50")] == ["51", "52", "53"]
    assert list(followed(acme, f"/finetune/{job}/events", "53")) == []


def test_a_follower_is_told_at_once(api: Api, acme: httpx.Client, job: str) -> None:
    events = followed(acme, f"/finetune/{job}/events", "2")
    threading.Timer(0.3, say, (api, job, "news")).start()
    assert next(events)[1]["message"] == "news"
    events.close()  # type: ignore[attr-defined]


def test_what_cannot_be_followed_is_refused_before_the_stream(acme: httpx.Client, job: str) -> None:
    accept = {"accept": "text/event-stream"}
    assert acme.get("/finetune/nope/events", headers=accept).status_code == 404
    for last in ("x", "-1", "9" * 40):
        answer = acme.get(f"/finetune/{job}/events", headers={**accept, "last-event-id": last})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_cursor")
    assert acme.get("/events", headers={**accept, "last-event-id": "x"}).status_code == 422
    assert acme.get("/finetune/nope/logs", params={"follow": "true"}).status_code == 404


def test_the_tenant_s_tail_waits_for_what_is_still_open(api: Api, acme: httpx.Client, job: str) -> None:
    """A transaction that is held open while later ones commit: its event is neither lost nor overtaken."""
    with api.database.platform() as session:
        other = make_job(session, "acme").id
        foreign = make_job(session, "rival").id
    events = followed(acme, "/events", "0:0:")
    assert [next(events)[1]["job_id"] for _ in range(2)] == [job, job]
    with api.database.platform() as held:
        append_event(held, other, NewEvent("log", "first"))
        say(api, job, "second")
        say(api, foreign, "not ours")
        held.execute(text("SELECT pg_sleep(0.3)"))
    seen = [next(events) for _ in range(2)]
    assert [event["message"] for _, event in seen] == ["first", "second"]
    events.close()  # type: ignore[attr-defined]
    again = followed(acme, "/events", seen[0][0])
    assert next(again)[1]["message"] == "second"
    again.close()  # type: ignore[attr-defined]


def write_log(api: Api, job_id: str, number: int, content: str, place: str = "a1/r0") -> None:
    api.storage.put_bytes(f"tenants/acme/jobs/{job_id}/logs/{place}/{number:06d}.log", content.encode())


def test_logs_are_one_text(api: Api, acme: httpx.Client, job: str) -> None:
    path = f"/finetune/{job}/logs"
    empty = acme.get(path)
    assert (empty.status_code, empty.text, empty.headers["x-log-next-offset"]) == (200, "", "0")
    write_log(api, job, 0, "one\ntw")
    write_log(api, job, 1, "o\nthree\n")
    write_log(api, job, 0, "other rank\n", "a1/r1")
    write_log(api, job, 0, "second try\n", "a2/r0")
    assert acme.get(path).text == "second try\n"
    first = {"attempt": 1}
    assert acme.get(path, params=first).text == "one\ntwo\nthree\n"
    assert acme.get(path, params={**first, "rank": 1}).text == "other rank\n"
    assert acme.get(path, params={**first, "tail": 2}).text == "two\nthree\n"
    assert acme.get(path, params={**first, "tail": 0}).text == ""
    assert acme.get(path, params={**first, "tail": 99}).text == "one\ntwo\nthree\n"
    assert acme.get(path, params={**first, "offset": 5}).text == "wo\nthree\n"
    assert acme.get(path, params=first).headers["x-log-next-offset"] == "14"


def test_logs_are_followed_until_the_attempt_ends(
    api: Api, acme: httpx.Client, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK_EVERY_S", 0.1)
    write_log(api, job, 0, "one\ntw")
    lines = followed(acme, f"/finetune/{job}/logs?follow=true")
    assert next(lines)[1]["line"] == "one"
    write_log(api, job, 1, "o\nend")
    move(api, job, JobState.CANCELLED)
    assert [(key, line["line"]) for key, line in lines] == [("8", "two"), ("12", "end")]
    assert [line["line"] for _, line in followed(acme, f"/finetune/{job}/logs?attempt=1", "8")] == ["end"]


def test_metrics_keep_both_ends(api: Api, acme: httpx.Client, job: str) -> None:
    with api.database.platform() as session:
        fixed = {"job_id": job, "tenant_id": "acme", "attempt": 1, "lr": 1e-4, "grad_norm": 1.0, "tokens": 9}
        session.add_all(Step(**fixed, step=n, epoch=n / 100, loss=1 / n, seconds=0.5) for n in range(1, 1001))
    say(api, job, "evaluated", "evaluated", when="before", loss=3.0, exact_match=0.0)
    metrics = acme.get(f"/finetune/{job}/metrics", params={"points": 11}).json()
    assert [row["step"] for row in metrics["data"]] == [1 + place * 999 // 10 for place in range(11)]
    assert metrics["total_steps"] == 1000 and metrics["evaluations"][0]["when"] == "before"
    assert len(acme.get(f"/finetune/{job}/metrics").json()["data"]) == 500
    shown = acme.get(f"/finetune/{job}").json()["progress"]
    assert (shown["step"], shown["seconds_per_step"]) == (1000, 0.5)


def test_checkpoints_newest_first(api: Api, acme: httpx.Client, job: str) -> None:
    with api.database.platform() as session:
        for step in (1, 2):
            row = {
                "id": f"ftckpt_{step}",
                "job_id": job,
                "tenant_id": "acme",
                "attempt": 1,
                "step": step,
                "prefix": "p",
            }
            session.add(Checkpoint(**row, files={"f": "h"}, metrics={}))
            session.flush()
    page = acme.get(f"/finetune/{job}/checkpoints").json()
    assert {one["step"] for one in page["data"]} == {1, 2}


def test_explain_says_why_it_waits(api: Api, acme: httpx.Client, job: str) -> None:
    told = acme.get(f"/finetune/{job}/explain").json()
    assert (told["position"], told["reasons"]) == (1, [])
    move(api, job, JobState.PREPARING)
    assert acme.get(f"/finetune/{job}/explain").json()["position"] is None
