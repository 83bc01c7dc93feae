"""What is so, and the indexes over it, kept with every event: who waits, who holds, what is free. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from sortedcontainers import SortedList

from cluster.core.elders import Elders
from cluster.core.events import How
from cluster.core.fairness import Ledger
from cluster.core.job import Job, Node, Priority, TenantShare
from cluster.core.memory import Memory
from cluster.core.order import RANK_OF, Rank
from cluster.core.placement import PoolKey, masks
from cluster.core.policy import Policy
from cluster.core.pools import Option, Pools
from cluster.core.queues import Line, Waiting
from cluster.core.slices import Attempt, Holding, expires_at, owned, same_slots

AGED_LOOKED_AT = 1024


class Facts:
    """`advance` brings what depends on the time up to `now`; all else follows from the facts alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.pools = Pools(policy)
        self.ledger = Ledger(policy)
        self.waiting = Waiting(self.ledger, policy)
        self.held: dict[Attempt, Holding] = {}
        self.parked: dict[Attempt, Holding] = {}
        self.on_node: defaultdict[str, set[Attempt]] = defaultdict(set)
        self.park_used: Counter[str] = Counter()  # MiB on each node, parked or on the way to it
        self.memory = Memory()
        self._elders = Elders()
        self._hidden: dict[str, Job] = {}  # tried again later
        self._wakes = SortedList()  # (not_before, id)
        self._by_age = SortedList()  # (queued_at, id) of those that wait and could run
        self._ages: set[str] = set()
        self._sorted_out = -1
        self._sized = True
        self._signatures: dict[tuple[tuple[int, PoolKey], ...], int] = {}
        self._attempts: defaultdict[str, set[Attempt]] = defaultdict(set)
        self._of_tenant: defaultdict[str, set[Attempt]] = defaultdict(set)
        self._modes: dict[str, tuple[frozenset[Attempt], bool]] = {}
        self._aged: str | None = None
        self._waited = SortedList()  # (since, attempt) of runners that had waited so long before
        self._aged_runner: Attempt | None = None
        self._now = -math.inf

    # Nodes and tenants --------------------------------------------------------------------------------------------

    def join(self, node: Node) -> None:
        if self.pools.nodes.get(node.name) == node:
            return
        self.pools.join(node)
        self._resized()
        for key in self.on_node[node.name]:
            self._put_runner(self.held[key])

    def lose(self, name: str) -> None:
        if name in self.pools.nodes:
            self.pools.leave(name)
            self._resized()

    def _resized(self) -> None:
        self._elders.stale = True
        self._sized = self._sized and self.pools.capacity == self.ledger.capacity
        self.ledger.resize(self.pools.capacity)

    def _size(self) -> None:
        """Allowances are shares of the slots: once for all nodes that came or went since the last look."""
        self._sized = True
        self.waiting.urgent_changed()
        for tenant, account in self.ledger.accounts().items():
            if account.urgent:
                self._check_mode(tenant)

    def entitle(self, share: TenantShare) -> None:
        before = self.ledger.account(share.name).share
        if before == share:
            return
        self.ledger.set(share)
        self.memory.clear()
        self._elders.stale = True
        self.waiting.reweigh(share.name)
        self.waiting.tenant_changed(share.name, always=True)
        self.waiting.urgent_changed()
        self._check_mode(share.name)
        for key in self._of_tenant[share.name]:
            self._put_runner(self.held[key])

    # Who waits ----------------------------------------------------------------------------------------------------

    def queue(self, job: Job) -> None:
        known = self.waiting.get(job.id) or self._hidden.get(job.id)
        if known == job:
            return
        self._sort_out()
        if known is not None:
            self.unqueue(job.id)
        if job.not_before > 0:
            self._wakes.add((job.not_before, job.id))
        if job.not_before > max(self._now, 0.0):
            self._hidden[job.id] = job
        else:
            self._show(job)

    def unqueue(self, job_id: str) -> None:
        job = self.waiting.get(job_id) or self._hidden.pop(job_id, None)
        if job is None:
            return
        self._hide(job)
        if job.not_before > 0:
            self._wakes.remove((job.not_before, job_id))

    def _show(self, job: Job) -> None:
        self.waiting.put(job, self.class_of(job))
        line = self.waiting.line_of(job.id)
        line.alive = bool(self.options(line))
        self._age(job, line.alive)

    def _hide(self, job: Job) -> None:
        self.waiting.remove(job.id)
        self._age(job, False)
        if job.id == self._aged:
            self._aged = None

    def _age(self, job: Job, counts: bool) -> None:
        """Only a job that could run here gets older than others."""
        if counts and job.id not in self._ages:
            self._ages.add(job.id)
            self._by_age.add((job.queued_at, job.id))
            self._elders.add(job)
        elif not counts and job.id in self._ages:
            self._ages.discard(job.id)
            self._by_age.remove((job.queued_at, job.id))
            self._elders.remove(job.id)

    def _sort_out(self) -> None:
        """Other nodes: other jobs could run."""
        if self._sorted_out != self.pools.version:
            self.memory.clear()
            self._sorted_out = self.pools.version
            for line in self.waiting.lines():
                counts = bool(self.options(line))
                for job_id in self.waiting.of_line(line) if counts != line.alive else ():
                    self._age(self.waiting.job(job_id), counts)
                line.alive = counts

    def class_of(self, job: Job) -> Rank:
        if job.id == self._aged:
            return Rank.AGED
        if job.id in self._elders.members:
            return Rank.ELDER
        return Rank.URGENT if job.priority == Priority.URGENT else RANK_OF[job.priority]

    def options(self, line: Line) -> list[Option]:
        """What could hold the line's jobs."""
        if line.version != self.pools.version:
            line.options, line.version = self.pools.options(line.requirement), self.pools.version
            signature = tuple((shape.slots, pool.key) for shape, pool in line.options)
            line.signature = self._signatures.setdefault(signature, len(self._signatures))
        return line.options

    def in_order(self) -> tuple[Job, ...]:
        return (*self.waiting.in_order(), *self._late())

    def unordered(self) -> Iterator[Job]:
        return chain(self.waiting.jobs(), self._hidden.values())

    def _late(self) -> list[Job]:
        return sorted(self._hidden.values(), key=lambda job: (job.not_before, job.id))

    def position(self, job_id: str) -> int:
        """1 is the next in line; those that are tried again later come last."""
        if job_id in self.waiting:
            return self.waiting.position(job_id)
        return len(self.waiting) + 1 + [job.id for job in self._late()].index(job_id)

    def get(self, job_id: str) -> Job | None:
        """A job that waits."""
        return self.waiting.get(job_id) or self._hidden.get(job_id)

    # Who holds ----------------------------------------------------------------------------------------------------

    def hold(self, holding: Holding) -> None:
        before = self.held.get(holding.key)
        if before == holding:
            return
        if before is not None and same_slots(before, holding):
            self._renew(before, holding)
            return
        self._elders.add(holding.job)
        self.let_go(holding.key)
        self.put(holding)

    def _renew(self, before: Holding, holding: Holding) -> None:
        """It goes on with what it has: trains, is told to give way, ends."""
        if (before.yielding is None) != (holding.yielding is None):
            self.pools.promise(masks(holding.placement), coming=holding.yielding is not None)
        self.held[holding.key] = holding
        self._count_waited(before, False)
        self._count_waited(holding, True)
        self._put_runner(holding)

    def let_go(self, key: Attempt) -> None:
        holding = self.held.get(key)
        if holding is not None:
            self.drop(holding)
            self._elders.remove(holding.job.id)

    def put(self, holding: Holding, tried: bool = False) -> None:
        """Raises `SlotConflict`. `drop` undoes it. `tried`: a grant that is only tried out, whom nobody displaces yet."""
        key, job = holding.key, holding.job
        if not holding.parked:
            slots = masks(holding.placement)
            self.pools.take(slots)
            if holding.yielding:
                self.pools.promise(slots)
        self.held[key] = holding
        for name in holding.placement.nodes:
            self.on_node[name].add(key)
        self._attempts[job.id].add(key)
        self._of_tenant[job.tenant].add(key)
        self._count_memory(holding, 1)
        if holding.parked:
            self.parked[key] = holding
        else:
            self.count(job, holding.placement.slots)
        if not tried:
            self._count_waited(holding, True)
            self._put_runner(holding)

    def drop(self, holding: Holding) -> None:
        key, job = holding.key, holding.job
        self._forget_runner(holding)
        del self.held[key]
        self._count_waited(holding, False)
        for name in holding.placement.nodes:
            self.on_node[name].discard(key)
        self._attempts[job.id].discard(key)
        if not self._attempts[job.id]:
            del self._attempts[job.id]
        self._of_tenant[job.tenant].discard(key)
        self._count_memory(holding, -1)
        if holding.parked:
            del self.parked[key]
        else:
            self.pools.give(masks(holding.placement))
            self.count(job, -holding.placement.slots)

    def count(self, job: Job, slots: int) -> None:
        """Its tenant holds so many more."""
        urgent = job.priority == Priority.URGENT
        self.ledger.hold(job.tenant, slots, urgent)
        self.waiting.tenant_changed(job.tenant)
        if urgent:
            self.waiting.urgent_changed()
        self._check_mode(job.tenant)

    def _count_memory(self, holding: Holding, sign: int) -> None:
        if holding.parked or holding.yielding == How.PARK:
            for name in holding.placement.nodes:
                self.park_used[name] += sign * round(holding.park_gb(name) * 1024)

    # What a runner is worth ---------------------------------------------------------------------------------------

    def rank(self, holding: Holding) -> Rank:
        job = holding.job
        account = self.ledger.account(job.tenant)
        if holding.key == self._aged_runner:
            return Rank.AGED
        if job.id in self._elders.members:
            return Rank.ELDER
        if job.priority == Priority.URGENT and self.ledger.urgent_within(job.tenant):
            return Rank.URGENT
        own = (
            account.is_owed(holding.placement.slots)
            if holding.parked
            else holding.key in self._modes.get(job.tenant, (frozenset(),))[0]
        )
        return RANK_OF[job.priority].owed() if own else RANK_OF[job.priority]

    def _put_runner(self, holding: Holding) -> None:
        self._forget_runner(holding)
        if holding.parked:
            return
        rank = self.rank(holding)
        if holding.yielding:
            return
        weight = self.ledger.account(holding.job.tenant).share.weight
        for name in holding.placement.nodes:
            runners = self.pools.runners_on(name)
            if runners is not None:
                runners.put(name, holding, (rank, weight))

    def _forget_runner(self, holding: Holding) -> None:
        for name in holding.placement.nodes:
            runners = self.pools.runners_on(name)
            if runners is not None:
                runners.drop(name, holding)

    def _count_waited(self, holding: Holding, there: bool) -> None:
        """One runner at a time keeps its slots because it had waited so long: the one that has run the longest."""
        if holding.parked or holding.since - holding.job.queued_at < self.policy.aged_after_s:
            return
        entry = holding.since, holding.key
        self._waited.add(entry) if there else self._waited.discard(entry)
        before, self._aged_runner = self._aged_runner, self._waited[0][1] if self._waited else None
        for key in {before, self._aged_runner} - {holding.key, None} if before != self._aged_runner else ():
            if key in self.held:
                self._put_runner(self.held[key])

    def _check_mode(self, tenant: str) -> None:
        """Which of a tenant's runners are its own, and whether its urgent ones are within its allowance: when that
        changes, so do their ranks."""
        account, before = self.ledger.account(tenant), self._modes.get(tenant)
        if before is None:
            if not (account.share.guaranteed_slots or account.urgent):
                return
            before = frozenset(), True
        runners = (self.held[key] for key in self._of_tenant[tenant] if key not in self.parked)
        own = owned(runners, account.share.guaranteed_slots) if account.share.guaranteed_slots else frozenset()
        within = account.urgent == 0 or self.ledger.urgent_within(tenant)
        self._modes[tenant] = (own, within)
        changed = set(self._of_tenant[tenant]) if within != before[1] else own ^ before[0]
        for key in changed:
            if key in self.held:
                self._put_runner(self.held[key])

    # Time ---------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        before, self._now = self._now, now
        self._sort_out()
        if not self._sized:
            self._size()
        self._wake(before, now)
        if now < before:
            for holding in list(self.held.values()):
                self._put_runner(holding)
        self.pools.advance(now)
        self._choose_elders()
        self._choose_aged(now)

    def _wake(self, before: float, now: float) -> None:
        low, high = min(before, now), max(before, now)
        for _, job_id in list(self._wakes.irange((low,), (high, "\U0010ffff"))):
            job = self.get(job_id)
            assert job is not None
            if job.not_before > now and job_id not in self._hidden:
                self._hide(job)
                self._hidden[job_id] = job
            elif job.not_before <= now and job_id in self._hidden:
                del self._hidden[job_id]
                self._show(job)

    def _choose_elders(self) -> None:
        if self._elders.stale:
            budget = self.policy.oldest_share * self.ledger.capacity
            self._reclass(self._elders.choose(budget, lambda tenant: self.ledger.account(tenant).share.max_slots))

    def _reclass(self, job_ids: Iterable[str]) -> None:
        for job_id in sorted(job_ids):
            job = self.waiting.get(job_id)
            if job is not None:
                self.waiting.put(job, self.class_of(job))
            for key in self._attempts.get(job_id, ()):
                self._put_runner(self.held[key])

    def _choose_aged(self, now: float) -> None:
        before, self._aged = self._aged, None if self._aged_runner else self._first_aged(now)
        if before != self._aged:
            self._reclass(job_id for job_id in (before, self._aged) if job_id is not None)

    def _first_aged(self, now: float) -> str | None:
        until = (now - self.policy.aged_after_s, "\U0010ffff")
        for _, job_id in islice(self._by_age.irange(None, until), AGED_LOOKED_AT):
            job = self.waiting.get(job_id)
            if job is not None and self.ledger.account(job.tenant).admits(self.waiting.line_of(job_id).least):
                return str(job_id)
        return None

    def next_look(self, now: float) -> float | None:
        looks = []
        if len(self.waiting) or self.parked:
            looks.append((now // self.policy.look_s + 1) * self.policy.look_s)
        if self.waiting.pressing():
            looks.append(self.pools.settles_after(now))
        looks += [wakes_at for wakes_at, _ in islice(self._wakes.irange((now, "\U0010ffff")), 1)]
        looks += [expires_at(one, self.policy) for one in self.parked.values() if not one.yielding]
        return min((look for look in looks if now < look < math.inf), default=None)
