"""What users get wrong, and what they are told: each a 4xx with code, field and hint, and nothing left behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders_api import Api, jsonl, make_api, serving, upload
from sqlalchemy import func, select

from app.db.models import Dataset, Environment, Job, Tenant
from app.db.session import Database

MINIMAL = {"base_model": "tiny", "dataset_id": "rows"}
MIB = 1024 * 1024


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code and error["hint"], error
    return error


@pytest.mark.parametrize(
    ("field", "ref", "meant"),
    [
        ("base_model", "tinny", "tiny"),
        ("dataset_id", "row", "rows"),
        ("dataset_id", "rovs@1", "rows"),
        ("validation_dataset_id", "rowss", "rows"),
        ("environment", "mime", "mine"),
    ],
)
def test_an_unknown_name_says_what_may_have_been_meant(acme: httpx.Client, field: str, ref: str, meant: str) -> None:
    if field == "environment":
        assert acme.post("/environments", json={"spec": "name: mine\n"}).status_code == 201
    kind = field.removeprefix("validation_").removesuffix("_id")
    error = refused(acme.post("/finetune", json={**MINIMAL, field: ref}), 404, f"{kind}_not_found")
    assert error["param"] == field and f"Did you mean `{meant}`?" in error["hint"]


def test_what_may_have_been_meant_is_never_another_tenant_s(api: Api, acme: httpx.Client) -> None:
    with api.client("rival") as rival:
        answer = rival.get("/datasets/row")
        assert refused(answer, 404, "dataset_not_found") and "rows" not in answer.text
        upload(rival, name="rowing")
        assert "Did you mean `rowing`?" in rival.get("/datasets/row").json()["error"]["hint"]


@pytest.mark.parametrize(
    ("body", "param", "hint"),
    [
        ({"hyperparams": {"lr": 7}}, "hyperparams.lr", "range"),
        ({"hyperparams": {"lr": "fast"}}, "hyperparams.lr", "number"),
        ({"hyperparams": {"epochs": "3"}}, "hyperparams.epochs", "quotes"),
        ({"method": "sfft"}, "method", "Did you mean `sft`?"),
        ({"priority": "hihg"}, "priority", "Did you mean `high`?"),
        ({"output_model": "No Such Name"}, "output_model", "a–z"),
        ({"resource_config": None}, "resource_config", "object"),
        ({"base_model": ""}, "base_model", "/docs"),
        ({"resource_config": {"gpu_type": 5}}, "resource_config.gpu_type", "text"),
    ],
)
def test_a_value_that_does_not_do_comes_with_a_hint(
    acme: httpx.Client, body: dict[str, Any], param: str, hint: str
) -> None:
    error = refused(acme.post("/finetune", json={**MINIMAL, **body}), 422, "invalid_value")
    assert error["param"] == param and hint in error["hint"], error


def test_a_missing_field_comes_with_a_hint(acme: httpx.Client) -> None:
    error = refused(acme.post("/finetune", json={"base_model": "tiny"}), 422, "missing_field")
    assert error["param"] == "dataset_id"


def test_broken_and_deep_json_is_400_with_a_hint(acme: httpx.Client) -> None:
    headers = {"content-type": "application/json", "idempotency-key": "k"}
    for content in (b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff"):
        answer = acme.post("/finetune", content=content, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["hint"], answer.text


def test_long_nonsense_is_refused_at_once(acme: httpx.Client) -> None:
    """Looking for what was meant must not take the server minutes."""
    for body in ({"x" * 900_000: 1}, {"resource_config": {"gpu_type": "x" * 900_000}}, {"base_model": "y" * 900_000}):
        began = time.process_time()
        answer = acme.post("/finetune", json={**MINIMAL, **body})
        assert answer.status_code == 422 and len(answer.text) < 4000
        assert time.process_time() - began < 1.5


def test_an_unknown_form_field_says_what_may_have_been_meant(api: Api) -> None:
    with api.client() as client:
        assert "Did you mean `format`?" in refused(upload(client, fromat="x"), 422, "unknown_field")["hint"]


def parquet(column: str, values: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: values}), sink)
    return bytes(sink.getvalue())


def far_future() -> Any:
    return pa.array([2**55], pa.timestamp("ms"))


def messages_with(name: Any) -> Any:
    turns = [{"role": "user", "content": "q", "name": name}, {"role": "assistant", "content": "a", "name": name}]
    return pa.array([turns])


DEEP = b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": ' + b"[" * 500 + b"]" * 500 + b"}]}\n"
ODD: list[tuple[str, Callable[[], bytes], str]] = [
    ("x.parquet", lambda: parquet("messages", messages_with(b"\xff")), "bad_rows"),
    ("x.parquet", lambda: parquet("text", far_future()), "bad_parquet"),
    ("x.parquet", lambda: parquet("text", pa.array([1, 2])), "bad_rows"),
    ("x.jsonl", lambda: DEEP, "bad_rows"),
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "\\ud800"}\n', "bad_rows"),
    ("x.csv", lambda: b'a,b\n"1,2\n', "not_csv"),
    ("x.json", lambda: b'{"a": 1', "bad_rows"),
]


@pytest.mark.parametrize(("filename", "content", "code"), ODD)
def test_odd_files_are_refused_and_leave_nothing(
    api: Api, filename: str, content: Callable[[], bytes], code: str
) -> None:
    with api.client() as client:
        form = {"map": "text=b"} if filename.endswith("csv") else {}
        refused(upload(client, content(), filename=filename, **form), 422, code)
    with api.database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Dataset)) == 0 and api.keys() == []


def test_one_row_is_enough_and_warned_of(acme: httpx.Client) -> None:
    assert "one row only" in upload(acme, jsonl({"text": "t"}), "single").json()["warnings"][0]
    job = acme.post("/finetune", json={**MINIMAL, "dataset_id": "single"})
    assert job.status_code == 202, job.text


def test_a_viewer_s_upload_is_refused_before_it_is_read(api: Api) -> None:
    with api.client("acme", "viewer") as viewer:
        answer = head_only(api, viewer.headers["authorization"], f"Content-Length: {100 * MIB}")
    assert answer.startswith("HTTP/1.1 403") and "role_forbids" in answer


def head_only(api: Api, token: str, length: str, first: bytes = b"") -> str:
    """The answer to an upload of which only the headers (and `first`) are sent."""
    place = urlsplit(api.url)
    head = (
        f"POST /api/v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\n{length}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(head.encode() + first)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer.decode()


def test_two_gigabytes_are_refused_before_a_byte_of_them_is_read(api: Api) -> None:
    token = f"Bearer {api.token()}"
    answer = head_only(api, token, f"Content-Length: {2 * 1024**3}")
    assert answer.startswith("HTTP/1.1 413") and '"too_large"' in answer and "max_upload_bytes" in answer


@pytest.fixture
def limited(database: Database, tmp_path: Path) -> Iterator[Api]:
    with serving(make_api(database, tmp_path, http={"max_upload_bytes": 24 * MIB})) as running:
        yield running


def test_an_endless_upload_ends_at_the_limit_in_flat_memory(limited: Api) -> None:
    """Without a told length the limit is met while it is read; 2 GiB would follow, of which hardly more is taken."""
    process, chunk, sent = psutil.Process(), b"x" * MIB, 0
    peak = before = process.memory_info().rss

    def body() -> Iterator[bytes]:
        nonlocal sent, peak
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n{"text": "'
        for _ in range(2048):
            sent += 1
            peak = max(peak, process.memory_info().rss)
            yield chunk

    with limited.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/datasets", content=body(), headers=headers)
    refused(answer, 413, "too_large")
    assert 24 <= sent < 64 and peak - before < 16 * MIB
    assert limited.keys() == []


def test_an_operator_s_misspelt_tenant_is_told_and_not_made(api: Api, acme: httpx.Client) -> None:
    with api.client(None, "operator") as operator:
        for named in ("acmee", "not a tenant", "../x"):
            for headers in ({}, {"idempotency-key": "k"}):
                answer = operator.post("/finetune", json={**MINIMAL, "tenant_id": named}, headers=headers)
                refused(answer, 404, "tenant_not_found")
            refused(operator.get("/finetune", params={"tenant_id": named}), 404, "tenant_not_found")
    with api.database.platform() as session:
        assert set(session.scalars(select(Tenant.id))) == {"acme"}


def test_an_environment_that_cannot_be_solved_comes_with_the_resolver_s_reason(api: Api) -> None:
    """Without an index: the base's own packages contradict what the file asks for."""
    spec = "name: x\ndependencies:\n  - python\n  - pip:\n    - torch==0.0.1\n"
    with api.client() as client:
        answer = client.post("/environments", json={"spec": spec})
        assert answer.status_code == 422 and "torch" in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] and answer.json()["error"]["hint"]
    with api.database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Environment)) == 0


def test_a_refused_request_leaves_no_job_and_no_key(api: Api, acme: httpx.Client) -> None:
    for change in ({"dataset_id": "nope"}, {"hyperparams": {"lr": -1}}, {"base_model": "big"}):
        answer = acme.post("/finetune", json={**MINIMAL, **change}, headers={"idempotency-key": json.dumps(change)})
        assert 400 <= answer.status_code < 500
    with api.database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
        assert session.connection().exec_driver_sql("SELECT count(*) FROM idempotency_keys").scalar() == 0


def test_a_misspelt_filter_does_not_answer_with_everything(acme: httpx.Client) -> None:
    error = refused(acme.get("/finetune", params={"staus": "failed"}), 422, "unknown_field")
    assert (error["param"], error["hint"]) == ("staus", "Did you mean `status`?")
    assert acme.get("/finetune", params={"status": "failed", "limit": 1, "tenant_id": "acme"}).status_code == 200
