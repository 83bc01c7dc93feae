"""Every tunable of the scheduler, with its unit. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    # Time slices.
    min_run_s: float = 125.0
    """Nobody is told to give way earlier in a turn, be it to an urgent job or to a tenant that wants lent slots back."""
    quantum_s: float = 125.0
    """… nor, for one of its own class that deserves the slots more, earlier than this."""
    hysteresis: float = 1.1
    """A waiting job must be worth so many times as much as all whom it displaces: no pair takes turns for nothing."""
    look_s: float = 300.0
    """While anybody waits: what runners are worth falls as they run, so one looks again."""

    # What giving way costs, in seconds of each slot: of like victims the cheaper is taken.
    park_cost_s: float = 3.0
    switch_cost_s: float = 30.0
    park_max_s: float = 1800.0
    """A job that has been parked so long is suspended, so that it can go on elsewhere."""

    # The order. It weighs what a job is thought to need still by its slots to these powers.
    newcomer_s: float = 300.0
    """Who has had less service than this goes first: most jobs are short."""
    line_exponent: float = 0.5
    """In the line: 1 counts slot-seconds, 0 jobs."""
    worth_exponent: float = 0.8
    """In a contest for slots."""
    oldest_share: float = 0.04
    """Of the slots, so many are for the unfinished jobs that were submitted first. It bounds every wait."""
    aged_after_s: float = 7 * 24 * 3600.0
    """A job that has waited so long goes before urgent ones too, one at a time, and keeps its slots to its end."""

    # Gangs.
    reserve_after_s: float = 300.0
    """A job that has waited so long, and does not fit, has free slots kept for it."""
    reservations: int = 1
    """So many jobs at a time have slots kept."""

    # Urgent jobs: shares of all slots; at least one slot each.
    urgent_share: float = 0.25
    urgent_share_of_tenant: float = 0.10

    # Where.
    steal_margin: float = 1.5
    """A job whose model is on the node goes before one that would have to bring its own there, unless that one deserves
    the slots so many times as much, or has waited `reserve_after_s`."""

    def __post_init__(self) -> None:
        if not (self.look_s > 0 and self.newcomer_s >= 0 and self.hysteresis >= 1):
            raise ValueError("look_s must be over 0, newcomer_s at least 0, hysteresis at least 1")
