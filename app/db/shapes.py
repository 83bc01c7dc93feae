"""The shapes of a job as its row keeps them: the first one flat, as it always was, others beside it under `alternatives`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.core.job import Shape


def shapes_to_json(shapes: Sequence[Shape]) -> dict[str, Any]:
    first, *others = (asdict(shape) for shape in shapes)
    return {**first, "alternatives": others} if others else first


def shapes_from_json(kept: Mapping[str, Any]) -> tuple[Shape, ...]:
    """In order of preference. Reads rows of every version: what they do not name has its default."""
    first = {name: value for name, value in kept.items() if name != "alternatives"}
    return tuple(_shape(one) for one in (first, *kept.get("alternatives", ())))


def _shape(one: Mapping[str, Any]) -> Shape:
    return Shape(**{**one, "kinds": tuple(one.get("kinds", ()))})


def settled(kept: Mapping[str, Any], granted: Mapping[str, Any] | None) -> dict[str, Any]:
    """For a job that trains now: what it was granted comes first from now on, then as many slots of another kind: with as many
    ranks it gives the same numbers to the last bit. Its checkpoints hold for any number of them."""
    shapes = shapes_from_json(kept)
    if granted is None or len(shapes) == 1:
        return dict(kept)

    def otherness(shape: Shape) -> tuple[bool, bool]:
        return shape.slots != granted["num_gpus"], bool(shape.kinds) and granted["gpu_type"] not in shape.kinds

    return shapes_to_json(sorted(shapes, key=otherness))
