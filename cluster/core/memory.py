"""What was tried for those that wait, in vain: not tried again before something is gained. Only saves time. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cluster.core.events import Decision, Grant, Resume
from cluster.core.order import Turn


@dataclass(frozen=True)
class Failure:
    """`gains`: of each of its options, when `turn` got nothing. `trail`: what those before it in the round were
    promised."""

    turn: Turn
    gains: list[int]
    trail: int
    since: float
    until: float


class Memory:
    """A round tries its own grants out, so what it finds holds once they are made: until then nothing is remembered."""

    def __init__(self) -> None:
        self._failures: dict[Hashable, Failure] = {}
        self._pending: set[Hashable] = set()

    def clear(self) -> None:
        self._failures.clear()

    def decided(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Grant(job, placement, _):
                    self._pending.add((job.id, tuple(placement.nodes.items())))
                case Resume(job_id, _, placement):
                    self._pending.add((job_id, tuple(placement.nodes.items())))
                case _:
                    self._pending.add((decision.job_id, decision.attempt))

    def done(self, what: Hashable) -> None:
        self._pending.discard(what)

    def begin(self) -> None:
        if self._pending:
            self._pending.clear()
            self._failures.clear()

    def failed(self, lines: Hashable, failure: Failure) -> None:
        self._failures[lines] = failure

    def worth_trying(self, lines: Hashable, turn: Turn, gains: list[int], when: tuple[int, float]) -> Sequence[int]:
        """Which of the options, by number: where something was gained since they failed, or all. `when`: trail, time."""
        before, (trail, now) = self._failures.get(lines), when
        if before is None or before.turn > turn or before.trail != trail or not before.since <= now < before.until:
            return range(len(gains))
        if before.gains == gains:
            return ()
        return [at for at, (then, gained) in enumerate(zip(before.gains, gains, strict=True)) if then != gained]
