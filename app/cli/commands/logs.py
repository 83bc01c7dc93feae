"""`jobs logs`."""

import typer


def register(app: typer.Typer) -> None: ...
