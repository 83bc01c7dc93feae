"""Shapes in a job's row: read as they were written, also those of before there were alternatives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.db.shapes import settled, shapes_from_json, shapes_to_json
from cluster.core.job import Shape

SHAPES = st.builds(
    Shape,
    slots=st.integers(1, 64),
    memory_gb=st.floats(0, 1000),
    kinds=st.lists(st.sampled_from(["cpu", "A100-80GB", "T4"]), unique=True).map(tuple),
    nodes=st.integers(1, 8),
    park_gb=st.floats(0, 1000),
)


@given(st.lists(SHAPES, min_size=1, max_size=4))
def test_what_was_written_is_read(shapes: list[Shape]) -> None:
    kept = shapes_to_json(shapes)
    assert shapes_from_json(kept) == tuple(shapes)
    assert kept["slots"] == shapes[0].slots, "the first stays where older readers look"


def test_rows_of_the_first_version_are_read() -> None:
    old = {"slots": 2, "memory_gb": 1.5, "kinds": ["cpu"], "nodes": 1}
    assert shapes_from_json(old) == (Shape(2, 1.5, ("cpu",)),)


def test_a_job_that_trains_rather_keeps_its_number_of_slots() -> None:
    kept = shapes_to_json([Shape(1, 40.0, ("A100-80GB",)), Shape(4, 12.0, ("T4", "V100")), Shape(4, 12.0, ("L4",))])
    assert settled(kept, None) == kept
    settle = {"gpu_type": "V100", "num_gpus": 4}
    assert shapes_from_json(settled(kept, settle)) == (
        Shape(4, 12.0, ("T4", "V100")),
        Shape(4, 12.0, ("L4",)),
        Shape(1, 40.0, ("A100-80GB",)),
    )
    assert settled(settled(kept, settle), settle) == settled(kept, settle)
