"""A small real HTTP server that keeps the contract of `/api/v1` as far as the command line needs it, and can misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from waiting import PATIENCE_S, until

TOKEN = "secret-token"
Row = dict[str, Any]


def error(status: int, code: str, message: str, *, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    body = {"message": message, "type": "x", "param": None, "code": code, "hint": None, "request_id": "req-7", **more}
    return JSONResponse({"error": body}, status, {"x-request-id": "req-7", **(headers or {})})


def job(status: str = "running", **more: Any) -> Row:
    details = {"state": status, "reason": "", "since": int(time.time()), "position": None}
    body = {"id": "ftjob-1", "status": status, "status_details": details, "created_at": 1, "attempt": 1, "error": None}
    return {**body, "base_model": "tiny", "dataset_id": "rows", "fine_tuned_model": None, "progress": None, **more}


def event(seq: int, type: str = "state", message: str = "", **data: Any) -> Row:
    return {
        "id": f"ftevent-{seq}",
        "seq": seq,
        "type": type,
        "level": "info",
        "message": message,
        "data": data,
        "created_at": 1,
    }


def step(seq: int, number: int, loss: float) -> Row:
    row = {"step": number, "loss": loss, "epoch": 0.1, "seconds": 0.5}
    return event(seq, "metrics", f"step {number}", **row, steps=[row])


@dataclass
class FakeService:
    """`answers`: responses that are given first, before the real ones. `cut_after`: an event stream breaks off after so
    many events, once for each number."""

    url: str = ""
    jobs: dict[str, Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    down_for: int = 0
    """So many answers are 503 after a stream broke."""
    ends_as: str | None = "succeeded"
    requests: list[tuple[str, str, Row]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    created: dict[str, Row] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    """Path and method → body: what simple requests answer."""
    logs: dict[int, list[str]] = field(default_factory=dict)
    """Attempt → lines."""
    newest: int | None = None
    """The attempt that wrote last, when the log is asked for; None: the last there is."""
    damaged: bool = False

    def seen(self, method: str, path: str) -> list[Row]:
        """The queries of such requests."""
        return [query for verb, place, query in self.requests if (verb, place) == (method, path)]


class Common:
    """Plain ASGI: Starlette's own middleware would end a broken stream as if all were well."""

    def __init__(self, app: ASGIApp, service: FakeService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        path = request.url.path.removeprefix("/api/v1")
        self.service.requests.append((request.method, path, dict(request.query_params)))
        self.service.headers.append(dict(request.headers))
        if self.service.answers:
            await self.service.answers.pop(0)(scope, receive, send)
        elif request.headers.get("authorization") != f"Bearer {TOKEN}":
            await error(401, "unauthorized", "no token", hint="send one")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def build(service: FakeService) -> FastAPI:
    app = FastAPI()

    app.add_middleware(Common, service=service)

    @app.post("/api/v1/finetune")
    async def create(request: Request) -> Response:
        body = await request.json()
        service.bodies.append(body)
        key = request.headers["idempotency-key"]
        if key not in service.created:
            made = job("queued", id=f"ftjob-{len(service.created) + 1}")
            service.created[key] = service.jobs[made["id"]] = made
        return JSONResponse(service.created[key], 202)

    @app.get("/api/v1/finetune")
    async def page(limit: int = 20, after: str | None = None) -> Row:
        rows = list(service.jobs.values())
        start = next((n + 1 for n, row in enumerate(rows) if row["id"] == after), 0)
        return {"object": "list", "data": rows[start : start + limit], "has_more": start + limit < len(rows)}

    @app.get("/api/v1/finetune/{id}")
    async def get(id: str) -> Any:
        return service.jobs.get(id) or error(404, "not_found", f"no job {id}")

    _told_of_a_job(app, service)
    _data_routes(app, service)

    @app.api_route("/api/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def other(request: Request, path: str) -> Response:
        body = await request.body()
        service.bodies.append(json.loads(body) if body else None)
        found = service.objects.get(f"{request.method} /{path}")
        if callable(found):
            found = found()
        return JSONResponse(found) if found is not None else error(404, "not_found", f"nothing at {path}")

    return app


def _told_of_a_job(app: FastAPI, service: FakeService) -> None:
    @app.get("/api/v1/finetune/{id}/events")
    async def events(request: Request, id: str) -> Response:
        if "text/event-stream" not in request.headers.get("accept", ""):
            after = int(request.query_params.get("after", 0))
            return JSONResponse(
                {"object": "list", "data": [e for e in service.events if e["seq"] > after], "has_more": False}
            )
        last = int(request.headers.get("last-event-id", 0))
        return StreamingResponse(_sse(service, id, last), media_type="text/event-stream")

    @app.get("/api/v1/finetune/{id}/checkpoints")
    async def checkpoints(id: str) -> Row:
        return {"object": "list", "data": [{"id": "ftckpt_1", "step": 8, "created_at": 1}], "has_more": False}

    @app.get("/api/v1/finetune/{id}/logs")
    async def logs(request: Request, id: str, tail: int | None = None, attempt: int | None = None) -> Response:
        attempt = attempt or service.newest or max(service.logs, default=1)
        lines = service.logs.get(attempt, [])
        if "text/event-stream" in request.headers.get("accept", ""):
            last = int(request.headers.get("last-event-id", 0))
            return StreamingResponse(_log_sse(service, id, attempt, last), media_type="text/event-stream")
        text = "".join(f"{line}\n" for line in (lines if tail is None else lines[len(lines) - tail :]))
        return Response(text, media_type="text/plain", headers={"x-log-attempt": str(attempt)})


def _data_routes(app: FastAPI, service: FakeService) -> None:
    @app.post("/api/v1/datasets")
    async def upload(request: Request) -> Row:
        async with request.form() as form:
            sent = {"name": form["name"], "map": form.getlist("map"), "format": form["format"]}
            data = await form["file"].read()  # type: ignore[union-attr]
        service.bodies.append({**sent, "data": data})
        return dataset(str(sent["name"]), data)

    @app.post("/api/v1/code")
    async def upload_code(request: Request) -> Row:
        async with request.form() as form:
            sent = form["file"]
            data = await sent.read()  # type: ignore[union-attr]
            name = form.get("name") or sent.filename.split(".")[0]  # type: ignore[union-attr]
        service.bodies.append({"name": form.get("name"), "filename": sent.filename, "data": data})  # type: ignore[union-attr]
        made = {"id": "code-1", "ref": f"{name}@1", "file_count": 2, "bytes": 10, "sha256": "a" * 64, "created_at": 1}
        return {**made, "files": None}

    @app.get("/api/v1/datasets/{id}/report")
    async def report(id: str) -> Row:
        return {"chars": {"min": 1, "p50": 2, "p95": 3, "max": 4}, "rows": 1, "bad_rows": []}

    @app.get("/api/v1/datasets/{id}/preview")
    async def preview(id: str) -> Row:
        spans = [
            {"role": "user", "text": "hi", "loss": False, "truncated": False},
            {"role": "assistant", "text": "yo", "loss": True, "truncated": False},
        ]
        return {"rows": [{"row": 1, "spans": spans}]}

    @app.get("/api/v1/models/{ref}/download")
    async def download(ref: str, output: str = "adapter") -> Response:
        archive = tar({f"{output}.bin": b"weights" * 1000})
        digest = hashlib.sha256(archive).hexdigest()
        return Response(archive[:-1] + b"x" if service.damaged else archive, headers={"x-content-sha256": digest})


async def _sse(service: FakeService, id: str, last: int) -> AsyncIterator[bytes]:
    cut = service.cut_after.pop(0) if service.cut_after else None
    for number, one in enumerate(row for row in service.events if row["seq"] > last):
        if number == cut:
            service.answers = [error(503, "unavailable", "database is down") for _ in range(service.down_for)]
            raise ConnectionAbortedError("the test breaks the stream")
        yield b": beat\n\n"
        yield f"id: {one['seq']}\nevent: {one['type']}\ndata: {json.dumps(one)}\n\n".encode()
        await asyncio.sleep(0)
    if service.ends_as is None:
        await asyncio.sleep(60)  # the stream stays open until the client leaves
    service.jobs[id] = {**service.jobs[id], "status": service.ends_as}


async def _log_sse(service: FakeService, id: str, attempt: int, last: int) -> AsyncIterator[bytes]:
    cut = service.cut_after.pop(0) if service.cut_after else None
    for number, line in enumerate(service.logs[attempt][last:], start=last):
        if number - last == cut:
            raise ConnectionAbortedError("the test breaks the stream")
        yield f"id: {number + 1}\nevent: log\ndata: {json.dumps({'line': line})}\n\n".encode()
    newest = attempt == max(service.logs)
    service.jobs[id] = {**service.jobs[id], "status": "failed" if newest else "running", "attempt": max(service.logs)}


def dataset(name: str, data: bytes) -> Row:
    facts = {"format": "messages", "task": "causal_lm", "rows": data.count(b"\n"), "bytes": len(data), "warnings": []}
    return {
        "id": "file-1",
        "name": name,
        "version": 1,
        "sha256": hashlib.sha256(data).hexdigest(),
        "created_at": 1,
        **facts,
    }


def tar(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"model/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


@contextmanager
def serving(service: FakeService) -> Iterator[FakeService]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(build(service), log_config=None, timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        until(lambda: server.started)
        yield service
        server.should_exit = True
        thread.join(PATIENCE_S)
