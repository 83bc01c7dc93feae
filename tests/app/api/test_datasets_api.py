"""/datasets over HTTP: an upload becomes a version or leaves nothing behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from builders_api import ROWS, Api, jsonl, make_api, serving, upload
from sqlalchemy import event, exc, func, select, text
from sqlalchemy.orm import Session
from waiting import until

from app.db.models import Dataset
from app.db.session import Database


def nothing_is_left(api: Api) -> bool:
    with api.database.platform() as session:
        return session.scalar(select(func.count()).select_from(Dataset)) == 0 and api.keys() == []


def test_an_upload_is_a_dataset_with_report_and_preview(api: Api) -> None:
    with api.client() as client:
        answer = upload(client)
        made = answer.json()
        assert answer.status_code == 201 and answer.headers["location"] == f"/api/v1/datasets/{made['id']}"
        assert (made["ref"], made["rows"], made["format"], made["status"]) == (
            "rows@1",
            8,
            "prompt_completion",
            "ready",
        )
        for ref in (made["id"], "rows", "rows@1"):
            assert client.get(f"/datasets/{ref}").json() == made
        assert client.get("/datasets/rows@2").status_code == 404
        assert client.get("/datasets/rows/report").json()["chars"]["max"] == 18
        rows = client.get("/datasets/rows/preview").json()["rows"]
        assert [row["row"] for row in rows] == [1, 2, 3]
        assert rows[0]["spans"][1] == {"role": "completion", "text": "answer 0", "loss": True, "truncated": False}
    assert api.keys() == [f"tenants/acme/datasets/{made['id']}/{name}" for name in ("rows.jsonl", "source")]
    assert api.storage.read_bytes(api.keys()[1]) == ROWS


def test_versions_of_a_name(api: Api) -> None:
    other = jsonl({"text": "t"})
    with api.client() as client:
        first = upload(client)
        again = upload(client, filename="renamed.jsonl")
        assert (again.status_code, again.json()) == (200, first.json())
        assert upload(client, other).json()["ref"] == "rows@2"
        assert upload(client).json()["ref"] == "rows@3"
        assert upload(client, other, "elsewhere").json()["ref"] == "elsewhere@1"
        assert [one["ref"] for one in client.get("/datasets", params={"name": "rows"}).json()["data"]] == [
            "rows@3",
            "rows@2",
            "rows@1",
        ]
        page = client.get("/datasets", params={"limit": 3}).json()
        rest = client.get("/datasets", params={"limit": 3, "after": page["data"][-1]["id"]}).json()
        assert (len(page["data"]), page["has_more"], len(rest["data"]), rest["has_more"]) == (3, True, 1, False)
    assert len(api.keys()) == 8, "the repeated upload stored nothing"


def test_the_same_upload_many_times_at_once_is_one_version(api: Api) -> None:
    with api.client() as client, ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: upload(client).json()["id"], range(16)))
    assert len(set(made)) == 1 and len(api.keys()) == 2


def test_the_file_s_name_is_the_name(api: Api) -> None:
    with api.client() as client:
        answer = client.post("/datasets", files={"file": ("My Data (final).train.jsonl", ROWS)})
        assert answer.json()["name"] == "my-data-final"


def test_csv_with_a_mapping(api: Api) -> None:
    content = b"frage,antwort\nwie?,so\n"
    with api.client() as client:
        form = {"map": ["prompt=frage", "completion=antwort"], "filename": "x.csv"}
        assert upload(client, content, **form).json()["format"] == "prompt_completion"
        error = upload(client, content, filename="x.csv").json()["error"]
        assert error["code"] == "csv_mapping_required" and "frage, antwort" in error["hint"]


BAD: list[tuple[bytes, dict[str, Any], int, str]] = [
    (b"", {}, 422, "empty_dataset"),
    (jsonl({"text": "good"}, {"text": ""}), {}, 422, "bad_rows"),
    (b'{"text": "caf\xe9"}\n', {}, 422, "not_utf8"),
    (b"a,b\n1,2\n", {"filename": "x.csv"}, 422, "csv_mapping_required"),
    (b"PAR1", {"filename": "x.parquet"}, 422, "bad_parquet"),
    (ROWS, {"name": "Not A Name"}, 422, "invalid_name"),
    (ROWS, {"format": "xml"}, 422, "invalid_format"),
    (ROWS, {"map": "prompt"}, 422, "invalid_map"),
    (ROWS, {"nmae": "x"}, 422, "unknown_field"),
]


def test_bad_uploads_leave_nothing(api: Api) -> None:
    with api.client() as client:
        for content, form, status, code in BAD:
            answer = upload(client, content, **form)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert client.post("/datasets", data={"name": "x"}, files={"x": b""}).status_code == 422
        by_uri = client.post("/datasets", json={"uri": "s3://x"})
        assert (by_uri.status_code, by_uri.json()["error"]["code"]) == (415, "unsupported_media_type")
        headers = {"content-type": "multipart/form-data; boundary=x"}
        for body in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: nothing\r\n\r\n1\r\n--x--"):
            assert client.post("/datasets", content=body, headers=headers).status_code == 422
        assert client.post("/datasets", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 422
    assert nothing_is_left(api)


def test_bad_rows_come_with_the_answer(api: Api) -> None:
    with api.client() as client:
        report = upload(client, jsonl({"text": "x"}, {"txt": "y"})).json()["error"]["report"]
    assert report["bad_rows_total"] == 1 and report["bad_rows"][0]["row"] == 2


@pytest.fixture
def small(database: Database, tmp_path: Path) -> Iterator[Api]:
    http = {"max_upload_bytes": 1_000_000, "max_body_bytes": 10_000}
    with serving(make_api(database, tmp_path, http=http)) as running:
        yield running


def test_a_file_over_the_limit_is_413_and_leaves_nothing(small: Api) -> None:
    with small.client() as client:
        answer = upload(client, b"x" * 2_000_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        # The same without a told length: found while it is read.
        token, boundary = client.headers["authorization"], "xyz"

        def endless() -> Iterator[bytes]:
            yield f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'.encode()
            for _ in range(40):
                yield b"x" * 100_000

        headers = {"content-type": f"multipart/form-data; boundary={boundary}", "authorization": token}
        try:
            chunked = client.post("/datasets", content=endless(), headers=headers)
            assert chunked.status_code == 413
        except httpx.WriteError:
            pass  # it answered and hung up while we still sent
        assert upload(client).status_code == 201
        assert len(small.keys()) == 2


def test_a_large_json_body_is_413_while_it_is_read(small: Api) -> None:
    with small.client() as client:
        answer = client.post("/finetune", json={"base_model": "x" * 20_000, "dataset_id": "y"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_calling_a_body_multipart_does_not_lift_its_limit(small: Api) -> None:
    with small.client() as client:
        for path in ("/environments", "/finetune"):
            assert client.post(path, files={"file": b"x" * 50_000}).status_code == 413, path


def test_a_client_that_leaves_in_the_middle_leaves_nothing(api: Api) -> None:
    place = urlsplit(api.url)
    head = (
        f"POST /api/v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token()}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    )
    for _ in range(3):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + ROWS * 100)
    with api.client() as client:
        assert client.get("/datasets").json()["data"] == []
    until(lambda: nothing_is_left(api))


def test_a_connection_that_dies_under_the_row_is_said_and_leaves_nothing(api: Api) -> None:
    """Between its INSERT and its reading: what SQLAlchemy knew of the row is gone then."""

    def cut(session: Session, _: object) -> None:
        pid = session.scalar(select(func.pg_backend_pid()))
        with api.database.platform() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 60000)"), {"pid": pid})

    with api.client() as client:
        event.listen(Session, "after_flush", cut, once=True)
        answer = upload(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable"), answer.text
        assert nothing_is_left(api)
        assert upload(client).status_code == 201


def test_a_connection_that_dies_behind_the_commit_takes_no_file_from_its_row(api: Api) -> None:
    """The server has committed, its answer is lost: whether there is a row, nobody knows."""

    def lost(_: Session) -> None:
        raise exc.OperationalError("COMMIT", None, ConnectionResetError("the server closed the connection"))

    def arm(session: Session, _: object) -> None:
        event.listen(session, "after_commit", lost, once=True)

    with api.client() as client:
        event.listen(Session, "after_flush", arm, once=True)
        answer = upload(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable"), answer.text
        again = upload(client)
        assert (again.status_code, again.json()["ref"]) == (200, "rows@1")
        with api.database.platform() as rows:
            assert {rows.scalars(select(Dataset.object_key)).one()} <= set(api.keys())


def test_a_deleted_dataset_is_gone_but_its_number_stays_used(api: Api, acme: httpx.Client) -> None:
    assert acme.delete("/datasets/rows").json()["deleted"] is True
    assert api.keys() == []
    assert acme.get("/datasets/rows").status_code == acme.delete("/datasets/rows").status_code == 404
    assert upload(acme).json()["ref"] == "rows@2"


def test_files_are_removed_from_where_they_were_stored(api: Api, acme: httpx.Client) -> None:
    """By a release that named its folders otherwise."""
    with api.database.platform() as session:
        row = session.scalars(select(Dataset)).one()
        old, row.object_key = row.object_key, f"tenants/acme/rows-of-old/{row.id}/rows.jsonl"
        with api.storage.reader(old) as content:
            api.storage.put_stream(row.object_key, content)
    assert set(api.keys()) > {row.object_key}
    assert acme.delete("/datasets/rows").status_code == 200
    assert row.object_key not in set(api.keys())


def test_a_dataset_that_a_job_needs_stays(acme: httpx.Client) -> None:
    job = acme.post("/finetune", json={"base_model": "tiny", "dataset_id": "rows"}).json()["id"]
    answer = acme.delete("/datasets/rows")
    assert answer.json()["error"]["code"] == "dataset_in_use" and answer.headers["x-should-retry"] == "false"
    acme.post(f"/finetune/{job}/cancel")
    assert acme.delete("/datasets/rows").status_code == 200


def test_messages_are_previewed_turn_by_turn(api: Api) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    row = {"messages": [*turns, turns[0], {"role": "assistant", "content": "b"}]}
    with api.client() as client:
        upload(client, json.dumps(row).encode())
        spans = client.get("/datasets/rows/preview").json()["rows"][0]["spans"]
    assert [(span["role"], span["loss"]) for span in spans] == [
        ("user", False),
        ("assistant", False),
        ("user", False),
        ("assistant", True),
    ]
