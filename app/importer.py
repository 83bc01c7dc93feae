"""Brings base models in: claims a registered model, converts it in a process of its own, stores its folder, says ready or why not.

One detached actor; a claim of a dead one is taken again at the next start, and a half-stored folder is never named by a row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from sqlalchemy import func, select, update

from app.db.models import BaseModel
from app.db.session import Database
from app.settings import Settings
from cluster.errors import HeliostatError, Unavailable
from cluster.storage.objects import ObjectStore, folder_sha256

ACTOR = "importer"
LOOK_EVERY_S = 1.0
CONVERT_LIMIT_S = 3600.0
SCRATCH = "import-"


@dataclass(frozen=True)
class ImporterParts:
    database: Database
    storage: ObjectStore
    settings: Settings


@dataclass(frozen=True)
class Imported:
    prefix: str
    sha256: str
    bytes: int
    facts: dict[str, Any]
    """What `trainers.child.convert` printed: parameters, config …"""


class Importer:
    """`wiring` is a module-level function: Ray ships its name."""

    def __init__(self, wiring: Callable[[], ImporterParts]) -> None:
        self._parts = wiring()

    def loop(self, stopping: threading.Event) -> None:
        fresh = True
        while not stopping.is_set():
            try:
                if fresh:
                    self._forget_claims()
                    fresh = False
                if not self.round():
                    stopping.wait(LOOK_EVERY_S)
            except Unavailable:
                fresh = True  # a claim whose end could not be written is nobody's
                stopping.wait(5 * LOOK_EVERY_S)

    def round(self) -> bool:
        """Imports one model, if one waits."""
        claimed = self._claim()
        if claimed is None:
            return False
        model_id, source, template = claimed
        try:
            self._ready(model_id, bring_in(self._parts.storage, source, template, self._parts.settings.data_dir))
        except Unavailable:
            raise
        except HeliostatError as error:
            self._failed(model_id, error)
        except OSError as error:
            self._failed(model_id, _not_stored(source, error))
        return True

    def _forget_claims(self) -> None:
        for left in self._parts.settings.data_dir.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        with self._parts.database.platform() as session:
            session.execute(update(BaseModel).where(BaseModel.status == "preparing").values(claimed_at=None))

    def _claim(self) -> tuple[str, str, str | None] | None:
        with self._parts.database.platform() as session:
            row = session.scalar(
                select(BaseModel)
                .where(BaseModel.status == "preparing", BaseModel.claimed_at.is_(None))
                .order_by(BaseModel.created_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if row is None:
                return None
            row.claimed_at = func.now()
            return row.id, row.source, row.chat_template

    def _ready(self, model_id: str, imported: Imported) -> None:
        with self._parts.database.platform() as session:
            named = session.scalar(
                update(BaseModel)
                .where(BaseModel.id == model_id)
                .values(
                    status="ready",
                    prefix=imported.prefix,
                    sha256=imported.sha256,
                    bytes=imported.bytes,
                    parameters=imported.facts["parameters"],
                    config=imported.facts["config"],
                )
                .returning(BaseModel.id)
            )
        if named is None:  # removed meanwhile
            self._parts.storage.delete_prefix(imported.prefix)

    def _failed(self, model_id: str, error: HeliostatError) -> None:
        with self._parts.database.platform() as session:
            session.execute(
                update(BaseModel).where(BaseModel.id == model_id).values(status="failed", error=error.as_dict())
            )


class ImporterActor(Importer):
    def __init__(self, wiring: Callable[[], ImporterParts]) -> None:
        super().__init__(wiring)
        # Started here, because after a crash Ray calls nothing but the constructor.
        threading.Thread(target=self._work, name="importer", daemon=True).start()

    def _work(self) -> None:
        """A loop that breaks takes the process with it, so that Ray begins a new one."""
        try:
            self.loop(threading.Event())
        finally:
            traceback.print_exc()
            os._exit(1)


def _not_stored(source: str, error: OSError) -> HeliostatError:
    return HeliostatError(
        f"{source} could not be brought in: {error.strerror or error}",
        code="storage_unavailable",
        hint="Look at the free space of the disk and of the storage, then register it again.",
    )


def bring_in(storage: ObjectStore, source: str, template: str | None, scratch: Path) -> Imported:
    """Converts `source` (folder, GGUF file or hub id) and stores it under its own hash. Raises `HeliostatError`."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=scratch) as aside:
        folder = Path(aside) / "model"
        facts = convert(source, folder, template)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        upload = f"base-models/import-{Path(aside).name}"
        files = storage.put_folder(upload, folder)
        sha256 = folder_sha256(files)
        storage.put_bytes(f"{upload}/manifest.json", json.dumps(files, sort_keys=True).encode())
    return Imported(upload, sha256, size, facts)


def convert(source: str, folder: Path, template: str | None) -> dict[str, Any]:
    """`python -m trainers.child.convert`: torch is loaded there, not here."""
    command = [sys.executable, "-m", "trainers.child.convert", source, str(folder)]
    if template:
        command += ["--chat-template", template]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise HeliostatError(
            f"converting {source} took longer than {CONVERT_LIMIT_S:.0f} s and was ended",
            code="base_model_conversion_timeout",
            hint="Convert it to a safetensors folder yourself and register that.",
        ) from None
    answer = _last_json(done.stdout)
    if done.returncode == 0 and answer is not None and "error" not in answer:
        return answer
    told = (answer or {}).get("error", {})
    raise HeliostatError(
        told.get("message")
        or f"converting {source} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}",
        code=told.get("code", "base_model_unreadable"),
        hint=told.get("hint", "It must be a Hugging Face folder with safetensors, a GGUF file or a hub id."),
    )


def _last_json(output: str) -> dict[str, Any] | None:
    for line in reversed(output.strip().splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):  # something that a library printed
                answer: dict[str, Any] = json.loads(line)
                return answer
    return None


def ensure_importer(wiring: Callable[[], ImporterParts]) -> None:
    """The named detached actor, made if it is not there."""
    ray.remote(ImporterActor).options(
        name=ACTOR,
        namespace="heliostat",
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources={"heliostat_control": 0.001},
    ).remote(wiring)
