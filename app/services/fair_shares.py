"""How many slots each tenant would have if the cluster were shared out by weights alone: what the chart shows beside what it
has. The scheduler's order is finer (service so far, age); this is the yardstick. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.core.job import TenantShare
from cluster.core.state import Snapshot


@dataclass(frozen=True)
class Claim:
    """Slots of one tenant: held now, and asked for by its waiting jobs."""

    weight: float = 1.0
    guaranteed: int = 0
    most: int | None = None
    held: int = 0
    waiting: int = 0
    jobs: int = 0

    @property
    def wanted(self) -> int:
        wanted = self.held + self.waiting
        return wanted if self.most is None else min(wanted, self.most)


def claims_of(snapshot: Snapshot, also: str | None = None) -> dict[str, Claim]:
    """Of every tenant that holds or wants something, and of `also`."""
    held = [one for one in snapshot.held.values() if not one.parked]
    waiting = [*snapshot.waiting, *(one.job for one in snapshot.held.values() if one.parked)]
    names = {one.job.tenant for one in held} | {job.tenant for job in waiting} | ({also} if also else set())
    found = {}
    for name in names:
        share = snapshot.tenants.get(name) or TenantShare(name)
        mine = [job.shape.slots for job in waiting if job.tenant == name]
        slots = sum(one.placement.slots for one in held if one.job.tenant == name)
        found[name] = Claim(share.weight, share.guaranteed_slots, share.max_slots, slots, sum(mine), len(mine))
    return found


def fair_shares(capacity: int, claims: Mapping[str, Claim]) -> dict[str, float]:
    """First what is guaranteed, as far as it is wanted; then the rest by weight, nobody getting more than it wants (weighted
    max-min)."""
    shares = {name: float(min(claim.guaranteed, claim.wanted)) for name, claim in claims.items()}
    left = max(0.0, capacity - sum(shares.values()))
    hungry = {name for name, claim in claims.items() if shares[name] < claim.wanted}
    while hungry and left > 1e-9:
        weight = sum(claims[name].weight for name in hungry)
        part = {name: left * claims[name].weight / weight for name in hungry}
        full = {name for name in hungry if shares[name] + part[name] >= claims[name].wanted}
        for name in full or hungry:
            given = min(part[name], claims[name].wanted - shares[name])
            shares[name] += given
            left -= given
        hungry = hungry - full if full else set()
    return shares
