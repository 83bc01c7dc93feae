"""One look at everybody who waits, in the order of their turns: who starts, who gives way for whom, for whom slots are
kept. It tries each step out on the facts, so that the next one sees it, and takes all of them back at its end. Pure."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.core.events import Decision, Grant, How, Resume, Yield
from cluster.core.facts import Facts
from cluster.core.job import Job, Shape
from cluster.core.kinds import CPU
from cluster.core.memory import Failure
from cluster.core.order import Rank, Turn, expected_s, index
from cluster.core.placement import Pool, Slots, bits, lowest, placement_of
from cluster.core.pools import Option, Requirement
from cluster.core.queues import Line, Name
from cluster.core.slices import Holding, expires_at
from cluster.core.victims import Claim, Room, worth_of

Undo = Callable[[], None]


@dataclass
class Outcome:
    """What the round meant for those who got nothing yet. `promised`: slots are coming free for them."""

    granted: set[str] = field(default_factory=set)
    promised: set[str] = field(default_factory=set)
    kept: dict[str, str] = field(default_factory=dict)
    """Node → the job that its free slots are kept for."""


class Round:
    def __init__(self, facts: Facts, now: float, remembers: bool = False) -> None:
        self._remembers = remembers
        self._gains = facts.pools.gains()
        self._gained = facts.pools.gained()
        self._trail = 0
        self._facts = facts
        self._now = now
        self._made: list[Decision] = []
        self._undo: list[Undo] = []
        self._passed: dict[Requirement, set[Name]] = {}
        self.outcome = Outcome()

    def decisions(self) -> list[Decision]:
        try:
            self._leave_draining_nodes()
            self._serve_in_order()
            self._give_up_parking()
        finally:
            while self._undo:
                self._undo.pop()()
            self._facts.pools.regain(self._gains)
        return self._made

    # In order -----------------------------------------------------------------------------------------------------

    def _serve_in_order(self) -> None:
        """Lines with the same options are a group: what the first of them all cannot have, none of them can."""
        facts, lines = self._facts, list(self._facts.waiting.lines())
        parked = [held for held in facts.parked.values() if not held.yielding]
        groups = self._groups(lines)
        heap = [(group[0], signature) for signature, group in groups.items()]
        heap += [((turn_of_parked(facts, held), -1 - number), -1) for number, held in enumerate(parked)]
        heapq.heapify(heap)
        while heap:
            (turn, number), signature = heapq.heappop(heap)
            if number < 0:
                self._serve_parked(parked[-1 - number])
                continue
            line, group = lines[number], groups[signature]
            unchanged = not self._undo or self._head(line) == turn
            if unchanged and not self._serve_head(line, turn):
                continue
            head = self._head(line)
            heapq.heappop(group) if head is None else heapq.heapreplace(group, (head, number))
            if group:
                heapq.heappush(heap, (group[0], signature))

    def _groups(self, lines: list[Line]) -> dict[int, list[tuple[Turn, int]]]:
        """Signature → a heap of the heads of its lines, by number."""
        groups: defaultdict[int, list[tuple[Turn, int]]] = defaultdict(list)
        for number, line in enumerate(lines):
            if line.head is not None and self._facts.options(line):
                groups[line.signature].append((line.head, number))
        for group in groups.values():
            heapq.heapify(group)
        return groups

    def _head(self, line: Line) -> Turn | None:
        passed = self._passed.get(line.requirement) if self._passed else None
        if not passed:
            return line.head
        return next((turn for turn, name in line.heads if name not in passed), None)

    def _serve_head(self, line: Line, turn: Turn) -> bool:
        """Whether the next one of its group may be looked at: it got something, or it was its tenant's limit."""
        facts, options = self._facts, self._facts.options(line)
        gains = [self._gained[id(pool)] for _, pool in options]
        promising = facts.memory.worth_trying(line.signature, turn, gains, (self._trail, self._now))
        if not promising:
            return False
        job = facts.waiting.job(turn[3])
        account = facts.ledger.account(job.tenant)
        able = options if account.room is None else [one for one in options if account.admits(one[0].slots)]
        tried = [options[at] for at in promising if account.admits(options[at][0].slots)]
        if self._start(job, tried) or self._await(job, tried) or self._displace(job, tried):
            return True
        kept = self._keep_for(job, able)
        if len(able) < len(options):
            self._passed.setdefault(line.requirement, set()).add(facts.waiting.name_of(job.id))
            return True
        if self._remembers and not kept:  # what is free only shrinks in a round, and those behind deserve less
            begins = job.queued_at + facts.policy.reserve_after_s
            until = begins if begins > self._now else math.inf
            facts.memory.failed(line.signature, Failure(turn, gains, self._trail, self._now, until))
        return False

    def _start(self, job: Job, options: list[Option]) -> bool:
        for shape, pool in options:
            found = pool.find(shape.slots, job)
            if found is not None:
                own = self._at_home(job, pool, next(iter(found))) if len(found) == 1 and job.model else None
                self._grant(*own) if own else self._grant(job, shape, found)
                return True
        return False

    def _at_home(self, job: Job, pool: Pool, name: str) -> tuple[Job, Shape, Slots] | None:
        """Before a node takes a job that has to move there: one of its own, that deserves it about as much."""
        facts, policy, models = self._facts, self._facts.policy, pool.nodes[name].models
        if not models or job.model in models or self._now - job.queued_at >= policy.reserve_after_s:
            return None
        rank, deserves = facts.waiting.turn(job.id)[:2]
        for _, own in facts.waiting.at_home(models, Rank(rank), deserves * policy.steal_margin):
            slots = self._fits_on(own, pool, name)
            if slots is not None:
                return own, *slots
        return None

    def _fits_on(self, job: Job, pool: Pool, name: str) -> tuple[Shape, Slots] | None:
        free, account = pool.mask(name), self._facts.ledger.account(job.tenant)
        for shape, there in self._facts.options(self._facts.waiting.line_of(job.id)):
            if there is pool and shape.slots <= free.bit_count() and account.admits(shape.slots):
                return shape, {name: lowest(free, shape.slots)}
        return None

    def _await(self, job: Job, options: list[Option]) -> bool:
        """Others were told to give way before, and their slots will do."""
        for shape, pool in options:
            found = pool.find(shape.slots, job, soon=True)
            if found is not None:
                self._claim(job, found)
                return True
        return False

    def _displace(self, job: Job, options: list[Option]) -> bool:
        rooms = []
        rank = self._facts.waiting.turn(job.id)[0]
        for number, (shape, pool) in enumerate(options):
            runners = self._facts.pools.runners[pool.key]
            if not runners.may(shape.slots, rank):
                continue
            room = runners.room(shape.slots, self._claim_of(job, rank, shape.slots))
            if room is not None:
                rooms.append((room.cost, number, room))
        if not rooms:
            return False
        _, number, room = min(rooms, key=lambda one: one[:2])
        self._make_room(job, room)
        pool = options[number][1]
        self._claim(job, {name: pool.part(name, count, soon=True) for name, count in room.parts.items()})
        return True

    def _claim_of(self, job: Job, rank: int, slots: int) -> Claim:
        policy = self._facts.policy
        weight = self._facts.ledger.account(job.tenant).share.weight
        seconds = expected_s(job.attained_s, policy)
        return Claim(rank, worth_of(seconds, slots, weight, policy))

    # Slots kept ---------------------------------------------------------------------------------------------------

    def _keep_for(self, job: Job, options: list[Option]) -> bool:
        """Smaller jobs behind must not feed on a gang's nodes for ever. One gang's nodes at a time are kept, so that
        waiting for it idles as little as it can; it lacks some of their slots, so all that are free are its own."""
        policy = self._facts.policy
        waits = self._now - job.queued_at >= policy.reserve_after_s
        first = job.attained_s < policy.newcomer_s or self._facts.waiting.turn(job.id)[0] <= Rank.OWED_LOW
        if not (options and waits and first) or len(set(self.outcome.kept.values())) >= policy.reservations:
            return False
        shape, pool = options[0]
        for name in pool.closest(shape.slots):
            self.outcome.kept[name] = job.id
            self._take({name: pool.mask(name, soon=True)})
            self._keep(pool, name)
            self._trail = hash((self._trail, job.id, name))
        return True

    def _keep(self, pool: Pool, name: str) -> None:
        runners = self._facts.pools.runners[pool.key]
        runners.keep(name, True)
        self._undo.append(lambda: runners.keep(name, False))

    # Parked jobs --------------------------------------------------------------------------------------------------

    def _serve_parked(self, parked: Holding) -> None:
        free, soon = self._own_slots(parked, False), self._own_slots(parked, True)
        if not self._facts.ledger.account(parked.job.tenant).admits(parked.placement.slots):
            return
        if free is not None:
            self._resume(parked, free)
        elif soon is not None:
            self._claim(parked.job, soon)
        elif not self._displace_for(parked):
            self._move(parked)

    def _own_slots(self, parked: Holding, soon: bool) -> Slots | None:
        """Slots of its own nodes that it could go on with; of accelerators, which its process has open, the same."""
        found = {}
        for name, slots in parked.placement.nodes.items():
            pool = self._facts.pools.pool_of(name)
            if pool is None:
                return None
            there, same = pool.mask(name, soon), bits(slots)
            if there & same == same:
                found[name] = same
            elif pool.key.kind != CPU or there.bit_count() < len(slots):
                return None
            else:
                found[name] = pool.part(name, len(slots), soon)
        return found

    def _displace_for(self, parked: Holding) -> bool:
        name = next(iter(parked.placement.nodes))
        pool, job = self._facts.pools.pool_of(name), parked.job
        if pool is None or pool.key.kind != CPU:
            return False
        parts = {name: len(slots) for name, slots in parked.placement.nodes.items()}
        claim = self._claim_of(job, self._facts.rank(parked), parked.placement.slots)
        room = self._facts.pools.runners[pool.key].room_on(parts, claim)
        if room is None:
            return False
        self._make_room(job, room)
        self._claim(job, {name: pool.part(name, count, soon=True) for name, count in parts.items()})
        return True

    def _move(self, parked: Holding) -> None:
        """Its own nodes are busy, others are not."""
        facts, job = self._facts, parked.job
        if self._now - parked.since < facts.policy.min_run_s:
            return
        for shape, pool in facts.pools.options_of(job):
            found = pool.find(shape.slots, job)
            if found is not None:
                self._yield(parked, "its own node is busy, and slots of another are free")
                self._claim(job, found)
                return

    def _give_up_parking(self) -> None:
        for held in list(self._facts.parked.values()):
            late = expires_at(held, self._facts.policy) <= self._now
            if late and not held.yielding and held.job.id not in self.outcome.promised:
                self._yield(held, "it has been parked for long; it can go on elsewhere once it is suspended")

    # Giving way ---------------------------------------------------------------------------------------------------

    def _leave_draining_nodes(self) -> None:
        for name in sorted(self._facts.pools.draining):
            for key in sorted(self._facts.on_node[name]):
                if not self._facts.held[key].yielding:
                    self._yield(self._facts.held[key], f"node {name} is being drained")

    def _make_room(self, job: Job, room: Room) -> None:
        for key in room.victims:
            held = self._facts.held[key]
            whose = "another job of its tenant" if held.job.tenant == job.tenant else "another tenant's job"
            self._yield(held, f"its turn is over: {whose} deserves the slots more now", self._how(held))

    def _how(self, held: Holding) -> How:
        """Parked where the memory of all its nodes has room for it."""
        facts = self._facts
        nodes = [facts.pools.nodes.get(name) for name in held.placement.nodes]
        fits = all(
            node and held.park_gb(node.name) <= node.park_gb - facts.park_used[node.name] / 1024 for node in nodes
        )
        return How.PARK if held.shape.park_gb > 0 and fits else How.SUSPEND

    # Steps and their undoing --------------------------------------------------------------------------------------

    def _yield(self, held: Holding, reason: str, how: How = How.SUSPEND) -> None:
        self._made.append(Yield(*held.key, how, reason))
        self._replace(held, replace(held, yielding=how))

    def _resume(self, parked: Holding, slots: Slots) -> None:
        placement = placement_of(slots)
        self._made.append(Resume(*parked.key, placement))
        self.outcome.granted.add(parked.job.id)
        self._replace(parked, replace(parked, placement=placement, since=self._now, parked=False))

    def _replace(self, held: Holding, then: Holding) -> None:
        facts = self._facts
        facts.drop(held)
        facts.put(then)
        self._undo += [lambda: facts.put(held), lambda: facts.drop(then)]

    def _grant(self, job: Job, shape: Shape, slots: Slots) -> None:
        facts = self._facts
        placement = placement_of(slots)
        asked = next(one for one in job.shapes if replace(one, park_gb=0.0) == shape)
        self._made.append(Grant(job, placement, asked))
        self.outcome.granted.add(job.id)
        holding = Holding(job, job.attempt + 1, placement, self._now)
        self._leave_line(job)
        facts.put(holding, tried=True)
        self._undo.append(lambda: facts.drop(holding))

    def _leave_line(self, job: Job) -> None:
        place = self._facts.waiting.remove(job.id)
        if place is not None:
            self._undo.append(lambda: self._facts.waiting.put_back(place))

    def _claim(self, job: Job, slots: Slots) -> None:
        """Slots that come free are promised to it: nobody behind may have them, and no further victim is needed."""
        facts = self._facts
        self.outcome.promised.add(job.id)
        self._trail = hash((self._trail, job.id, tuple(slots.items())))
        self._leave_line(job)
        self._take(slots)
        count = sum(mask.bit_count() for mask in slots.values())
        facts.count(job, count)
        self._undo.append(lambda: facts.count(job, -count))

    def _take(self, slots: Slots) -> None:
        pools = self._facts.pools
        marks = pools.marks(slots)
        pools.take(slots)
        self._undo.append(lambda: pools.restore(marks))


def turn_of_parked(facts: Facts, parked: Holding) -> Turn:
    job, rank = parked.job, facts.rank(parked)
    weight = facts.ledger.account(job.tenant).share.weight
    return rank, job.born if rank == Rank.ELDER else index(job, facts.policy, weight), parked.since, job.id
