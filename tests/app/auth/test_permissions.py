"""Effective permission = role AND scope."""

from __future__ import annotations

import pytest

from app.auth.permissions import (
    PERMISSIONS,
    ROLES,
    Identity,
    check_scope,
    default_scope,
    effective,
    parse_scope,
    require,
    require_role,
)
from cluster.errors import Forbidden, InvalidRequest

EVERYTHING = frozenset(PERMISSIONS)


def who(role: str, scope: str | None = None) -> Identity:
    tenant = None if role in ("operator", "auditor") else "acme"
    return Identity(tenant, "me", role, parse_scope(scope) if scope is not None else EVERYTHING)


ALLOWED = {
    "viewer": {"model:read", "dataset:read", "log:read"},
    "member": EVERYTHING - {"model:delete", "model:urgent"},
    "admin": EVERYTHING,
    "operator": {"model:read", "model:train", "model:deploy", "model:delete", "model:urgent"},
    "auditor": {"model:read"},
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("permission", PERMISSIONS)
def test_roles(role: str, permission: str) -> None:
    if permission in ALLOWED[role]:
        require(who(role), permission)
    else:
        with pytest.raises(Forbidden, match=f"role {role} does not allow {permission}"):
            require(who(role), permission)
    with pytest.raises(Forbidden):
        require(who(role, ""), permission)


def test_the_error_says_which_scope_is_missing() -> None:
    with pytest.raises(Forbidden, match="model:train") as caught:
        require(who("admin", "model:read dataset:write"), "model:train")
    assert caught.value.code == "scope_missing" and "model:train" in (caught.value.hint or "")


def test_a_scope_narrowed_to_an_object_holds_for_that_one_only() -> None:
    identity = who("admin", "model:read:ft:llama:acme::x1 dataset:read:rows")
    require(identity, "dataset:read", "rows")
    require(identity, "model:read", "ft:llama:acme::x1")
    for permission, obj in (("dataset:read", None), ("dataset:read", "other"), ("dataset:delete", "rows")):
        with pytest.raises(Forbidden):
            require(identity, permission, obj)


def test_scopes_that_are_not_ours_are_left_out() -> None:
    assert parse_scope("openid profile model:read model:fly dataset:read: model:") == {"model:read"}


def test_the_scope_of_a_new_token_must_be_of_the_grammar() -> None:
    assert check_scope(" model:read   dataset:read:x model:read ") == "model:read dataset:read:x"
    for scope in ("", "model", "model:fly", "model:read:", "model:read openid"):
        with pytest.raises(InvalidRequest):
            check_scope(scope)


def test_effective_scopes_are_those_that_the_role_allows() -> None:
    assert effective(who("viewer", "model:read model:train dataset:read:x")) == ["dataset:read:x", "model:read"]
    for role in ROLES:
        assert parse_scope(default_scope(role)) == ALLOWED[role]


def test_roles_that_no_permission_stands_for() -> None:
    require_role(who("operator"), "operator", "admin")
    with pytest.raises(Forbidden, match="member"):
        require_role(who("member"), "operator", "admin")


def test_an_unknown_permission_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError):
        require(who("admin"), "model:fly")
