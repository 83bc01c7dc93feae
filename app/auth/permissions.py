"""Who may do what. A permission is `<level>:<action>`; a scope may narrow it to one object:
`<level>:<action>:<object>`.

What counts is what the role allows AND the scope names. Nothing here crosses tenants: that is the repository's duty."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import Forbidden, InvalidRequest

ACTIONS = {
    "model": ("read", "train", "deploy", "delete", "urgent"),
    "dataset": ("read", "write", "delete"),
    "log": ("read", "export"),
}
PERMISSIONS = tuple(f"{level}:{action}" for level, actions in ACTIONS.items() for action in actions)
_READ = frozenset({"model:read", "dataset:read", "log:read"})
_WORK = frozenset({"model:train", "model:deploy", "dataset:write", "dataset:delete", "log:export"})
TENANT_ROLES = {
    "viewer": _READ,
    "member": _READ | _WORK,
    "admin": frozenset(PERMISSIONS),
}
PLATFORM_ROLES = {
    # Metadata only: what tenants send and what their training prints is not the platform's to read.
    "operator": frozenset(permission for permission in PERMISSIONS if permission.startswith("model:")),
    "auditor": frozenset({"model:read"}),
}
ROLES = TENANT_ROLES | PLATFORM_ROLES


@dataclass(frozen=True)
class Identity:
    """Who calls, from a verified token. `tenant` is None for the platform's roles."""

    tenant: str | None
    subject: str
    role: str
    scopes: frozenset[str]
    jti: str | None = None


def require(identity: Identity, permission: str, obj: str | None = None) -> None:
    """`obj`: the id or name of the object concerned; None asks for the permission on all. Raises `Forbidden`."""
    if permission not in PERMISSIONS:
        raise ValueError(f"no such permission: {permission}")
    if permission not in ROLES[identity.role]:
        raise Forbidden(
            f"the role {identity.role} does not allow {permission}",
            code="role_forbids",
            hint=f"Roles that do: {', '.join(role for role, may in ROLES.items() if permission in may)}.",
        )
    # A scope for a name holds for each of its versions: no name has an @.
    objects = () if obj is None else (obj, obj.partition("@")[0])
    if permission in identity.scopes or any(f"{permission}:{one}" in identity.scopes for one in objects):
        return
    raise _scope_missing(permission)


def _scope_missing(permission: str) -> Forbidden:
    return Forbidden(
        f"the token's scope does not include {permission}",
        code="scope_missing",
        hint=f"Use a token whose scope includes {permission}.",
    )


def effective(identity: Identity) -> list[str]:
    """The scopes that the role allows, sorted."""
    return sorted(scope for scope in identity.scopes if _permission(scope) in ROLES[identity.role])


def require_whole_scope(identity: Identity) -> None:
    """For making tokens: what a narrow scope forbids must not come back through a wider token. Raises `Forbidden`."""
    missing = sorted(ROLES[identity.role] - identity.scopes)
    if missing:
        raise _scope_missing(missing[0])


def require_role(identity: Identity, *roles: str) -> None:
    """For what is no permission of the grammar: tokens, base models, quotas. Raises `Forbidden`."""
    if identity.role not in roles:
        raise Forbidden(
            f"the role {identity.role} does not allow this",
            code="role_forbids",
            hint=f"Use a token with the role {' or '.join(roles)}.",
        )


def default_scope(role: str) -> str:
    """All that the role allows."""
    return " ".join(permission for permission in PERMISSIONS if permission in ROLES[role])


def parse_scope(text: str) -> frozenset[str]:
    """Of a space-delimited claim; what is not of our grammar (`openid`, say) is left out."""
    return frozenset(scope for scope in text.split() if _permission(scope) in PERMISSIONS)


def check_scope(text: str) -> str:
    """The scope for a new token, in one spelling. Raises `InvalidRequest` for one that is not of the grammar."""
    unknown = [scope for scope in text.split() if _permission(scope) not in PERMISSIONS]
    if unknown or not text.split():
        raise InvalidRequest(
            f"{' '.join(unknown)[:120]!r} is not a scope",
            code="invalid_scope",
            param="scope",
            hint=f"Scopes, separated by spaces: {', '.join(PERMISSIONS)}; each may end in `:<object>`.",
        )
    return " ".join(dict.fromkeys(text.split()))


def _permission(scope: str) -> str:
    """Without the object. An object may hold colons (`model:read:ft:llama:…`); an empty one makes no scope."""
    level, _, rest = scope.partition(":")
    action, colon, obj = rest.partition(":")
    return "" if colon and not obj else f"{level}:{action}"
