"""The list of tokens that the built-in issuer has made: to look at and to revoke. The tokens themselves are not
kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from app.db.models import IssuedToken
from app.db.session import Database
from cluster.errors import NotFound


class TokenLedger:
    """`tenant` None: the platform's view of all."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, tenant: str | None = None) -> Sequence[IssuedToken]:
        """Newest first; expired ones are left out."""
        alive = select(IssuedToken).where(IssuedToken.expires_at > func.now())
        with self._view(tenant) as session:
            return session.scalars(alive.order_by(IssuedToken.created_at.desc(), IssuedToken.jti)).all()

    def revoke(self, jti: str, tenant: str | None = None) -> None:
        """Again: nothing changes. Raises `NotFound`, also for another tenant's token."""
        one = update(IssuedToken).where(IssuedToken.jti == jti)
        revoked_at = func.coalesce(IssuedToken.revoked_at, func.now())
        with self._view(tenant) as session:
            changed = session.scalar(one.values(revoked_at=revoked_at).returning(IssuedToken.jti))
            if changed is None:
                raise NotFound(
                    f"token {jti[:80]!r} does not exist", code="token_not_found", hint="See `heliostat token ls`."
                )

    def is_revoked(self, jti: str) -> bool:
        revoked = exists().where(IssuedToken.jti == jti, IssuedToken.revoked_at.is_not(None))
        with self._database.platform() as session:
            return bool(session.scalar(select(revoked)))

    def _view(self, tenant: str | None) -> AbstractContextManager[Session]:
        return self._database.platform() if tenant is None else self._database.tenant(tenant)
