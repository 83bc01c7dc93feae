"""How long a job will run, learnt from the jobs that have ended: equally likely run times. Pure, deterministic, online.

Experts are decayed histograms of log run times, one for each group that a job belongs to (all, its gang size, its
tenant, its tenant and size) and each length of memory. Finer groups lean on coarser ones while they have seen little.
The forecast is their mixture, each weighted by how well it foretold the tenant's earlier jobs: tempered Bayes with a
fixed share (Herbster and Warmuth 1998), which follows a tenant whose habits change.

Where the work of a job is known (rows × epochs × measured speed), what is learnt is the ratio of truth to that."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Outlook = tuple[float, ...]

OUTLOOK = 15
"""Values in an outlook."""

MEMORIES = (10.0, 100.0, 1000.0)
"""Jobs of a group after which an observation weighs 1/e."""

PRIOR_JOBS = 4.0
"""A finer group's own jobs outweigh the coarser group's opinion from so many on."""

TEMPER = 0.5
"""Power of the likelihood when experts are weighed: jobs of a sweep are not independent of each other."""

SHARE = 0.01
"""Of the weight, spread evenly after every job, so that no expert is lost for ever."""

REMEMBERED = 5_000
"""Forecasts kept until their jobs end (7 kB each); experts are judged by what they said then, not by hindsight."""


@dataclass(frozen=True)
class Traits:
    """What is known of a job before it runs. `slots`: its gang. `model`: base model, where known."""

    tenant: str
    slots: int
    model: str = ""
    expected_s: float | None = None
    """Run time as worked out from rows, epochs and measured speed, where known."""


class _Scale:
    """Bins of equal width in the logarithm, from `low` over so many doublings."""

    def __init__(self, low: float, doublings: int, per_doubling: int) -> None:
        self._low, self._per_doubling = low, per_doubling
        self.bins = doublings * per_doubling
        self.log_edges: Array = np.log(low) + np.log(2) * np.arange(self.bins + 1) / per_doubling

    def bin_of(self, value: float) -> int:
        return min(self.bins - 1, max(0, int(self.position(value))))

    def position(self, value: float) -> float:
        return float(self._per_doubling * np.log2(max(value, self._low) / self._low))

    def points(self, masses: Array, count: int) -> Array:
        """The middles of `count` equally likely parts."""
        rising = np.concatenate(([0.0], np.cumsum(masses)))
        return np.exp(np.interp((np.arange(count) + 0.5) / count, rising / rising[-1], self.log_edges))


class _Experts:
    """One expert for each group and memory, over one scale. Groups are named from the coarsest to the finest."""

    def __init__(self, scale: _Scale, prior: Array, groups: int) -> None:
        self.scale = scale
        self._prior = prior / prior.sum()
        self._decay: Array = np.exp(-1 / np.array(MEMORIES))[:, None]
        self._seen: dict[Hashable, Array] = {}
        self._even: Array = np.full(groups * len(MEMORIES), 1 / (groups * len(MEMORIES)))
        self._weights: dict[str | None, Array] = {}  # by tenant; None: of all, with which a new tenant begins

    def opinions(self, groups: Sequence[Hashable]) -> Array:
        """Masses of the bins, a row for each expert."""
        above, rows = self._prior, []
        for group in groups:
            seen = self._seen.get(group)
            if seen is None:
                rows.append(np.broadcast_to(above, (len(MEMORIES), self.scale.bins)))
                continue
            own = (seen + PRIOR_JOBS * above) / (seen.sum(axis=1, keepdims=True) + PRIOR_JOBS)
            rows.append(own)
            above = own[-1]
        return np.concatenate(rows)

    def blend(self, tenant: str, opinions: Array) -> Array:
        return self._weights_of(tenant) @ opinions

    def _weights_of(self, tenant: str | None) -> Array:
        return self._weights.get(tenant, self._weights.get(None, self._even))

    def learn(self, groups: Sequence[Hashable], tenant: str, value: float, said: Array) -> None:
        at = self.scale.bin_of(value)
        near = said[:, max(0, at - 1) : at + 2].mean(axis=1)
        for who in (tenant, None):
            weights = self._weights_of(who) * near**TEMPER
            self._weights[who] = (1 - SHARE) * weights / weights.sum() + SHARE * self._even
        for group in groups:
            seen = self._seen.setdefault(group, np.zeros((len(MEMORIES), self.scale.bins)))
            seen *= self._decay
            for bin_, mass in ((at - 1, 0.25), (at, 0.5), (at + 1, 0.25)):  # smoothed: the next one is near, not equal
                seen[:, min(self.scale.bins - 1, max(0, bin_))] += mass


RUN_TIMES = _Scale(low=1.0, doublings=23, per_doubling=6)  # seconds: up to 97 days
RATIOS = _Scale(low=1 / 16, doublings=8, per_doubling=16)
RATIO_SPREAD = 0.35
"""Of the logarithm of truth over work-out, before any such job has ended; one sigma."""


def _ratio_prior() -> Array:
    middles = (RATIOS.log_edges[1:] + RATIOS.log_edges[:-1]) / 2
    masses: Array = np.exp(-0.5 * (middles / RATIO_SPREAD) ** 2) + 1e-4
    return masses


class Estimator:
    """`learn` in the order in which jobs end. Nothing in it looks at jobs that have not."""

    def __init__(self) -> None:
        self._runs = _Experts(RUN_TIMES, np.ones(RUN_TIMES.bins), groups=4)
        self._ratios = _Experts(RATIOS, _ratio_prior(), groups=3)
        self._said: dict[str, tuple[Array, Array | None]] = {}
        self._ended = 0

    def outlook(self, traits: Traits, attained_s: float = 0.0, job_id: str = "") -> Outlook:
        """`OUTLOOK` equally likely total run times in seconds, sorted, of a job that has run for `attained_s` without
        an end; empty while nothing is known. With `job_id` experts will be judged by what they say now."""
        runs = self._runs.opinions(_run_groups(traits))
        ratios = None if traits.expected_s is None else self._ratios.opinions(_ratio_groups(traits))
        if job_id and job_id not in self._said:
            self._said[job_id] = runs, ratios
            if len(self._said) > REMEMBERED:
                del self._said[next(iter(self._said))]
        if traits.expected_s is not None and ratios is not None:
            blend = self._ratios.blend(traits.tenant, ratios)
            found = _beyond(RATIOS, blend, attained_s / traits.expected_s)
            return tuple(float(ratio * traits.expected_s) for ratio in found)
        if not self._ended:
            return ()
        return tuple(float(run_s) for run_s in _beyond(RUN_TIMES, self._runs.blend(traits.tenant, runs), attained_s))

    def learn(self, traits: Traits, run_s: float, job_id: str = "") -> None:
        """A job has ended after `run_s` of service; waits and switches are left out."""
        runs, ratios = self._said.pop(job_id, (None, None))
        groups = _run_groups(traits)
        self._runs.learn(groups, traits.tenant, run_s, self._runs.opinions(groups) if runs is None else runs)
        self._ended += 1
        if traits.expected_s is not None:
            groups = _ratio_groups(traits)
            ratios = self._ratios.opinions(groups) if ratios is None else ratios
            self._ratios.learn(groups, traits.tenant, run_s / traits.expected_s, ratios)

    def forget(self, job_id: str) -> None:
        """The job went without an end of its own (cancelled): it teaches nothing."""
        self._said.pop(job_id, None)


def _run_groups(traits: Traits) -> Sequence[Hashable]:
    return (), ("size", traits.slots), ("tenant", traits.tenant), (traits.tenant, traits.slots)


def _ratio_groups(traits: Traits) -> Sequence[Hashable]:
    return (), ("model", traits.model), (traits.tenant, traits.model)


def _beyond(scale: _Scale, masses: Array, attained: float) -> Array:
    """Points of the distribution, given that the value is above `attained`."""
    position = scale.position(attained)
    at = int(position)
    if at >= scale.bins:
        return attained * _TAIL
    left = masses.copy()
    left[:at] = 0.0
    left[at] *= 1 - (position - at)
    return np.maximum(scale.points(left, OUTLOOK), attained)


_TAIL: Array = 1 / (1 - (np.arange(OUTLOOK) + 0.5) / OUTLOOK)
"""Of a job that has outrun everything known, over what it has run: half will run as long again (Lindy's law)."""


def remaining(outlook: Sequence[float], attained_s: float) -> Outlook:
    """Equally likely remaining times, sorted, after `attained_s`. Empty only when the outlook is."""
    if not outlook or attained_s < outlook[-1]:
        return tuple(run_s - attained_s for run_s in outlook if run_s > attained_s)
    return tuple(float(factor - 1) * attained_s for factor in _TAIL)


def quantile(outlook: Sequence[float], q: float, attained_s: float = 0.0) -> float | None:
    """Of the remaining time: so much, or less, with probability `q`."""
    left = remaining(outlook, attained_s)
    if not left:
        return None
    return float(np.interp(q, (np.arange(len(left)) + 0.5) / len(left), left))


def mean_remaining(outlook: Sequence[float], attained_s: float) -> float | None:
    left = remaining(outlook, attained_s)
    return sum(left) / len(left) if left else None


def spread(run_s: float, left_s: float) -> Outlook:
    """Total run times of a job that has run `run_s` and whose remaining steps, at the pace of its last ones, need `left_s`."""
    return tuple(run_s + factor * left_s for factor in _PACES)


PACE_SPREAD = 0.1
"""Of the logarithm of a job's own pace over that of its steps so far; one sigma."""

_PACES = tuple(math.exp(NormalDist(0, PACE_SPREAD).inv_cdf((number + 0.5) / OUTLOOK)) for number in range(OUTLOOK))
