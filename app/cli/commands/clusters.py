"""`queue`, `nodes`, `gpus`: who waits for what and why, who holds what, whose turn it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from app.cli.command import command
from app.cli.line_text import QUEUE_COLUMNS, chart, gpu_row, holder_row, node_row, queue_row
from app.cli.output import table
from app.cli.session import Session

NODE_COLUMNS = ("node", "kind", "slots", "free", "GiB a slot", "market", "region", "$/h a slot", "seen")
HOLDER_COLUMNS = ("node", "slots", "job", "tenant", "priority", "state", "since", "turn")
GPU_COLUMNS = ("kind", "slots", "in use", "wanted", "GiB")


def register(app: typer.Typer) -> None:
    command(app, "queue")(queue)
    command(app, "nodes")(nodes)
    command(app, "gpus")(gpus)


def queue(session: Session) -> None:
    """Jobs that wait, in their order: why, and when they should start. Beside it each tenant's share of the slots."""
    client = session.client()
    page = {**client.get("/queue"), "shares": client.get("/shares")["data"]}
    session.out.show(page, lambda: _queue(page["data"], page["shares"]))


def nodes(session: Session) -> None:
    """Nodes, and who holds what on them."""
    page = session.client(operator=True).get("/nodes")
    session.out.show(page, lambda: _nodes(page["data"]))


def gpus(
    session: Session, all: Annotated[bool, typer.Option("--all", help="Also kinds that no node has.")] = False
) -> None:
    """Accelerator kinds that a job may ask for, and how many of them are in use and waited for."""
    page = session.client().get("/gpu-types")
    page["data"] = [kind for kind in page["data"] if all or kind["available"]]
    empty = "none here; --all lists every name"
    session.out.show(page, lambda: table(GPU_COLUMNS, map(gpu_row, page["data"]), empty=empty))


def _queue(waiting: list[dict[str, Any]], shares: list[dict[str, Any]]) -> RenderableType:
    line = table(QUEUE_COLUMNS, map(queue_row, waiting), empty="nothing waits")
    return Group(line, Text(), chart(shares)) if shares else line


def _nodes(found: list[dict[str, Any]]) -> RenderableType:
    there = table(NODE_COLUMNS, map(node_row, found), empty="no node has reported yet")
    holders = [holder_row(node["id"], job) for node in found for job in node.get("jobs", ())]
    return Group(there, Text(), table(HOLDER_COLUMNS, holders)) if holders else there
