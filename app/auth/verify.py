"""Turns a bearer token into an identity. What does not hold is `Unauthorized`; neither errors nor logs repeat a
token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jws import JWSRegistry

from app.auth.keys import BuiltinKey, JwksKeys, KeySource
from app.auth.ledger import TokenLedger
from app.auth.permissions import PLATFORM_ROLES, TENANT_ROLES, Identity, parse_scope
from app.db.session import Database
from app.db.tenants import NAME
from app.settings import AuthSettings, Settings
from cluster.errors import Unauthorized

__all__ = ["Identity", "TokenVerifier", "make_verifier", "platform_audience"]

ALGORITHMS = ("Ed25519", "EdDSA", "RS256", "ES256")
MAX_TOKEN_CHARS = 16 * 1024
HINT = "Send `Authorization: Bearer <token>` with a valid token; `heliostat token create` makes one on a laptop."


class TokenVerifier:
    """`sources` are asked in turn for the key that a token names; `revoked` tells of a token id whether it was
    revoked."""

    def __init__(self, settings: AuthSettings, sources: Sequence[KeySource], revoked: Callable[[str], bool]) -> None:
        self._settings = settings
        self._sources = sources
        self._revoked = revoked
        self._registry = _Algorithms(algorithms=ALGORITHMS, strict_check_header=False)
        self._rules = jwt.JWTClaimsRegistry(
            leeway=settings.leeway_s,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "values": [settings.audience, platform_audience(settings)]},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )

    def verify(self, token: str) -> Identity:
        """Raises `Unauthorized`, and `Unavailable` when the issuer's keys or the list of revoked tokens cannot be
        read."""
        identity = self._identity(self._claims(token))
        if identity.jti is not None and self._revoked(identity.jti):
            raise _refusal("the token was revoked", "token_revoked")
        return identity

    def _claims(self, token: str) -> dict[str, Any]:
        if not token.isascii() or len(token) > MAX_TOKEN_CHARS:
            raise _refusal("the token is not a signed JWT")
        try:
            decoded = jwt.decode(token, self._key, algorithms=ALGORITHMS, registry=self._registry)
            self._rules.validate(decoded.claims)
        except ExpiredTokenError:
            raise _refusal("the token has expired", "token_expired") from None
        except (JoseError, ValueError, TypeError) as error:
            # ValueError, TypeError: what is no JSON object where one should be
            raise _refusal(f"the token does not hold ({type(error).__name__})") from None
        return decoded.claims

    def _key(self, signed: Any) -> Any:
        kid = signed.headers().get("kid")
        for source in self._sources:
            if (key := source.find(kid if isinstance(kid, str) else None)) is not None:
                return key
        raise _refusal("the token is signed with a key that is not known here", "unknown_key")

    def _identity(self, claims: dict[str, Any]) -> Identity:
        """Tenants' tokens name a tenant and have our audience; the platform's have an audience of their own and no
        tenant."""
        tenant, role, jti = claims.get(self._settings.tenant_claim), claims.get("role", "viewer"), claims.get("jti")
        audiences = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        if platform_audience(self._settings) in audiences:
            if tenant is not None or not isinstance(role, str) or role not in PLATFORM_ROLES:
                raise _refusal("a token for the platform has a platform role and no tenant", "invalid_role")
        elif not isinstance(tenant, str) or NAME.fullmatch(tenant) is None:
            raise _refusal(f"the claim `{self._settings.tenant_claim}` does not name a tenant", "tenant_missing")
        elif not isinstance(role, str) or role not in TENANT_ROLES:
            raise _refusal("the claim `role` is not a tenant's role", "invalid_role")
        for claim in ("sub", "jti"):
            if not isinstance(claims.get(claim, ""), str) or not claims.get(claim, "-").isprintable():
                raise _refusal(f"the claim `{claim}` is not plain text")
        scope = claims.get("scope", "")
        return Identity(
            tenant=tenant,
            subject=claims["sub"],
            role=role,
            scopes=parse_scope(scope if isinstance(scope, str) else ""),
            jti=jti,
        )


class _Algorithms(JWSRegistry):
    def get_alg(self, name: str) -> Any:
        """joserfc warns of `EdDSA`, since RFC 9864 gives it the new name Ed25519. OIDC issuers still use the old
        one."""
        return self.algorithms[name] if name == "EdDSA" else super().get_alg(name)


def make_verifier(settings: Settings, database: Database) -> TokenVerifier:
    """As the settings say: the built-in issuer's key, the OIDC issuer's, or both."""
    sources: list[KeySource] = []
    if settings.auth.builtin:
        sources.append(BuiltinKey(settings.issuer_key_file))
    if settings.auth.jwks_url is not None:
        sources.append(JwksKeys(settings.auth.jwks_url))
    return TokenVerifier(settings.auth, sources, TokenLedger(database).is_revoked)


def platform_audience(settings: AuthSettings) -> str:
    return f"{settings.audience}-platform"


def _refusal(message: str, code: str = "invalid_token") -> Unauthorized:
    return Unauthorized(message, code=code, hint=HINT)
