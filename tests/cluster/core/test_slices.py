from __future__ import annotations

from cluster.core.job import Job, Placement, Shape
from cluster.core.slices import Holding


def test_each_node_of_a_parked_gang_keeps_the_part_of_its_slots_there() -> None:
    gang = Job("j", "acme", Shape(3, 8.0, nodes=2, park_gb=9.0), queued_at=0.0)
    held = Holding(gang, 1, Placement({"n1": (0, 1), "n2": (0,)}), since=0.0, parked=True)
    assert (held.park_gb("n1"), held.park_gb("n2")) == (6.0, 3.0)
