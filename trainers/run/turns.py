"""The turns of an attempt: what the scheduler orders with a heartbeat against what the child does. By level: the same beat may
be followed again and again. Knows nothing of how a child is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.events import How
from trainers.run.conversation import Conversation
from trainers.run.ports import Heartbeat


@dataclass(frozen=True)
class TurnActions:
    """`suspend`: checkpoint, end the child, leave the lease. `free`: the slots, in the rows; whether they are free now."""

    suspend: Callable[[], None]
    free: Callable[[], bool]


class Turns:
    """`parks`: whether the child can give its slots back while it lives (on `cpu` it needs nothing but not to compute)."""

    def __init__(self, conversation: Conversation, actions: TurnActions, grace_s: float) -> None:
        self._conversation = conversation
        self._actions = actions
        self._grace_s = grace_s
        self._asked: tuple[str, float] | None = None

    def follow(self, beat: Heartbeat, parks: bool, now: float) -> None:
        if beat.order is How.SUSPEND:
            self._actions.suspend()
        elif beat.order is How.PARK or beat.parked:
            self._park(beat, parks, now)
        else:
            self._go_on(now)

    def _park(self, beat: Heartbeat, parks: bool, now: float) -> None:
        """A child that is still loading has nothing to keep; one that does not answer in time is asked for less."""
        if self._conversation.parked:
            if not beat.parked:
                self._actions.free()
        elif not parks or not self._conversation.trains or self._ask("park", now) > self._grace_s:
            self._actions.suspend()

    def _go_on(self, now: float) -> None:
        if self._conversation.parked:
            self._ask("resume", now)
        else:
            self._asked = None

    def _ask(self, command: str, now: float) -> float:
        """Sends the command, once; the seconds since."""
        if self._asked is None or self._asked[0] != command:
            self._asked = (command, now)
            self._conversation.command(command)
        return now - self._asked[1]
