"""`tenant`: shares and quotas, for operators. `limits`: what the own tenant may have, and what it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from app.cli.command import command, group
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago
from cluster.errors import InvalidRequest

app = group("Tenants: shares of the cluster and quotas. For operators.")
NONE = "none"
WORDS = {
    "--weight": ("weight", float),
    "--guaranteed-slots": ("guaranteed_slots", int),
    "--max-slots": ("max_slots", int),
    "--urgent-slots": ("urgent_slots", int),
    "--max-queued": ("max_queued_jobs", int),
    "--gpu-hours-month": ("gpu_hours_per_month", float),
}
"""Option → field and how it is read; `none` sets the default, or no limit."""


@dataclass(frozen=True)
class Shares:
    weight: Annotated[str | None, typer.Option(metavar="X", help="Of the fair share; others have 1.")] = None
    guaranteed_slots: Annotated[str | None, typer.Option(metavar="N", help="Its own, lent while unused.")] = None
    max_slots: Annotated[str | None, typer.Option(metavar="N", help="At a time.")] = None
    urgent_slots: Annotated[str | None, typer.Option(metavar="N", help="Beyond them urgent counts as high.")] = None
    max_queued: Annotated[str | None, typer.Option(metavar="N", help="Jobs that wait.")] = None
    gpu_hours_month: Annotated[str | None, typer.Option(metavar="H", help="Of a calendar month, UTC.")] = None


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="tenant")
    command(root, "limits")(limits)


@command(app, "ls")
def ls(session: Session) -> None:
    """All tenants, with what they use."""
    rows = session.client(operator=True).pages("/tenants")
    columns = ("name", "weight", "guaranteed", "slots", "queued", "gpu-hours this month", "urgent slots")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, map(_row, rows), empty="no tenant yet"))


@command(app, "show")
def show(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """One tenant."""
    tenant = session.client(operator=True).get(f"/tenants/{name}")
    session.out.show(tenant, lambda: _drawn(tenant))


@command(app, "set")
def set_(session: Session, name: Annotated[str, typer.Argument()], shares: Shares) -> None:
    """Sets what is named; `none` takes a limit away, or sets the default."""
    change = {WORDS[option][0]: value for option, value in _given(shares).items()}
    if not change:
        raise InvalidRequest("nothing to set", param="set", hint=f"Options: {', '.join(WORDS)}.")
    tenant = session.client(operator=True).patch(f"/tenants/{name}", change)
    for warning in tenant.get("warnings", []):
        session.out.note(f"warning: {warning}")
    session.out.show(tenant, lambda: _drawn(tenant))


def limits(session: Session) -> None:
    """What your tenant may have, and what it uses of it."""
    told = session.client().get("/limits")
    session.out.show(told, lambda: pairs((key.replace("_", " "), _limit(told[key])) for key in told if key != "object"))


def _given(shares: Shares) -> dict[str, float | int | None]:
    given = {f"--{field.replace('_', '-')}": text for field, text in vars(shares).items() if text is not None}
    return {option: _number(option, text) for option, text in given.items()}


def _number(option: str, text: str) -> float | int | None:
    if text.lower() == NONE:
        return None
    try:
        return WORDS[option][1](text)
    except ValueError as error:
        raise InvalidRequest(
            f"{option} {text!r} is not a number", param=option, hint=f"A number, or `{NONE}`."
        ) from error


def _row(tenant: dict[str, Any]) -> tuple[Any, ...]:
    used = tenant["used"]
    return (
        tenant["id"],
        tenant["weight"],
        tenant["guaranteed_slots"],
        _of(used["slots"], tenant["max_slots"]),
        _of(used["queued_jobs"], tenant["max_queued_jobs"]),
        _of(used["gpu_hours_this_month"], tenant["gpu_hours_per_month"]),
        "usual" if tenant["urgent_slots"] is None else tenant["urgent_slots"],
    )


def _of(used: float, limit: float | None) -> str:
    return f"{used:g}" if limit is None else f"{used:g} of {limit:g}"


def _limit(value: Any) -> Any:
    """`{used, limit}` as words."""
    if not isinstance(value, dict):
        return value
    used, limit, others = value.get("used"), value.get("limit"), value.get("guaranteed")
    words = "usual" if used is None and limit is None else f"{limit:g}" if used is None else _of(used, limit)
    return f"{words}, {others:g} guaranteed" if others else words


def _drawn(tenant: dict[str, Any]) -> Any:
    row = _row(tenant)
    names = ("tenant", "weight", "guaranteed slots", "slots", "queued jobs", "GPU-hours this month", "urgent slots")
    return pairs([*zip(names, row, strict=True), ("made", ago(tenant["created_at"]))])
