"""Who gives way: the runners of one pool in arrays, and the cheapest set of them that makes room. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.core.order import LEAST_S, NEWCOMER, Rank
from cluster.core.policy import Policy
from cluster.core.slices import Attempt, Holding, ripens_in, settled_at

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

LOWER_CLASS = 1e-18
"""Victims of a lower class cost next to nothing, so that they are taken first."""
CLOSEST = 4
"""So many of the nodes that look cheapest are looked at exactly."""


@dataclass(frozen=True)
class Claim:
    """Who wants slots: its rank, and what it is worth."""

    rank: int
    worth: float


@dataclass(frozen=True)
class Room:
    """Slots can be had on these nodes once these attempts have given way."""

    cost: float
    victims: tuple[Attempt, ...]
    parts: dict[str, int] = field(default_factory=dict)
    """Node → how many of its slots."""
    asks: float = 0.0
    """What a claim must be worth at least: more than the cost where the cheapest holders of the slots, taken one by one,
    have more slots than are needed. Replay is better off with gangs that are not broken for a part (5.8 h, not 6.0)."""


def worth_of(seconds: float, slots: int, weight: float, policy: Policy) -> float:
    return float(weight * slots**policy.worth_exponent / seconds)


class Prices:
    """What it costs that holders of slots give way, to claims of one rank; inf: they do not. Only the rows that have
    changed are worked out again."""

    def __init__(self, rows: int, size: int) -> None:
        self.of_slot = np.full((rows, size), np.inf)
        self.of_node = np.zeros(rows)
        """… that all who could, do."""
        self.cheapest = np.full((rows, size), np.inf)
        """… that n + 1 slots come free, the cheapest holders first: no less than this."""
        self.reach = np.full(rows, -1.0)
        """Slots that could be had, with those that are open."""
        self._can = np.zeros(rows)  # slots of those who could
        self.stale: set[int] | None = None
        """Rows of other runners; None: all."""
        self.reopened: set[int] = set()
        """Rows of the same runners with more or fewer open slots."""
        self.most = -1.0
        self.whole = 0
        """The most slots that could be had of one node, and how many nodes could be had whole."""
        self.rooms: dict[int, Room | None] = {}
        """Slots → what was found for a gang of so many, whoever asks."""

    def set(self, rows: Rows, of_slot: Floats, share: Floats) -> None:
        order = np.argsort(of_slot, axis=1, kind="stable")
        at = np.arange(len(of_slot))[:, None]
        finite = np.isfinite(of_slot)
        shared = np.where(finite, of_slot, 0.0) * share
        self.of_slot[rows] = of_slot
        self.of_node[rows] = shared.sum(axis=1)
        self.cheapest[rows] = np.maximum(of_slot[at, order], np.cumsum(shared[at, order], axis=1))
        self._can[rows] = finite.sum(axis=1)
        self.reopened.update(rows.tolist())
        self.stale = set()

    def open(self, rows: Rows, opened: Floats) -> None:
        self.reach[rows] = opened + self._can[rows]
        self.most = float(self.reach.max(initial=-1.0))
        self.whole = int(np.count_nonzero(self.reach >= self.of_slot.shape[1]))
        self.rooms.clear()
        self.reopened = set()


class Runners:
    """A row for each node, a column for each slot."""

    def __init__(self, size: int, policy: Policy) -> None:
        self._policy = policy
        self._size = size
        self._row: dict[str, int] = {}
        self._names: list[str] = []
        self._spare: list[int] = []
        self._owner: list[list[Attempt | None]] = []
        self._open = np.zeros(0)  # slots that are free or come free
        self._kept: set[str] = set()
        self.gains = 0
        """Goes up whenever more runners could be told to give way, or for less."""
        self._order: Rows | None = None  # rows by name
        self._priced_at = -np.inf
        self._looked = -np.inf
        self._settling: list[tuple[float, int]] = []  # a heap: when a row changes by time alone
        self._priced: dict[int, Prices] = {}
        # Of the runner that holds the slot. `settled`: inf where nobody can be told to give way.
        # `birth`: since - attained before, so that now - birth is what it has attained. `share`: 1 / how many
        # slots it has on the node. `cost`: slot-seconds of a switch.
        self._columns = np.zeros((0, size, 6))
        self._name_columns()

    # Rows ---------------------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        row = self._spare.pop() if self._spare else len(self._names)
        if row == len(self._names):
            self._names.append(name)
            self._owner.append([None] * self._size)
            self._grow()
        self._names[row] = name
        self._row[name] = row
        self._order = None
        self._clear(row)

    def discard(self, name: str) -> None:
        row = self._row.pop(name)
        self._order = None
        self._clear(row)
        self._spare.append(row)

    def _clear(self, row: int) -> None:
        self._priced.clear()
        self._open[row] = -self._size  # a node that is not there has no room, whoever gives way
        self._settled[row] = np.inf
        self._owner[row] = [None] * self._size

    def _grow(self) -> None:
        if len(self._names) <= len(self._open):
            return
        more = max(8, len(self._open))
        self._open = np.concatenate([self._open, np.full(more, -float(self._size))])
        rows = np.ones((more, self._size, 6))
        rows[:, :, 0] = np.inf
        self._columns = np.concatenate([self._columns, rows])
        self._name_columns()

    def _name_columns(self) -> None:
        views = (self._columns[:, :, at] for at in range(6))
        self._settled, self._rank, self._power, self._birth, self._share, self._cost = views

    def open(self, name: str, count: int) -> None:
        row = self._row[name]
        if self._open[row] != count:
            self._open[row] = count
            self._reopened(row)

    def keep(self, name: str, kept: bool) -> None:
        """A node that is kept for somebody: nobody else makes room there."""
        self._kept.add(name) if kept else self._kept.discard(name)
        self._reopened(self._row[name])

    # Runners ------------------------------------------------------------------------------------------------------

    def put(self, name: str, holding: Holding, standing: tuple[int, float]) -> None:
        """It holds slots of this node, and may be told to give way. `standing`: its rank and its tenant's weight."""
        policy, job = self._policy, holding.job
        row = self._row[name]
        at = [
            column for column in holding.placement.nodes[name] if column < self._size
        ]  # it may have come back smaller
        self._changed(row)
        if job.yields:
            self.gains += settled_at(holding, policy) <= self._looked
            for time in {settled_at(holding, policy), settled_at(holding, policy) + ripens_in(policy)}:
                heapq.heappush(self._settling, (time, row))
        slots = holding.placement.slots
        self._columns[row, at] = (
            settled_at(holding, policy) if job.yields else np.inf,
            standing[0],
            worth_of(1.0, slots, standing[1], policy),
            holding.since - job.attained_s,
            1 / max(1, len(at)),
            slots * (policy.park_cost_s if holding.shape.park_gb else policy.switch_cost_s),
        )
        for column in at:
            self._owner[row][column] = holding.key

    def drop(self, name: str, holding: Holding) -> None:
        """It holds nothing here any more, or was told to give way already."""
        row = self._row[name]
        self._changed(row)
        for column in holding.placement.nodes[name]:
            if column < self._size and self._owner[row][column] == holding.key:
                self._owner[row][column] = None
                self._settled[row, column] = np.inf

    def soonest(self, now: float) -> float:
        """When the next runner settles; inf: none will."""
        later = self._settled[self._settled > now]
        return float(later.min()) if later.size else np.inf

    # Who gives way ------------------------------------------------------------------------------------------------

    def room(self, slots: int, claim: Claim) -> Room | None:
        """The whole gang, as few nodes as can be, by the cheapest victims; None: not for what the claim is worth."""
        prices = self._prices(claim.rank)
        if slots not in prices.rooms:
            prices.rooms[slots] = self._cheapest(slots, prices)
        found, budget = prices.rooms[slots], claim.worth / self._policy.hysteresis
        return found if found is not None and max(found.cost, found.asks) <= budget else None

    def _cheapest(self, slots: int, prices: Prices) -> Room | None:
        whole, rest = divmod(slots, self._size)
        found = self._whole_nodes(whole, prices) if whole else Room(0.0, ())
        return self._and_a_part(rest, found, prices) if rest and found is not None else found

    def room_on(self, parts: dict[str, int], claim: Claim) -> Room | None:
        """So many slots of just these nodes."""
        prices = self._prices(claim.rank)
        found = Room(0.0, ())
        for name, need in parts.items():
            row = self._row.get(name)
            if row is None or prices.reach[row] < need:
                return None
            cost, _, victims = self._part(row, need, found, prices)
            found = Room(cost, (*found.victims, *victims), {**found.parts, name: need})
        return found if found.cost <= claim.worth / self._policy.hysteresis else None

    def may(self, slots: int, rank: int) -> bool:
        """Whether so many slots could be had at all."""
        whole, rest = divmod(slots, self._size)
        prices = self._prices(rank)
        return prices.whole >= whole and prices.most >= rest

    def _prices(self, rank: int) -> Prices:
        """What runners are worth as of the last look by the clock: between two of them only what happens changes it."""
        found = self._priced.get(rank)
        if found is None:
            found = self._priced[rank] = Prices(len(self._open), self._size)
        if found.stale is None or found.stale:
            stale = np.arange(len(self._open)) if found.stale is None else np.fromiter(found.stale, np.intp)
            found.set(stale, self._price(rank, stale), self._share[stale])
        if found.reopened:
            rows = np.fromiter(found.reopened, np.intp)
            opened = self._open[rows]
            for name in self._kept:
                opened[rows == self._row[name]] = -2.0 * self._size
            found.open(rows, opened)
        return found

    def advance(self, now: float) -> None:
        at = now // self._policy.look_s * self._policy.look_s
        if at != self._priced_at:
            self._priced_at = at
            self._priced.clear()
            self.gains += 1
        if now != self._looked:
            self._settle(now)

    def _settle(self, now: float) -> None:
        if now < self._looked:
            self._priced.clear()
            self.gains += 1
            times = [(at, row) for row, ats in enumerate(self._settled.tolist()) for at in set(ats) if at < np.inf]
            self._settling = sorted(times + [(at + ripens_in(self._policy), row) for at, row in times])
        self._looked = now
        while self._settling and self._settling[0][0] <= now:
            self._changed(heapq.heappop(self._settling)[1])
            self.gains += 1

    def _price(self, rank: int, rows: Rows) -> Floats:
        of, settled, now = self._rank[rows], self._settled[rows], self._looked
        attained = np.maximum(self._priced_at - self._birth[rows], 0.0)
        seconds = np.where(attained < self._policy.newcomer_s, np.maximum(NEWCOMER * attained, LEAST_S), attained)
        price = self._power[rows] / seconds
        ripe = settled + ripens_in(self._policy) <= now
        may = (of > rank) & ripe
        if rank <= Rank.OWED_LOW:
            least = Rank.HIGH if Rank(rank).is_owed else rank + 1
            may |= (of >= least) & (settled <= now)
        equals = (of == rank) & ripe & (rank not in (Rank.AGED, Rank.ELDER))
        cheap = LOWER_CLASS * (self._cost[rows] + np.minimum(price, 1.0)) * 4.0 ** (Rank.LOW - of)
        found: Floats = np.where(may, cheap, np.where(equals, price, np.inf))
        return found

    def _changed(self, row: int) -> None:
        for prices in self._priced.values():
            if prices.stale is not None:
                prices.stale.add(row)

    def _reopened(self, row: int) -> None:
        for prices in self._priced.values():
            prices.reopened.add(row)

    def _able(self, need: int, prices: Prices) -> Rows:
        """Rows where so many slots could be had, in the order of their nodes' names."""
        if self._order is None:
            self._order = np.array([self._row[name] for name in sorted(self._row)], dtype=np.intp)
        able: Rows = self._order[prices.reach[self._order] >= need]
        return able

    def _whole_nodes(self, count: int, prices: Prices) -> Room | None:
        able = self._able(self._size, prices)
        if len(able) < count:
            return None
        cheapest = able[np.argsort(prices.of_node[able], kind="stable")[:count]]
        costs: dict[Attempt, float] = {}
        for row in cheapest:
            costs.update(self._holders(row, prices))
        return Room(sum(costs.values()), tuple(costs), {self._names[row]: self._size for row in cheapest})

    def _holders(self, row: int, prices: Prices) -> dict[Attempt, float]:
        """Who could give way on the node, the cheapest first."""
        price = prices.of_slot[row].tolist()
        pairs = {owner: price[at] for at, owner in enumerate(self._owner[row]) if owner is not None}
        return {owner: cost for owner, cost in sorted(pairs.items(), key=lambda p: (p[1], p[0])) if cost < np.inf}

    def _and_a_part(self, need: int, found: Room, prices: Prices) -> Room | None:
        able = self._able(need, prices)
        if found.parts:
            able = np.array([row for row in able if self._names[row] not in found.parts], dtype=np.intp)
        if not len(able):
            return None
        lacking = np.maximum(need - self._open[able], 0).astype(int)
        costs = np.where(lacking > 0, prices.cheapest[able, np.maximum(lacking - 1, 0)], 0.0)
        rows = able[np.argsort(costs, kind="stable")[:CLOSEST]]
        tried = [self._part(row, need, found, prices) for row in rows]
        cost, name, victims = min(tried, key=lambda one: one[:2])
        asks = 0.0 if found.victims else float(costs.min())
        return Room(cost, (*found.victims, *victims), {**found.parts, name: need}, asks)

    def _part(self, row: int, need: int, found: Room, prices: Prices) -> tuple[float, str, list[Attempt]]:
        """The cheapest runners of the node until the slots do, then less those that were not needed after all."""
        owners = self._owner[row]
        costs = self._holders(row, prices)
        have = int(self._open[row]) + sum(owners.count(owner) for owner in found.victims)
        taken: list[Attempt] = []
        for owner in (owner for owner in costs if owner not in found.victims):
            if have >= need:
                break
            have += owners.count(owner)
            taken.append(owner)
        for owner in reversed(taken):
            if have - owners.count(owner) >= need:
                have -= owners.count(owner)
                taken.remove(owner)
        return found.cost + sum(costs[owner] for owner in taken), self._names[row], taken
