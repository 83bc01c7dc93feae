"""What a job needs of the cluster and whether there is such a thing: kinds, memory, number of slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.db.models import Node
from app.schemas.finetune import ResourceConfig
from cluster.core.job import Shape
from cluster.core.kinds import CPU, matches, resolve_kind
from cluster.errors import InvalidRequest, ResourceError, Unavailable
from trainers.run.memory import Ask, Estimate, Offer, Training, choose_shape


@dataclass(frozen=True)
class ModelFacts:
    """The base model's config.json, and its parameters as counted when it was registered."""

    config: Mapping[str, Any]
    parameters: int | None


@dataclass(frozen=True)
class Choice:
    shape: Shape
    estimate: Estimate
    warnings: tuple[str, ...] = ()


def choose(
    asked: ResourceConfig, nodes: Sequence[Node], model: ModelFacts, training: Training, fallback: bool
) -> Choice:
    """`fallback`: a kind that is not here gives way to what is. Raises `ResourceError`, `InvalidRequest`, `Unavailable`."""
    _refuse_elsewhere(asked)
    kinds = kinds_of(asked.gpu_type)
    if not nodes:
        raise Unavailable(
            "no node has joined the cluster yet, so nothing can be placed",
            code="no_nodes",
            hint="Try again in a few seconds; `heliostat nodes` shows what is there.",
        )
    offers, warnings = _offers(kinds, nodes, fallback)
    way = _on(offers, training)
    shape, estimate = choose_shape(
        model.config, way, Ask(kinds, asked.mem_limit_gb, asked.num_gpus), offers, model.parameters
    )
    return Choice(shape, estimate, warnings)


def kinds_of(gpu_type: str | list[str] | None) -> tuple[str, ...]:
    """Canonical names, in the order of preference. Raises `InvalidRequest` (`unknown_gpu_type`)."""
    if gpu_type is None:
        return ()
    names = [gpu_type] if isinstance(gpu_type, str) else gpu_type
    return tuple(dict.fromkeys(resolve_kind(name) for name in names))


def _offers(kinds: tuple[str, ...], nodes: Sequence[Node], fallback: bool) -> tuple[list[Offer], tuple[str, ...]]:
    if not kinds:
        accelerators = [node for node in nodes if node.kind != CPU]
        return _of(accelerators or nodes), ()
    found = _of([node for asked in kinds for node in nodes if matches(asked, node.kind)])
    if found:
        return found, ()
    there = ", ".join(sorted({node.kind for node in nodes}))
    if fallback:
        return _of(nodes), (f"{' or '.join(kinds)} is not here: the job runs on {there} (gpu_type_fallback is any)",)
    raise ResourceError(
        f"no node here offers {' or '.join(kinds)}",
        code="gpu_type_unavailable",
        param="resource_config.gpu_type",
        hint=f"There is: {there}. Name one of these, or leave gpu_type out to take any.",
    )


def _of(nodes: Sequence[Node]) -> list[Offer]:
    """Kinds in the order in which they come; of each what its best node has."""
    by_kind: dict[str, list[Node]] = {}
    for node in nodes:
        by_kind.setdefault(node.kind, []).append(node)
    return [
        Offer(kind, max(node.memory_gb for node in alike), max(node.slots for node in alike))
        for kind, alike in by_kind.items()
    ]


def _on(offers: Sequence[Offer], training: Training) -> Training:
    on_cpu = all(offer.kind == CPU for offer in offers)
    return Training(**{**training.__dict__, "on_cpu": on_cpu})


def _refuse_elsewhere(asked: ResourceConfig) -> None:
    """What asks for machines that this version cannot bring."""
    if (asked.num_nodes or 1) > 1:
        raise ResourceError(
            f"a job runs on one node, {asked.num_nodes} were asked for",
            code="unsupported_num_nodes",
            param="resource_config.num_nodes",
            hint="Leave num_nodes out and use num_gpus.",
        )
    if asked.market == "spot":
        raise ResourceError(
            "there is no spot capacity here",
            code="market_unavailable",
            param="resource_config.market",
            hint="Use market any or on_demand.",
        )
    if asked.region is not None:
        raise InvalidRequest(
            f"region {asked.region!r} is not here: this cluster has no regions",
            code="region_unavailable",
            param="resource_config.region",
            hint="Leave region out.",
        )
