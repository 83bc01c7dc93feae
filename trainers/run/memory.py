"""How much accelerator memory a training needs, and the smallest set of slots that has it. Pure: from a model's config.

Two estimates: `model` (from the architecture and the way of training; decides where the config can be read) and `rule`
(parameters × 4 bytes × 2.5; the fallback). GiB everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.job import Shape
from cluster.core.kinds import matches
from cluster.errors import ResourceError
from trainers.run.architectures import ModelShape, read_shape
from trainers.run.footprint import DEFAULT_SEQ_LEN, GIB, Training, footprint, total, trainable

__all__ = ["DEFAULT_SEQ_LEN", "GIB", "Ask", "Estimate", "Offer", "Training", "choose_shapes", "estimate"]

PROCESS_GB = 0.5
"""Of host memory, that Python and torch take in each process."""

PASS_TOKENS = 16384
CPU_PASS_TOKENS = 2048
"""Rows times tokens beyond which a larger forward pass is no faster."""

MARGIN = 1.05
"""Allocator fragmentation, buffers of collectives."""


@dataclass(frozen=True)
class Estimate:
    """Per slot. `parts` in bytes; `decided_by` is `model` or `rule`."""

    parts: dict[str, int]
    total_gb: float
    rule_gb: float
    decided_by: str
    parameters: int
    trainable_parameters: int
    slots: int
    micro_batch: int = 1
    """Rows of one forward pass; where rows are packed it is not ours to choose."""
    zero_stage: int = 2
    checkpointing: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The memory part of a job's `estimate`."""
        return {
            "memory_gb": self.total_gb,
            "rule_memory_gb": self.rule_gb,
            "decided_by": self.decided_by,
            "parts_gb": {name: round(size / GIB, 3) for name, size in self.parts.items()},
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "slots": self.slots,
            "micro_batch": self.micro_batch,
            "zero_stage": self.zero_stage if self.slots > 1 else 0,
            "gradient_checkpointing": self.checkpointing,
        }


def rule_gb(parameters: int) -> float:
    """The 2.5× rule: parameters × 4 bytes × 2.5, in GB of 10⁹ as the rule is quoted (7·10⁹ → 70)."""
    return round(parameters * 4 * 2.5 / 1e9, 2)


def estimate(config: Mapping[str, Any], training: Training, parameters: int | None = None) -> Estimate:
    """`parameters`: counted when the model was registered; needed where the architecture is not known.
    Raises `ResourceError` (`model_size_unknown`) when neither is there."""
    shape = read_shape(config)
    count = parameters or (shape.parameters if shape else None)
    if count is None:
        raise ResourceError(
            f"the memory that this model needs cannot be estimated: its architecture "
            f"({config.get('model_type', 'not named')}) is not known and its parameters were not counted",
            code="model_size_unknown",
            param="base_model",
            hint="Register the base model again, so that its parameters are counted.",
        )
    if shape is None:
        return _by_rule(count, training)
    return _by_model(replace(shape, parameters=count), training)


def _by_rule(count: int, training: Training) -> Estimate:
    whole = int(count * 4 * 2.5) // training.slots
    total = rule_gb(count) / training.slots
    made = Estimate({"rule": whole}, round(total, 2), rule_gb(count), "rule", count, count, training.slots)
    return replace(made, zero_stage=training.zero_stage, checkpointing=training.checkpointing)


def _by_model(shape: ModelShape, training: Training) -> Estimate:
    parts = footprint(shape, training)
    gb = round(sum(parts.values()) * MARGIN / GIB, 2)
    count = total(shape, training)
    return Estimate(
        parts,
        gb,
        rule_gb(count),
        "model",
        count,
        trainable(shape, training),
        training.slots,
        training.micro_batch,
        training.zero_stage,
        training.checkpointing,
    )


@dataclass(frozen=True)
class Offer:
    """Slots of one kind: GiB of each, and how many of them one gang can have at most."""

    kind: str
    memory_gb: float
    slots: int


@dataclass(frozen=True)
class Ask:
    """What the request says. `kinds` in the order of preference (empty: any); `mem_limit_gb` per slot, never a minimum;
    `slots` None: the smallest number that fits; `nodes`: the most that they may be spread over. `may_part`, `may_recompute`:
    ZeRO-3, gradient checkpointing, where the training does not fit otherwise."""

    kinds: tuple[str, ...] = ()
    mem_limit_gb: float | None = None
    slots: int | None = None
    nodes: int = 1
    may_part: bool = False
    may_recompute: bool = False


def choose_shapes(
    config: Mapping[str, Any],
    training: Training,
    ask: Ask,
    offers: Sequence[Offer],
    parameters: int | None = None,
) -> list[tuple[Shape, Estimate]]:
    """Of each kind the smallest number of slots that fits, in the fastest way that fits then, with as many rows in a pass as
    have room, and its estimate. As `ask.kinds` prefers, then the fewer slots the better; kinds that are equally good share a
    shape. `offers` are those that match `ask.kinds`.
    Raises `ResourceError`: `memory_limit_too_small`, `does_not_fit`."""
    training = replace(training, bounded=ask.mem_limit_gb is not None)
    ways = [way for slots in _counts(ask, offers) for way in _ways(replace(training, slots=slots), ask)]
    needed = [(estimate(config, way, parameters), way) for way in ways]
    within = [one for one in needed if ask.mem_limit_gb is None or one[0].total_gb <= ask.mem_limit_gb]
    if needed and not within:
        raise _limit_too_small(_least(needed), ask)
    groups: dict[tuple[int, ...], tuple[Estimate, list[str]]] = {}
    for offer in offers:
        way = next((way for one, way in within if _fits(one, offer)), None)
        if way is not None:
            one = most_rows(config, way, _room(ask, offer), parameters)
            order = (_preference(offer, ask), one.slots, one.zero_stage, one.checkpointing, -one.micro_batch)
            _, kinds = groups.setdefault(order, (one, []))
            kinds.append(offer.kind)
    if not groups:
        raise _does_not_fit(_least(needed), ask, offers)
    ranked = sorted(groups.items(), key=lambda item: item[0])
    return [(_shape(one, kinds, training, ask.nodes), one) for _, (one, kinds) in ranked]


def choose_shape(
    config: Mapping[str, Any],
    training: Training,
    ask: Ask,
    offers: Sequence[Offer],
    parameters: int | None = None,
) -> tuple[Shape, Estimate]:
    """The best of `choose_shapes`."""
    return choose_shapes(config, training, ask, offers, parameters)[0]


def most_rows(config: Mapping[str, Any], training: Training, room_gb: float, parameters: int | None = None) -> Estimate:
    """With the largest micro-batch, a power of two, that `room_gb` holds; with one row if none does."""
    best = estimate(config, replace(training, micro_batch=1), parameters)
    if training.packs:
        return best  # the child packs as many rows as a pass takes well
    tokens = CPU_PASS_TOKENS if training.on_cpu else PASS_TOKENS
    rows = 2
    while rows <= min(tokens // training.seq_len, training.share or tokens):
        more = estimate(config, replace(training, micro_batch=rows), parameters)
        if more.total_gb > room_gb:
            break
        best, rows = more, 2 * rows
    return best


def _room(ask: Ask, offer: Offer) -> float:
    return offer.memory_gb if ask.mem_limit_gb is None else min(ask.mem_limit_gb, offer.memory_gb)


def park_gb(one: Estimate, on_cpu: bool) -> float:
    """Host memory that a parked job needs, all of its nodes together, GiB: on `cpu` its processes keep all that they had, from an
    accelerator come weights, gradients and optimizer states."""
    kept = one.total_gb
    if not on_cpu and one.decided_by == "model":
        kept = sum(one.parts[name] for name in ("weights", "gradients", "optimizer")) * MARGIN / GIB
    return round((kept + PROCESS_GB) * one.slots, 2)


def _shape(one: Estimate, kinds: Sequence[str], training: Training, nodes: int) -> Shape:
    kinds = tuple(dict.fromkeys(kinds))
    return Shape(one.slots, one.total_gb, kinds, min(nodes, one.slots), park_gb(one, training.on_cpu))


def _preference(offer: Offer, ask: Ask) -> int:
    """The place in the request's list of kinds."""
    return next((place for place, kind in enumerate(ask.kinds) if matches(kind, offer.kind)), len(ask.kinds))


def _counts(ask: Ask, offers: Sequence[Offer]) -> list[int]:
    most = max((offer.slots for offer in offers), default=0)
    if ask.slots is not None:
        return [ask.slots]
    return [count for count in (1, 2, 4, 8, 16) if count <= most]


def _ways(training: Training, ask: Ask) -> list[Training]:
    """The fastest first: layers that are computed twice cost a third more time, weights that travel for each layer often more."""
    stages = [training.zero_stage, *([3] if ask.may_part and training.slots > 1 else [])]
    twice = [training.checkpointing, *([True] if ask.may_recompute else [])]
    return [
        replace(training, zero_stage=stage, checkpointing=again) for stage in dict.fromkeys(stages) for again in twice
    ]


def _least(needed: Sequence[tuple[Estimate, Training]]) -> list[Estimate]:
    """With each number of slots the way that needs least."""
    least: dict[int, Estimate] = {}
    for one, _ in needed:
        least[one.slots] = min(one, least.get(one.slots, one), key=lambda either: either.total_gb)
    return list(least.values())


def _fits(one: Estimate, offer: Offer) -> bool:
    return offer.memory_gb >= one.total_gb and offer.slots >= one.slots


def _limit_too_small(needed: Sequence[Estimate], ask: Ask) -> ResourceError:
    first, least = needed[0], min(needed, key=lambda one: one.total_gb)
    return ResourceError(
        f"mem_limit_gb {ask.mem_limit_gb:g} is below what this training needs on each of {first.slots} GPU(s): "
        f"{first.total_gb:g} GiB by the model estimate, {first.rule_gb:g} GB in all by the 2.5x rule",
        code="memory_limit_too_small",
        param="resource_config.mem_limit_gb",
        hint=f"At least {least.total_gb:g} per GPU with {least.slots} GPU(s) fits; a smaller max_seq_len, "
        "training_type lora or a smaller base model needs less.",
    )


def _does_not_fit(needed: Sequence[Estimate], ask: Ask, offers: Sequence[Offer]) -> ResourceError:
    have = ", ".join(f"{offer.slots} x {offer.kind} of {offer.memory_gb:g} GiB" for offer in offers) or "none"
    want = "; or ".join(f"{one.slots} with {one.total_gb:g} GiB each" for one in needed)
    asked, where = " or ".join(ask.kinds) or "any kind", "node" if ask.nodes == 1 else f"{ask.nodes} nodes together"
    return ResourceError(
        f"this training fits on no {where}: it needs slots of {asked}: {want or 'at least one'}; there is: {have}",
        code="does_not_fit",
        param="resource_config",
        hint="Ask for another gpu_type or more num_gpus, use training_type lora, a smaller max_seq_len or a smaller "
        "base model.",
    )
