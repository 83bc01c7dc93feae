"""Who calls, and for which tenant. Everything a service does begins with one of these questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.auth.permissions import PLATFORM_ROLES, Identity, require, require_role
from app.db.models import Tenant
from app.db.requests import RequestKey
from app.db.tenants import ensure_tenant
from app.services.parts import Parts
from cluster.errors import Forbidden, InvalidRequest, NotFound


@dataclass(frozen=True)
class Caller:
    """`acting_for`: the tenant that a platform role has named."""

    identity: Identity
    acting_for: str | None = None

    @property
    def is_platform(self) -> bool:
        return self.identity.role in PLATFORM_ROLES

    @property
    def tenant(self) -> str:
        """Raises `InvalidRequest` for a platform role that named none."""
        found = self.identity.tenant or self.acting_for
        if found is None:
            raise InvalidRequest(
                "this token belongs to no tenant, so the request must name one",
                code="tenant_required",
                param="tenant_id",
                hint="Add `tenant_id` (in the body, or as a query parameter), or use a tenant's token.",
            )
        return found

    def may(self, permission: str, ref: str | None = None) -> str:
        """The tenant, once the permission is checked; `ref`: for one object only. Raises `Forbidden`."""
        require(self.identity, permission, ref)
        return self.tenant

    def for_tenant(self, named: str | None) -> Caller:
        """`named` must be the token's tenant; a platform role may name any. Raises `Forbidden`."""
        if named is None or named == self.identity.tenant:
            return self
        if not self.is_platform:
            raise Forbidden(
                "`tenant_id` is not the tenant of the token",
                code="wrong_tenant",
                param="tenant_id",
                hint="Leave `tenant_id` out: the token says which tenant it is.",
            )
        return Caller(self.identity, named)

    def must_be(self, *roles: str) -> None:
        """Raises `Forbidden`."""
        require_role(self.identity, *roles)


@dataclass(frozen=True)
class Repeat:
    """What tells a repeated POST from a new one. `key`: the Idempotency-Key header, `body` as parsed."""

    route: str
    key: str | None
    body: Any
    token_id: str

    def by(self, tenant: str) -> RequestKey:
        return RequestKey(tenant, self.route, self.key, self.body, self.token_id)


class Access:
    """Tenants are made when their first valid token is seen: the issuer decides who exists."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._known: set[str] = set()

    def known(self, caller: Caller) -> Caller:
        """Raises `NotFound` for a tenant that a platform role has named and that nobody has ever been."""
        own, named = caller.identity.tenant, caller.acting_for
        tenant = own or named
        if tenant is not None and tenant not in self._known:
            with self._parts.database.platform() as session:
                if own is not None:
                    ensure_tenant(session, own, self._parts.settings.quota, self._parts.settings.sandbox.uids)
                elif session.get(Tenant, tenant) is None:
                    raise no_tenant(tenant)
            self._known.add(tenant)
        return caller


def no_tenant(name: str) -> NotFound:
    return NotFound(
        f"tenant {name[:80]!r} does not exist",
        code="tenant_not_found",
        param="tenant_id",
        hint="A tenant is made with its first token: `heliostat token create --tenant NAME`.",
    )
