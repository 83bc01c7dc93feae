"""Bundles: an environment as a file, out of this Heliostat and into it. What a bundle brings is kept with the tenant's objects,
where the nodes fetch it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from app.db.models import Environment
from app.db.repository import Repository
from app.environment_places import bundle_trust, conda_places, from_storage, pip_index, signing_key
from app.services.access import Caller
from app.services.environments import environment_view, insert_environment
from app.services.parts import Parts
from runtime_envs.bundles.contents import Imported, export_bundle, import_bundle
from runtime_envs.bundles.fetch import Places

LEFT_S = 86400.0
"""So old a folder is of a process that was killed."""


class BundleService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @property
    def max_bytes(self) -> int:
        return int(self._parts.settings.environments.max_bundle_gb * 1024**3)

    def may_import(self, caller: Caller) -> None:
        caller.may("model:train")

    def export(self, caller: Caller, ref: str, *, whole: bool) -> Path:
        """The bundle, alone in a folder that the caller removes; seconds to minutes. `whole`: with the base's packages."""
        tenant, settings = caller.may("model:read", ref), self._parts.settings
        with self._parts.database.tenant(tenant) as session:
            row = Repository(session, tenant).environment(ref)
        folder = Path(tempfile.mkdtemp(prefix="bundle-", dir=self._scratch()))
        target = folder / f"{row.name}-{row.version}.tar.gz"
        places = Places(pip_index(settings), from_storage(self._parts.storage))
        with ExitStack() as on_failure:
            on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
            export_bundle(target, (row.spec, row.lock), signing_key(settings), places, whole=whole)
            on_failure.pop_all()
        return target

    def create(self, caller: Caller, source: IO[bytes]) -> dict[str, Any]:
        """A version of the name that the bundle's file has; the same bundle again: the same version. Says whose signature it was.
        Raises EnvironmentProblem: nothing is kept of a bundle that is not as it was signed."""
        tenant = caller.may("model:train")
        with self._opened(source) as imported:
            lock = imported.solved.lock
            if imported.files:
                lock["bundled"] = self._stored(tenant, imported)
            with self._parts.database.tenant(tenant) as session:
                row = Environment(tenant_id=tenant, name=imported.solved.spec.name, spec=imported.spec)
                shown = environment_view(insert_environment(session, row, imported.solved), whole=True)
        return {**shown, "signed_by": imported.signed_by}

    @contextmanager
    def _opened(self, source: IO[bytes]) -> Iterator[Imported]:
        settings = self._parts.settings
        with tempfile.TemporaryDirectory(prefix="import-", dir=self._scratch()) as folder:
            yield import_bundle(source, Path(folder), bundle_trust(settings), conda_places(settings))

    def _stored(self, tenant: str, imported: Imported) -> dict[str, str]:
        """Key by file name."""
        lock, keys = imported.solved.lock, {}
        for package in (*lock.get("conda", ()), *lock["pip"]):
            name = package["filename"]
            if name in imported.files:
                keys[name] = f"tenants/{tenant}/packages/{package['sha256']}/{name}"
                if not self._parts.storage.exists(keys[name]):
                    self._parts.storage.put_file(keys[name], imported.files[name])
        return keys

    def _scratch(self) -> Path:
        folder = self._parts.settings.data_dir / "cache" / "bundles"
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            with suppress(FileNotFoundError):  # its owner was done, or another process is at it too
                if time.time() - left.stat().st_mtime > LEFT_S:
                    shutil.rmtree(left, ignore_errors=True)
        return folder
