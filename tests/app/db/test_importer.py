"""The importer of base models: no model stays `preparing` for ever, whatever goes wrong at a bad moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders_db import make_base_model
from waiting import until

from app import importer
from app.db.models import BaseModel
from app.db.session import Database
from app.importer import Imported, Importer, ImporterParts
from app.settings import Settings
from cluster.errors import HeliostatError, Unavailable
from cluster.storage.objects import ObjectStore

FACTS = {"parameters": 1, "config": {}}


class World:
    def __init__(self, root: Path, database: Database) -> None:
        self.database = database
        self.storage = ObjectStore(str(root / "objects"))
        self.importer = Importer(lambda: ImporterParts(database, self.storage, Settings(data_dir=root)))
        with database.platform() as session:
            self.id = make_base_model(session, status="preparing", prefix=None, sha256=None).id

    def row(self) -> BaseModel:
        with self.database.platform() as session:
            return session.get_one(BaseModel, self.id)

    def bring(self, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
        """The conversion is somebody else's; `how` happens in its place, after the folder was stored."""

        def bring_in(storage: ObjectStore, *_: Any) -> Imported:
            storage.put_bytes("base-models/x/manifest.json", b"{}")
            how()
            return Imported("base-models/x", "0" * 64, 2, FACTS)

        monkeypatch.setattr(importer, "bring_in", bring_in)


@pytest.fixture
def world(tmp_path: Path, database: Database) -> World:
    return World(tmp_path, database)


def test_a_full_disk_fails_the_model_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    world.bring(monkeypatch, full)
    assert world.importer.round()
    row = world.row()
    assert row.status == "failed" and row.error is not None
    assert row.error["code"] == "storage_unavailable" and "No space left" in row.error["message"]
    assert row.prefix is None


def test_a_database_that_is_down_at_the_end_does_not_leave_it_claimed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, calls = world.importer._ready, []

    def away_at_first(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("the database is down")
        ready(*given)

    world.bring(monkeypatch, lambda: None)
    monkeypatch.setattr(world.importer, "_ready", away_at_first)
    monkeypatch.setattr(importer, "LOOK_EVERY_S", 0.01)
    stopping = threading.Event()
    thread = threading.Thread(target=world.importer.loop, args=(stopping,))
    thread.start()
    try:
        until(lambda: world.row().status == "ready")
    finally:
        stopping.set()
        thread.join()
    assert world.row().prefix == "base-models/x"


def test_a_model_that_was_removed_meanwhile_leaves_nothing_in_storage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed() -> None:
        with world.database.platform() as session:
            session.delete(session.get_one(BaseModel, world.id))

    world.bring(monkeypatch, removed)
    assert world.importer.round()
    assert world.storage.keys("base-models") == []


def test_a_converter_that_prints_what_looks_like_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '{not json}'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(HeliostatError) as caught:
        importer.convert("m", tmp_path / "out", None)
    assert caught.value.code == "base_model_unreadable"


def test_folders_of_a_killed_import_go(world: World, tmp_path: Path) -> None:
    (tmp_path / "import-abc" / "model").mkdir(parents=True)
    world.importer._forget_claims()
    assert not (tmp_path / "import-abc").exists()
