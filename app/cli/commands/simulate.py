"""`simulate`: a trace through the scheduler, or through one that it is compared with, under a virtual clock. Needs no service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.cli.command import command
from app.cli.output import Output, table
from app.cli.session import Session
from cluster.errors import InvalidRequest
from cluster.simulation.opponents import POLICIES
from cluster.simulation.trace import read_trace


@dataclass(frozen=True)
class Options:
    nodes: Annotated[int, typer.Option(min=1, help="Like nodes.")] = 64
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8
    switch_cost: Annotated[float, typer.Option(min=0.0, help="Seconds that a job loses when it goes on.")] = 30.0
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}; srtf is told the durations.")] = (
        "heliostat"
    )
    log: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="A line for each run; .gz is compressed.")] = (
        None
    )
    until: Annotated[float | None, typer.Option(help="Stop at this second of the trace.")] = None


def register(app: typer.Typer) -> None:
    command(app, "simulate")(simulate_)


def simulate_(
    session: Session,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE.csv[.gz]", help="Columns timestamp, duration, num_gpus, cluster.")
    ],
    options: Options,
) -> None:
    """What would have become of a trace of jobs: how long they wait, who is slowed down. Works offline."""
    if options.policy not in POLICIES:
        raise InvalidRequest(
            f"there is no policy {options.policy}", param="--policy", hint=f"one of {', '.join(POLICIES)}"
        )
    from cluster.simulation.play import Setting, simulate  # loads numpy, which no other command needs

    jobs = read_trace(trace)
    setting = Setting(
        nodes=options.nodes,
        slots_per_node=options.gpus_per_node,
        switch_cost_s=options.switch_cost,
        policy=options.policy,
        log=options.log,
        until_s=options.until,
    )
    with progress(session.out, len(jobs)) as advance:
        figures = simulate(jobs, setting, advance)
    data: dict[str, Any] = {"policy": options.policy, **figures}
    session.out.show(data, lambda: table(("figure", options.policy), figures.items()))


@contextmanager
def progress(out: Output, jobs: int) -> Iterator[Callable[[int, float], None]]:
    """A bar beside the result, where somebody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = out.json or not out.errors.is_terminal
    with Progress(*columns, console=out.errors, transient=True, disable=hidden) as bar:
        task = bar.add_task("jobs ended", total=jobs)

        def advance(done: int, now: float) -> None:
            bar.update(task, completed=done, description=f"jobs ended by hour {now / 3600:,.0f}")

        yield (lambda done, now: None) if hidden else advance
