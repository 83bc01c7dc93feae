"""`queue`, `nodes`, `gpus`: what the cluster has and what waits for it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.command import command
from app.cli.output import cell, table
from app.cli.session import Session
from app.cli.units import ago


def register(app: typer.Typer) -> None:
    command(app, "queue")(queue)
    command(app, "nodes")(nodes)
    command(app, "gpus")(gpus)


def queue(session: Session) -> None:
    """Jobs that wait, in their order."""
    page = session.client().get("/queue")
    session.out.show(page, lambda: _drawn(page["data"], empty="nothing waits"))


def nodes(session: Session) -> None:
    """Nodes and what they offer."""
    page = session.client(operator=True).get("/nodes")
    session.out.show(page, lambda: _drawn(page["data"], empty="no node has reported yet"))


def gpus(
    session: Session, all: Annotated[bool, typer.Option("--all", help="Also kinds that no node has.")] = False
) -> None:
    """Accelerator kinds that a job may ask for."""
    page = session.client().get("/gpu-types")
    page["data"] = [kind for kind in page["data"] if all or kind["available"]]
    session.out.show(page, lambda: _drawn(page["data"], empty="none here; --all lists every name"))


HIDDEN = frozenset({"object", "environments", "models"})
TIMES = frozenset({"seen_at", "lost_at", "queued_at", "created_at", "since"})


def _drawn(rows: list[dict[str, Any]], *, empty: str) -> Any:
    """Operators' tables show what the service sends, so that a newer service needs no newer command."""
    columns = [key for key in (rows[0] if rows else {}) if key not in HIDDEN]
    drawn = [[_value(key, row.get(key)) for key in columns] for row in rows]
    return table([column.replace("_", " ") for column in columns], drawn, empty=empty)


def _value(key: str, value: Any) -> Any:
    if key in TIMES and value is not None:
        return ago(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else cell(value)
