"""The built-in issuer of tokens, for laptops: Ed25519, its key in a file (0600) that is made on first use.

Production uses the organisation's OIDC issuer instead."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from joserfc import jwt

from app.auth.keys import BuiltinKey
from app.auth.ledger import TokenLedger
from app.auth.permissions import PLATFORM_ROLES, TENANT_ROLES, check_scope, default_scope
from app.auth.verify import platform_audience
from app.db.models import IssuedToken
from app.db.session import Database
from app.db.tenants import ensure_tenant
from app.settings import Settings
from cluster.errors import InvalidRequest

DAY_S = 24 * 3600
MAX_EXPIRES_IN_S = 3660 * DAY_S


@dataclass(frozen=True)
class TokenRequest:
    """`tenant` None for the platform's roles; `scope` None: all that the role allows; `subject` None: named by the
    role."""

    tenant: str | None
    role: str = "member"
    scope: str | None = None
    expires_in_s: int = DAY_S
    subject: str | None = None


@dataclass(frozen=True)
class NewToken:
    """`token` is shown once: only its id is kept. `expires_at` in Unix seconds."""

    token: str
    jti: str
    subject: str
    role: str
    scope: str
    expires_at: int

    def __repr__(self) -> str:
        return f"NewToken(jti={self.jti!r}, role={self.role!r})"  # may end up in a log: without the token


class Issuer:
    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._key = BuiltinKey(settings.issuer_key_file)
        self.ledger = TokenLedger(database)

    def create(self, request: TokenRequest) -> NewToken:
        """Makes the tenant too, when it is new. Raises `InvalidRequest`."""
        _check(request)
        now = int(time.time())
        new = NewToken(
            token="",
            jti=f"tok-{secrets.token_hex(12)}",
            subject=request.subject or f"{request.role}@{request.tenant or 'platform'}",
            role=request.role,
            scope=check_scope(request.scope) if request.scope is not None else default_scope(request.role),
            expires_at=now + request.expires_in_s,
        )
        self._record(request.tenant, new)
        return NewToken(**{**vars(new), "token": self._sign(request.tenant, new, now)})

    def _sign(self, tenant: str | None, new: NewToken, now: int) -> str:
        auth = self._settings.auth
        claims = {
            "iss": auth.issuer,
            "aud": auth.audience if tenant is not None else platform_audience(auth),
            "sub": new.subject,
            "iat": now,
            "exp": new.expires_at,
            "jti": new.jti,
            "role": new.role,
            "scope": new.scope,
        }
        if tenant is not None:
            claims[auth.tenant_claim] = tenant
        key = self._key.read_or_make()
        return str(jwt.encode({"alg": "Ed25519", "kid": key.kid}, claims, key, algorithms=["Ed25519"]))

    def _record(self, tenant: str | None, new: NewToken) -> None:
        with self._database.platform() as session:
            if tenant is not None:
                ensure_tenant(session, tenant, self._settings.quota, self._settings.sandbox.uids)
            session.add(
                IssuedToken(
                    jti=new.jti,
                    tenant_id=tenant,
                    subject=new.subject,
                    role=new.role,
                    scope=new.scope,
                    expires_at=datetime.fromtimestamp(new.expires_at, UTC),
                )
            )


def _check(request: TokenRequest) -> None:
    roles = TENANT_ROLES if request.tenant is not None else PLATFORM_ROLES
    if request.role not in roles:
        whose = "a tenant's token" if request.tenant is not None else "a token without a tenant"
        raise InvalidRequest(
            f"{request.role[:40]!r} is not a role for {whose}",
            code="invalid_role",
            param="role",
            hint=f"Roles: {', '.join(roles)}.",
        )
    if not 1 <= request.expires_in_s <= MAX_EXPIRES_IN_S:
        raise InvalidRequest(
            f"a token cannot last {request.expires_in_s} s",
            code="invalid_expiry",
            param="expires_in",
            hint="Between a second and ten years.",
        )
