"""`env`: environments from an environment.yml. A name means its newest version; jobs keep the one they started with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.syntax import Syntax

from app.cli.command import command, group
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago

app = group("Environments that jobs train in.")
File = Annotated[Path, typer.Option("-f", "--file", exists=True, dir_okay=False, help="environment.yml")]
Ref = Annotated[str, typer.Argument(help="Name, name@version or id.")]


@command(app, "create")
def create(session: Session, file: File) -> None:
    """Makes an environment; the file's `name:` is its name. The same file again: the same environment."""
    _send(session, "/environments", {"spec": file.read_text()})


@command(app, "update")
def update(session: Session, name: Annotated[str, typer.Argument()], file: File) -> None:
    """Gives a name new content; old jobs keep theirs."""
    _send(session, f"/environments/{name}/update", {"spec": file.read_text()})


@command(app, "add")
def add(
    session: Session,
    name: Annotated[str, typer.Argument()],
    packages: Annotated[list[str], typer.Argument(metavar="PKG…", help="For instance rouge-score==0.1.2.")],
) -> None:
    """Adds pip packages to an environment."""
    _send(session, f"/environments/{name}/update", {"add": packages})


def _send(session: Session, path: str, body: dict[str, Any]) -> None:
    session.out.note("solving …")
    made = session.client().post(path, body)
    session.out.show(made, lambda: _drawn(made))


def _drawn(environment: dict[str, Any]) -> RenderableType:
    head = pairs(
        [
            ("id", environment.get("id")),
            ("name", f"{environment['name']}@{environment['version']}"),
            ("python", environment.get("python")),
            ("fingerprint", environment.get("fingerprint")),
            ("dependency md5", environment.get("dependency_md5")),
            ("created", ago(environment.get("created_at"))),
        ]
    )
    packages = environment.get("packages") or []
    rows = [(package.get("name"), package.get("version")) for package in packages if isinstance(package, dict)]
    return Group(head, table(("package", "version"), rows, empty="no packages over the base"))


@command(app, "ls")
def ls(session: Session) -> None:
    """Environments, newest first."""
    rows = session.client().pages("/environments")
    drawn = [(f"{row['name']}@{row['version']}", row["fingerprint"][:12], ago(row.get("created_at"))) for row in rows]
    columns = ("name", "fingerprint", "created")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, drawn, empty="none yet"))


@command(app, "show")
def show(session: Session, ref: Ref) -> None:
    """One environment, its packages and its file."""
    environment = session.client().get(f"/environments/{ref}")

    def render() -> RenderableType:
        checks = [(c["node"], c["kind"], c["status"], ago(c["at"]), c["detail"]) for c in environment.get("checks", ())]
        checked = table(("node", "check", "status", "when", "detail"), checks, empty="on no node yet, or not checked")
        return Group(
            _drawn(environment), checked, Syntax(environment.get("spec") or "", "yaml", background_color="default")
        )

    session.out.show(environment, render)


@command(app, "diff")
def diff(session: Session, a: Ref, b: Ref) -> None:
    """What B has that A has not, and the other way round."""
    changes = session.client().get(f"/environments/{a}", against=b)["diff"]
    rows = [
        (one["name"], one["before"], one["after"]) for kind in ("added", "removed", "changed") for one in changes[kind]
    ]
    session.out.show(changes, lambda: table(("package", a, b), rows, empty="no difference"))


@command(app, "verify")
def verify(session: Session, ref: Ref) -> None:
    """Reads every file of it on every node that has it. Exit: 1 when something changed."""
    _checked(session, ref, "verify")


@command(app, "repair")
def repair(session: Session, ref: Ref) -> None:
    """As verify; puts back what changed, in all environments that share the files."""
    _checked(session, ref, "repair")


def _checked(session: Session, ref: str, what: str) -> None:
    checked = session.client().post(f"/environments/{ref}/{what}", {})
    rows = [(one["node"], one["status"], _found(one)) for one in checked["nodes"]]
    session.out.show(checked, lambda: table(("node", "status", "files"), rows, empty="no node has it yet"))
    if not checked["ok"]:
        raise typer.Exit(1)


def _found(one: dict[str, Any]) -> str:
    return " ".join(filter(None, (one["error"], one.get("hint")))) or ", ".join(one["damaged"][:5])


@command(app, "rm")
def rm(session: Session, ref: Ref) -> None:
    """Removes an environment from the list; jobs that use it go on."""
    session.client().delete(f"/environments/{ref}")
    session.out.show({"ref": ref, "deleted": True}, lambda: f"{ref} is removed")
