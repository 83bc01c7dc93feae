"""Reads a table of this folder: jobs, nodes and places as people write them, as the state machine knows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.core.job import Job, Node, Placement, Priority, Shape
from cluster.core.policy import Policy
from cluster.core.slices import Holding

SHAPE = {"slots": 1, "memory_gb": 1, "kinds": (), "nodes": 1, "park_gb": 0}
KEYS = {"title", "policy", "gives_way_after", "nodes", "tenants", "running", "waiting", "streams", "steps"}
HAPPENS = {"end", "leave", "park", "pause", "cancel", "fail", "lose", "join", "set", "come"}
COMES_OF_IT = {"running", "told", "parked", "waiting", "holding", "started", "turns", "served"}


@dataclass(frozen=True)
class Arrival:
    """`needs`: seconds of service after which it ends by itself; None: it runs until a step ends it."""

    job: Job
    needs: float | None = None


@dataclass
class Table:
    title: str
    policy: Policy
    gives_way_after: float | None
    nodes: list[Node]
    tenants: dict[str, dict[str, Any]]
    running: list[tuple[Holding, float | None]]
    waiting: list[Arrival]
    streams: list[tuple[float, Arrival]]
    """When they come, in that order."""
    steps: list[dict[str, Any]] = field(default_factory=list)


def read_table(file: Path) -> Table:
    """A word that it does not know is an error: it would check nothing."""
    raw = yaml.safe_load(file.read_text())
    _known(raw, KEYS)
    for step in raw["steps"]:
        _known(step, {"at"} | HAPPENS | COMES_OF_IT)
        assert step.keys() & COMES_OF_IT, f"nothing is expected of {step}"
    return Table(
        raw["title"],
        Policy(**raw.get("policy", {})),
        raw.get("gives_way_after"),
        [node(name, offer) for name, offer in raw["nodes"].items()],
        raw.get("tenants", {}),
        [_holding(job_id, how) for job_id, how in raw.get("running", {}).items()],
        [arrival(**row) for row in raw.get("waiting", [])],
        sorted((each for row in raw.get("streams", []) for each in _stream(**row)), key=lambda pair: pair[0]),
        raw["steps"],
    )


def _known(row: dict[str, Any], words: set[str]) -> None:
    assert row.keys() <= words, f"unknown words: {sorted(row.keys() - words)}"


def node(name: str, offer: dict[str, Any]) -> Node:
    sets = {key: frozenset(offer.get(key, ())) for key in ("environments", "models")}
    return Node(name, **{**offer, **sets})


def arrival(id: str, now: float = 0, waited: float = 0, needs: float | None = None, **more: Any) -> Arrival:
    submitted_at = now - float(more.pop("submitted", waited))
    shape = _shape({key: more.pop(key, default) for key, default in SHAPE.items()})
    others = tuple(_shape({**SHAPE, **other}) for other in more.pop("or", ()))
    priority = Priority(more.pop("priority", "normal"))
    columns = {"tenant": "acme", "submitted_at": submitted_at, **more}
    return Arrival(
        Job(id, shape=shape, queued_at=now - waited, priority=priority, alternatives=others, **columns), needs
    )


def _shape(columns: dict[str, Any]) -> Shape:
    return Shape(**{**columns, "kinds": tuple(columns["kinds"])})


def _stream(every: float, until: float, id: str, begin: float = 0, **more: Any) -> Iterator[tuple[float, Arrival]]:
    at, number = float(begin), 1
    while at <= until:
        yield at, arrival(f"{id}-{number}", now=at, **more)
        at, number = at + every, number + 1


def _holding(job_id: str, how: str | dict[str, Any]) -> tuple[Holding, float | None]:
    more = {"holds": how} if isinstance(how, str) else dict(how)
    place, ran = _placement(more.pop("holds")), float(more.pop("ran", 0))
    came = arrival(job_id, **{"slots": place.slots, "nodes": len(place.nodes), "waited": ran, **more})
    return Holding(came.job, 1, place, -ran), came.needs


def _placement(text: str) -> Placement:
    """`n1[0,2]+n2[0]`"""
    found = [re.fullmatch(r"(.+)\[([\d,]+)\]", part) for part in text.split("+")]
    assert all(found), f"not a place: {text!r}"
    return Placement({part[1]: tuple(int(slot) for slot in part[2].split(",")) for part in found if part})


def place_of(placement: Placement) -> str:
    return "+".join(f"{name}[{','.join(map(str, slots))}]" for name, slots in placement.nodes.items())
