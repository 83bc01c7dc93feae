"""The line of waiting jobs as people read it: rows of tables, the shares as a chart, an explanation. Draws what the service
sends; what an older one does not send is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.output import cell, clean, pairs
from app.cli.units import ago, span

QUEUE_COLUMNS = ("#", "job", "tenant", "priority", "needs", "waits", "ran", "starts", "why")
BAR = 32
"""Columns of the longest bar of the chart."""

HELD, DUE = "█", "░"


def queue_row(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    attained = entry.get("attained_seconds")
    return (
        entry.get("position"),
        entry["id"],
        entry.get("tenant"),
        entry.get("priority"),
        _needs(entry),
        ago(entry.get("queued_at")).removesuffix(" ago"),
        span(attained) if attained else None,
        moments(entry.get("start")),
        "; ".join(_words(entry.get("reasons"))) or ("parked" if entry.get("parked") else "next round"),
    )


def _needs(entry: Mapping[str, Any]) -> str | None:
    slots = entry.get("slots")
    return None if slots is None else f"{slots} × {' or '.join(entry.get('kinds') or ['any'])}"


def _words(reasons: Any) -> list[str]:
    return [str(one["message"] if isinstance(one, Mapping) else one) for one in reasons or ()]


def moments(found: Mapping[str, Any] | None) -> str | None:
    """P50 and P80 as distances from now."""
    early, late = ((found or {}).get(name) for name in ("p50", "p80"))
    if early is None:
        return None
    return f"{soon(early)} (P80 {soon(late) if late is not None else 'unknown'})"


def soon(moment: float) -> str:
    """A moment that is past by the time it is read is now."""
    told = ago(moment)
    return "now" if told.endswith("ago") or told == "in 0 s" else told


def node_row(node: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = f"{node.get('kind')} (draining)" if node.get("draining") else node.get("kind")
    told = (node.get(name) for name in ("slots", "free", "memory_gb", "market"))
    return (
        node["id"],
        kind,
        *told,
        node.get("region") or None,
        node.get("price_per_hour") or None,
        ago(node.get("seen_at")),
    )


def holder_row(node: str, job: Mapping[str, Any]) -> tuple[Any, ...]:
    state = f"{job['state']}, told to {job['told_to']}" if job.get("told_to") else job["state"]
    slots = ",".join(map(str, job["slots"])) or "–"
    return node, slots, job["id"], job["tenant"], job["priority"], state, ago(job["since"]), job["turn"]


def gpu_row(kind: Mapping[str, Any]) -> tuple[Any, ...]:
    slots = kind.get("slots")
    used = None if slots is None else slots - kind.get("free", slots)
    return kind["id"], slots, used, kind.get("wanted"), kind.get("memory_gb")


def chart(shares: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A bar for each tenant: what it holds, then what it is short of its fair share."""
    longest = max((max(share["slots"], share.get("fair_slots", 0)) for share in shares), default=0) or 1
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("SHARE OF THE SLOTS", overflow="fold")
    drawn.add_column(f"{HELD} held  {DUE} fair share not held", no_wrap=True)
    for title in ("HELD", "FAIR", "WANTS"):
        drawn.add_column(title, justify="right")
    for share in shares:
        fair = share.get("fair_slots")
        told = ("–" if fair is None else f"{fair:g}", str(share["waiting_slots"]))
        drawn.add_row(Text(_whose(share)), bar(share["slots"], fair or 0, longest), str(share["slots"]), *told)
    return drawn


def bar(held: float, fair: float, longest: float) -> Text:
    solid, whole = round(BAR * held / longest), round(BAR * max(held, fair) / longest)
    over = round(BAR * min(held, fair or held) / longest)
    return Text.assemble((HELD * over, "green"), (HELD * (solid - over), "yellow"), (DUE * (whole - solid), "dim"))


def _whose(share: Mapping[str, Any]) -> str:
    if share.get("tenant") is None:
        return f"{share.get('tenants', 0)} others"
    weight = share.get("weight", 1)
    return clean(share["tenant"]) + (f" (weight {weight:g})" if weight != 1 else "")


def explanation(told: Mapping[str, Any]) -> RenderableType:
    """Of one job: where it stands, why, what it holds, when it should start and end."""
    return Group(pairs(_explained(told)))


def _explained(told: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "job", told.get("id")
    reason, since = told.get("reason"), told.get("since")
    yield "state", ", ".join(filter(None, [told.get("state"), reason, since and f"since {span_since(since)}"]))
    yield "place", _place(told)
    yield "why", "\n".join(_words(told.get("reasons")))
    yield "holds", _held(told.get("holds"))
    yield "starts", moments(told.get("start"))
    finish = told.get("finish") or {}
    based_on = finish.get("based_on")
    yield "ends", moments(finish) and f"{moments(finish)}" + (f", from {based_on}" if based_on else "")


def span_since(moment: Any) -> str:
    return ago(moment).removesuffix(" ago")


def _place(told: Mapping[str, Any]) -> str | None:
    position, ahead = told.get("position"), told.get("ahead") or {}
    if position is None:
        return None
    before = [
        f"{ahead[whose]} {words}"
        for whose, words in (("own", "of your own"), ("others", "of others"))
        if ahead.get(whose)
    ]
    return f"{position} in line" + (f", behind {' and '.join(before)}" if before else "")


def _held(holds: Mapping[str, Any] | None) -> str | None:
    if not holds:
        return None
    slots = "; ".join(f"{node} slot {', '.join(map(str, taken))}" for node, taken in holds["slots"].items())
    words = [f"memory on {', '.join(holds['slots'])} (parked)" if holds.get("parked") else slots]
    words.append(f"since {span_since(holds['since'])}")
    words.append(f"has run {span(holds['attained_seconds'])} in all")
    return cell(", ".join(words + (["told to give way"] if holds.get("gives_way") else [])))
