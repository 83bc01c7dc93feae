"""What a job needs of the cluster and whether there is such a thing: kinds, memory, number of slots, market, region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.db.models import Node
from app.schemas.finetune import ResourceConfig
from cluster.core.job import Shape
from cluster.core.kinds import CPU, matches, resolve_kind
from cluster.errors import ResourceError, Unavailable
from trainers.run.memory import Ask, Estimate, Offer, Training, choose_shapes


@dataclass(frozen=True)
class ModelFacts:
    """The base model's config.json, and its parameters as counted when it was registered."""

    config: Mapping[str, Any]
    parameters: int | None


@dataclass(frozen=True)
class Candidates:
    """Nodes of the kind, market and region that were asked for. `kinds`: in the order of preference; none: any."""

    kinds: tuple[str, ...]
    nodes: list[Node]
    warnings: tuple[str, ...]
    priced: bool


@dataclass(frozen=True)
class Choice:
    """Shapes that would do, the best first, each with its estimate. `priced`: whether every node that may take it has a
    price."""

    options: tuple[tuple[Shape, Estimate], ...]
    warnings: tuple[str, ...] = ()
    priced: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(shape for shape, _ in self.options)

    @property
    def estimate(self) -> Estimate:
        """Of the best one."""
        return self.options[0][1]

    @property
    def zero_stage(self) -> int:
        """That of them which needs the highest."""
        return max(estimate.zero_stage for _, estimate in self.options)

    @property
    def recomputes(self) -> bool:
        """Whether one of them fits with gradient checkpointing only."""
        return any(estimate.checkpointing for _, estimate in self.options)

    @property
    def micro_batch(self) -> int:
        """Rows in one forward pass that every one of them has room for."""
        return min(estimate.micro_batch for _, estimate in self.options)

    def only(self, fits: Callable[[Shape], bool]) -> Choice:
        """Perhaps with nothing left."""
        return replace(self, options=tuple(option for option in self.options if fits(option[0])))


@dataclass(frozen=True)
class Wanted:
    """How to train, and what of it is ours to change where it does not fit (`ask` says nothing else yet)."""

    training: Training
    ask: Ask


@dataclass(frozen=True)
class Rules:
    """The operator's. `fallback`: a kind that is not here gives way to what is. `max_nodes`: of one training."""

    fallback: bool = False
    max_nodes: int = 1


def choose(asked: ResourceConfig, nodes: Sequence[Node], model: ModelFacts, wanted: Wanted, rules: Rules) -> Choice:
    """Raises `ResourceError`, `InvalidRequest`, `Unavailable`."""
    span = _span(asked, rules)
    found = candidates(asked, nodes, rules.fallback)
    offers = _offers(found.nodes, span)
    way = _computed(wanted.training, found.nodes)
    ask = replace(wanted.ask, kinds=found.kinds, mem_limit_gb=asked.mem_limit_gb, slots=asked.num_gpus, nodes=span)
    options = choose_shapes(model.config, way, ask, offers, model.parameters)
    return Choice(tuple(options), found.warnings, found.priced)


def _computed(training: Training, nodes: Sequence[Node]) -> Training:
    """On a processor, and with the precision that the child will take there; the one that needs more where nodes differ."""
    on_cpu = all(node.kind == CPU for node in nodes)
    whole = on_cpu and training.precision == "auto" and not all(node.bf16 for node in nodes)
    return replace(training, on_cpu=on_cpu, precision="fp32" if whole else training.precision)


def candidates(asked: ResourceConfig, nodes: Sequence[Node], fallback: bool) -> Candidates:
    """Raises `ResourceError`, `InvalidRequest`, `Unavailable`."""
    kinds = kinds_of(asked.gpu_type)
    if not nodes:
        raise Unavailable(
            "no node has joined the cluster yet, so nothing can be placed",
            code="no_nodes",
            hint="Try again in a few seconds; `heliostat nodes` shows what is there.",
        )
    nodes = _in_market(asked, _in_region(asked, nodes))
    fitting, warnings = _of_kinds(kinds, nodes, fallback)
    return Candidates(kinds, fitting, warnings, all(node.price_per_hour > 0 for node in fitting))


def kinds_of(gpu_type: str | list[str] | None) -> tuple[str, ...]:
    """Canonical names, in the order of preference. Raises `InvalidRequest` (`unknown_gpu_type`)."""
    if gpu_type is None:
        return ()
    names = [gpu_type] if isinstance(gpu_type, str) else gpu_type
    return tuple(dict.fromkeys(resolve_kind(name) for name in names))


def _of_kinds(kinds: tuple[str, ...], nodes: Sequence[Node], fallback: bool) -> tuple[list[Node], tuple[str, ...]]:
    if not kinds:
        accelerators = [node for node in nodes if node.kind != CPU]
        return accelerators or list(nodes), ()
    found = [node for asked in kinds for node in nodes if matches(asked, node.kind)]
    if found:
        return found, ()
    there = ", ".join(sorted({node.kind for node in nodes}))
    if fallback:
        return list(nodes), (f"{' or '.join(kinds)} is not here: the job runs on {there} (gpu_type_fallback is any)",)
    raise ResourceError(
        f"no node here offers {' or '.join(kinds)}",
        code="gpu_type_unavailable",
        param="resource_config.gpu_type",
        hint=f"There is: {there}. Name one of these, or leave gpu_type out to take any.",
    )


def _offers(nodes: Sequence[Node], span: int) -> list[Offer]:
    """Kinds in the order in which they come; of each what its best node has, or as many like it as a gang may span."""
    by_kind: dict[str, list[Node]] = {}
    for node in nodes:
        by_kind.setdefault(node.kind, []).append(node)
    return [
        Offer(kind, max(node.memory_gb for node in alike), _most_slots(alike, span)) for kind, alike in by_kind.items()
    ]


def _most_slots(nodes: Sequence[Node], span: int) -> int:
    """The scheduler spreads a gang over nodes that are alike in all of this (`cluster.core.placement.pool_key`)."""
    pools = Counter((one.slots, one.price_per_hour, round(one.memory_gb), one.region, one.market) for one in nodes)
    return max(pool[0] * min(count, span) for pool, count in pools.items())


def _span(asked: ResourceConfig, rules: Rules) -> int:
    """The most nodes that the gang may take."""
    span = asked.num_nodes or 1
    if span > rules.max_nodes:
        raise ResourceError(
            f"a training spans at most {rules.max_nodes} node(s) here, {span} were asked for",
            code="unsupported_num_nodes",
            param="resource_config.num_nodes",
            hint="Leave num_nodes out and use num_gpus; the operator allows more nodes with the setting training.max_nodes.",
        )
    return span


def _in_region(asked: ResourceConfig, nodes: Sequence[Node]) -> list[Node]:
    if asked.region is None:
        return list(nodes)
    found = [node for node in nodes if node.region == asked.region]
    if found:
        return found
    there = ", ".join(sorted({node.region for node in nodes if node.region}))
    raise ResourceError(
        f"no node here is in the region {asked.region!r}",
        code="region_unavailable",
        param="resource_config.region",
        hint=f"There is: {there}." if there else "This cluster's nodes name no region: leave region out.",
    )


def _in_market(asked: ResourceConfig, nodes: Sequence[Node]) -> list[Node]:
    if asked.market in (None, "any"):
        return list(nodes)
    found = [node for node in nodes if node.market == asked.market]
    if found:
        return found
    raise ResourceError(
        f"there is no {asked.market} capacity here" + (f" in {asked.region}" if asked.region else ""),
        code="market_unavailable",
        param="resource_config.market",
        hint=f"Use market any or {'on_demand' if asked.market == 'spot' else 'spot'}.",
    )
