"""Environments: an environment.yml becomes a version of its name, with a lock. Old jobs keep the version they have."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db import ids
from app.db.models import Environment, EnvironmentCheck
from app.db.models import Job as JobRow
from app.db.repository import Page, PageRequest, Repository
from app.db.requests import idempotent
from app.services.access import Caller, Repeat
from app.services.job_view import unix
from app.services.parts import Parts, SolvedEnvironment
from app.services.versions import refuse_used
from cluster.errors import HeliostatError, InvalidRequest
from cluster.ports import CheckedEnvironment
from runtime_envs.edit import add_packages, diff
from runtime_envs.spec import parse_spec

MAX_NAMES = 100
"""Of damaged files that an answer lists."""


class EnvironmentService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def create(self, caller: Caller, spec: str, repeat: Repeat) -> dict[str, Any]:
        """Solves it (seconds), then the row. The newest version with the same text and lock is the answer as it is."""
        tenant = caller.may("model:train")
        return self._save(tenant, spec, repeat)

    def update(self, caller: Caller, ref: str, change: dict[str, Any], repeat: Repeat) -> dict[str, Any]:
        """A new version of the name: from a whole new `spec`, or with the packages in `add`. Raises `InvalidRequest`."""
        tenant = caller.may("model:train", ref)
        row = self._row(tenant, ref)
        spec = change.get("spec") or add_packages(row.spec, change.get("add") or [])
        named = parse_spec(spec).name
        if named != row.name:
            raise InvalidRequest(
                f"the file's name is {named}, the environment's {row.name}",
                code="environment_name_differs",
                param="spec",
                hint=f"Write `name: {row.name}`, or create {named} as an environment of its own.",
            )
        return self._save(tenant, spec, repeat)

    def _save(self, tenant: str, spec: str, repeat: Repeat) -> dict[str, Any]:
        name = parse_spec(spec).name
        solved = self._parts.solve(spec)  # outside of the transaction: it may take long
        with self._parts.database.tenant(tenant) as session, idempotent(session, repeat.by(tenant)) as once:
            if once.replay is None:
                row = insert_environment(session, Environment(tenant_id=tenant, name=name, spec=spec), solved)
                once.answer(201, environment_view(row, whole=True))
            assert once.response is not None  # a replay brings its own
            return once.response

    def page(self, caller: Caller, request: PageRequest, name: str | None) -> Page[Environment]:
        tenant = caller.may("model:read")
        conditions = () if name is None else (Environment.name == name,)
        with self._parts.database.tenant(tenant) as session:
            return Repository(session, tenant).page(Environment, request, *conditions)

    def get(self, caller: Caller, ref: str, against: str | None) -> dict[str, Any]:
        """`against`: another environment; the answer then holds `diff`, from this one to it."""
        tenant = caller.may("model:read", ref)
        row = self._row(tenant, ref)
        shown = environment_view(row, whole=True) | {"checks": self._checks(row.fingerprint)}
        if against is None:
            return shown
        other = self._row(tenant, against)
        return {**shown, "diff": diff(shown["lock"], other.lock).as_dict()}

    def check(self, caller: Caller, ref: str, *, repair: bool) -> dict[str, Any]:
        """Every file on every node that has it; seconds to a minute."""
        row = self._row(caller.may("model:train", ref), ref)
        found = self._parts.check_environment(row.fingerprint, repair)
        nodes = [_checked(node, outcome) for node, outcome in sorted(found.items())]
        return {
            "object": "environment_check",
            "environment": f"{row.name}@{row.version}",
            "fingerprint": row.fingerprint,
            "ok": all(node["status"] in ("ok", "repaired") for node in nodes),
            "nodes": nodes,
        }

    def delete(self, caller: Caller, ref: str) -> str:
        """Raises `Conflict` while a job that has not ended uses it."""
        tenant = caller.may("model:delete", ref)
        with self._parts.database.tenant(tenant) as session:
            row = Repository(session, tenant).environment(ref)
            refuse_used(session, "environment", JobRow.environment_id == row.id)
            row.deleted_at = func.now()
            return row.id

    def _checks(self, fingerprint: str) -> list[dict[str, Any]]:
        """Of each node that has had it; by a fingerprint that the tenant has."""
        newest = select(EnvironmentCheck).where(EnvironmentCheck.fingerprint == fingerprint)
        with self._parts.database.platform() as session:
            rows = session.scalars(newest.order_by(EnvironmentCheck.node, EnvironmentCheck.kind)).all()
        return [
            {"node": r.node, "kind": r.kind, "status": r.status, "detail": r.detail, "at": unix(r.checked_at)}
            for r in rows
        ]

    def _row(self, tenant: str, ref: str) -> Environment:
        with self._parts.database.tenant(tenant) as session:
            return Repository(session, tenant).environment(ref)


def _checked(node: str, outcome: CheckedEnvironment | HeliostatError) -> dict[str, Any]:
    if isinstance(outcome, HeliostatError):
        return {"node": node, "status": "failed", "damaged": [], "error": outcome.message, "hint": outcome.hint}
    damaged = list(outcome.damaged[:MAX_NAMES])
    return {"node": node, "status": outcome.status, "damaged": damaged, "error": None, "hint": None}


def insert_environment(session: Session, row: Environment, solved: SolvedEnvironment) -> Environment:
    row.id = ids.new_id(ids.ENVIRONMENT)
    row.lock, row.fingerprint, row.dependency_md5 = solved.lock, solved.fingerprint, solved.dependency_md5
    return Repository(session, row.tenant_id).add_version(row, _content)


def _content(row: Environment) -> tuple[str, str, Any]:
    return row.spec, row.fingerprint, row.lock.get("bundled")


def _over_the_base(lock: dict[str, Any]) -> list[dict[str, str]]:
    base = lock["base"]["packages"]
    conda = [package for package in lock.get("conda", ()) if package["name"] not in base]
    return [{"name": package["name"], "version": package["version"]} for package in (*conda, *lock["pip"])]


def environment_view(row: Environment, *, whole: bool) -> dict[str, Any]:
    shown = {
        "id": row.id,
        "object": "environment",
        "name": row.name,
        "version": row.version,
        "ref": f"{row.name}@{row.version}",
        "status": "ready",
        "base": row.lock["base"]["name"],
        "python": row.lock["python"],
        "fingerprint": row.fingerprint,
        "dependency_md5": row.dependency_md5,
        "packages": _over_the_base(row.lock),
        "created_at": unix(row.created_at),
    }
    return {**shown, "spec": row.spec, "lock": row.lock} if whole else shown
