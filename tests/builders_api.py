"""A real API over a real database for tests: uvicorn on 127.0.0.1, tokens of the built-in issuer."""

from __future__ import annotations

import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from builders_db import make_base_model, make_node
from fastapi import FastAPI
from waiting import PATIENCE_S, until

from app.auth.issuer import Issuer, TokenRequest
from app.auth.verify import make_verifier
from app.db.session import Database
from app.main import AppParts, create_app, make_services
from app.settings import Settings
from cluster.storage.objects import ObjectStore

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ROWS = jsonl(*({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(8)))


@dataclass
class Api:
    """The application, its parts, and clients of its tenants."""

    app: FastAPI
    database: Database
    storage: ObjectStore
    settings: Settings
    issuer: Issuer
    url: str = ""

    def token(self, tenant: str | None = "acme", role: str = "admin", **fields: Any) -> str:
        return self.issuer.create(TokenRequest(tenant, role, **fields)).token

    def client(self, tenant: str | None = "acme", role: str = "admin", **fields: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.token(tenant, role, **fields)}"}
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=PATIENCE_S, trust_env=False)

    def add_cluster(self, kind: str = "cpu", memory_gb: float = 8.0, base: str = "tiny") -> None:
        """A node, a base model and one that is too big for it."""
        with self.database.platform() as session:
            make_node(session, f"node-{kind}", kind=kind, slots=2, memory_gb=memory_gb)
            make_base_model(session, base, config=TINY, parameters=130_000)
            make_base_model(session, "big", config=LLAMA_7B, parameters=6_738_415_616)

    def keys(self) -> list[str]:
        return self.storage.keys("tenants")


def make_api(database: Database, folder: Path, **settings: Any) -> Api:
    parts = make_parts(database, folder, **settings)
    return _api(create_app(parts), parts)


def make_parts(database: Database, folder: Path, **settings: Any) -> AppParts:
    made = Settings(data_dir=folder, **settings)
    verifier, issuer = make_verifier(made, database), Issuer(made, database)
    return AppParts(made, database, ObjectStore(made.objects_url), verifier, issuer)


def _api(app: FastAPI, parts: AppParts, url: str = "") -> Api:
    assert parts.issuer is not None
    return Api(app, parts.database, parts.storage, parts.settings, parts.issuer, url)


@contextmanager
def moved_in(server: Api, database: Database, folder: Path) -> Iterator[Api]:
    """A running server over another database and folder: an application takes half a second to make and to stop."""
    parts = make_parts(database, folder)
    server.app.state.services = services = make_services(parts)
    yield _api(server.app, parts, server.url)
    services.close()


@contextmanager
def serving(api: Api) -> Iterator[Api]:
    listener = socket.create_server(("127.0.0.1", 0))
    api.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(api.app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield api
    finally:
        server.should_exit = True
        thread.join(timeout=PATIENCE_S)
        listener.close()
        assert not thread.is_alive()


def upload(client: httpx.Client, content: bytes = ROWS, name: str = "rows", **form: Any) -> httpx.Response:
    filename = form.pop("filename", f"{name}.jsonl")
    return client.post("/datasets", files={"file": (filename, content)}, data={"name": name, **form})


def code_archive(**files: str) -> bytes:
    """.tar.gz; `train` stands for train.py."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in (files or {"train": "print('hello')\n"}).items():
            header = tarfile.TarInfo(f"{name}.py")
            header.size = len(text.encode())
            tar.addfile(header, io.BytesIO(text.encode()))
    return packed.getvalue()


def upload_code(
    client: httpx.Client, content: bytes | None = None, name: str = "mycode", **form: Any
) -> httpx.Response:
    return client.post("/code", files={"file": ("x.tar.gz", content or code_archive())}, data={"name": name, **form})
