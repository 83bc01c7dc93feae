"""Tokens of the built-in issuer: an admin's for the own tenant, an operator's for any."""

from __future__ import annotations

from typing import Any

from app.auth.issuer import Issuer, TokenRequest
from app.auth.permissions import require_whole_scope
from app.db.models import IssuedToken
from app.schemas.operators import NewToken
from app.services.access import Caller
from app.services.job_view import unix
from cluster.errors import Conflict


class TokenService:
    """`issuer` None: this installation uses another issuer."""

    def __init__(self, issuer: Issuer | None) -> None:
        self._issuer = issuer

    def create(self, caller: Caller, new: NewToken) -> dict[str, Any]:
        """The answer is the only place where the token is ever seen."""
        _admit(caller)
        tenant = caller.for_tenant(new.tenant).acting_for if caller.identity.tenant is None else caller.identity.tenant
        if new.tenant is not None:
            caller.for_tenant(new.tenant)
        role = new.role or ("member" if tenant is not None else "operator")
        made = self._needed().create(TokenRequest(tenant, role, new.scope, new.expires_in or 24 * 3600, new.subject))
        return {
            "id": made.jti,
            "object": "token",
            "token": made.token,
            "tenant": tenant,
            "subject": made.subject,
            "role": made.role,
            "scope": made.scope,
            "expires_at": made.expires_at,
        }

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        caller.must_be("admin", "operator")
        tenant = caller.identity.tenant or caller.acting_for
        return [_view(row) for row in self._needed().ledger.list(tenant)]

    def revoke(self, caller: Caller, jti: str) -> str:
        _admit(caller)
        self._needed().ledger.revoke(jti, caller.identity.tenant or caller.acting_for)
        return jti

    def _needed(self) -> Issuer:
        if self._issuer is None:
            raise Conflict(
                "this installation takes its tokens from another issuer",
                code="no_builtin_issuer",
                hint="Ask that issuer for a token; `auth.builtin` turns on our own, for laptops.",
            )
        return self._issuer


def _admit(caller: Caller) -> None:
    caller.must_be("admin", "operator")
    require_whole_scope(caller.identity)


def _view(row: IssuedToken) -> dict[str, Any]:
    return {
        "id": row.jti,
        "object": "token",
        "tenant": row.tenant_id,
        "subject": row.subject,
        "role": row.role,
        "scope": row.scope,
        "created_at": unix(row.created_at),
        "expires_at": unix(row.expires_at),
        "revoked_at": unix(row.revoked_at) if row.revoked_at else None,
    }
