"""Weighted max-min shares, against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.services.fair_shares import Claim, claims_of, fair_shares
from cluster.core.job import Job, Placement, Shape, TenantShare
from cluster.core.slices import Holding
from cluster.core.state import Snapshot

claims = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        Claim,
        weight=st.sampled_from([0.5, 1.0, 3.0]),
        guaranteed=st.integers(0, 4),
        most=st.none() | st.integers(4, 9),
        held=st.integers(0, 9),
        waiting=st.integers(0, 30),
    ),
)


@given(st.integers(30, 60), claims)
def test_nobody_gets_more_than_it_wants_and_nothing_wanted_stays_over(capacity: int, asked: dict[str, Claim]) -> None:
    shares = fair_shares(capacity, asked)
    assert all(shares[name] <= claim.wanted + 1e-6 for name, claim in asked.items())
    assert all(shares[name] >= min(claim.guaranteed, claim.wanted) - 1e-6 for name, claim in asked.items())
    assert sum(shares.values()) == pytest.approx(min(capacity, sum(claim.wanted for claim in asked.values())))
    hungry = [name for name, claim in asked.items() if shares[name] < claim.wanted - 1e-6]
    extra = {
        name: (shares[name] - min(asked[name].guaranteed, asked[name].wanted)) / asked[name].weight for name in asked
    }
    assert all(extra[one] >= extra[other] - 1e-6 for one in hungry for other in asked), "by weight"


def test_claims_are_what_is_held_and_waited_for() -> None:
    job = Job("j", "acme", Shape(2, 1.0), 0.0)
    parked = Holding(job, 1, Placement({"n": (0, 1)}), 0.0, parked=True)
    holding = Holding(Job("k", "bolt", Shape(1, 1.0), 0.0), 1, Placement({"n": (0,)}), 0.0)
    snapshot = Snapshot(
        waiting=(Job("l", "acme", Shape(3, 1.0), 0.0),),
        held={parked.key: parked, holding.key: holding},
        tenants={"bolt": TenantShare("bolt", 2.0, 1, 4)},
    )
    assert claims_of(snapshot, also="idle") == {
        "acme": Claim(waiting=5, jobs=2),
        "bolt": Claim(2.0, 1, 4, held=1),
        "idle": Claim(),
    }
