"""`token`: the built-in issuer's tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import given
from app.cli.command import command, group
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago, seconds_of

app = group("Tokens of the built-in issuer (laptops). Production uses your organisation's issuer.")
PLATFORM_ROLES = ("operator", "auditor")


@dataclass(frozen=True)
class Wanted:
    role: Annotated[str | None, typer.Option(help="viewer, member, admin; operators: operator, auditor.")] = None
    scope: Annotated[list[str] | None, typer.Option(help="<level>:<action>[:<object>]; more than once.")] = None
    expires_in: Annotated[str | None, typer.Option(help="For instance 24h or 30d.")] = None
    subject: Annotated[str | None, typer.Option(help="Whom the token is for.")] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there (0600), do not show it.")] = None


@command(app, "create")
def create(session: Session, wanted: Wanted) -> None:
    """Makes a token (for --tenant T). It is shown once."""
    body = {
        "tenant": session.given.tenant,
        "role": wanted.role,
        "scope": " ".join(wanted.scope) if wanted.scope else None,
        "expires_in": round(seconds_of(wanted.expires_in, "--expires-in")) if wanted.expires_in else None,
        "subject": wanted.subject,
    }
    client = session.client(operator=_needs_operator(session, wanted), acting=False)
    made = client.post("/tokens", given(body))
    if wanted.out is None:
        session.out.show(made, lambda: made["token"])
        return
    _write_private(wanted.out, made.pop("token"))
    made["file"] = str(wanted.out)
    session.out.show(
        made, lambda: pairs([("token in", wanted.out), ("id", made.get("id")), ("role", made.get("role"))])
    )


def _needs_operator(session: Session, wanted: Wanted) -> bool:
    return session.given.tenant is not None or wanted.role in PLATFORM_ROLES


def _write_private(file: Path, token: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as sink:
        os.fchmod(descriptor, 0o600)  # it may have existed with another mode
        sink.write(token + "\n")


@command(app, "ls")
def ls(session: Session) -> None:
    """Tokens that were made, without the tokens themselves."""
    rows = session.client().pages("/tokens")
    columns = ("id", "tenant", "subject", "role", "scope", "expires", "revoked")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, map(_row, rows)))


def _row(token: dict[str, Any]) -> tuple[Any, ...]:
    revoked = ago(token["revoked_at"]) if token.get("revoked_at") else ""
    keys = ("id", "tenant", "subject", "role", "scope")
    return (*(token.get(key) for key in keys), ago(token.get("expires_at")), revoked)


@command(app, "revoke")
def revoke(session: Session, id: Annotated[str, typer.Argument()]) -> None:
    """Ends a token at once. Jobs that it made go on."""
    session.client().delete(f"/tokens/{id}")
    session.out.show({"id": id, "revoked": True}, lambda: f"{id} is revoked")
