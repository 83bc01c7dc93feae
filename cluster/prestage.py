"""Base models that every node shall have before a job asks for them. Like a hint: the state machine takes no notice of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

from cluster.asking import Asking, Pending
from cluster.core.job import Node
from cluster.errors import HeliostatError
from cluster.ports import Nodes, SchedulerParts, StagedModel

log = logging.getLogger(__name__)

AT_A_TIME = 4
"""Copies of models under way, over all nodes: each keeps a thread for minutes, and they share the storage's line."""
RETRY_S = 600.0
"""After a copy that failed: a full disk, a damaged object."""


class Prestage:
    """A node that joins later gets them too."""

    def __init__(self, parts: SchedulerParts, nodes: Nodes, asking: Asking, clock: Callable[[], float]) -> None:
        self._wanted = parts.base_models
        self._nodes = nodes
        self._asking = asking
        self._clock = clock
        self._models: tuple[StagedModel, ...] = ()
        self._under_way: dict[str, Callable[[], HeliostatError | None]] = {}
        self._not_before: dict[str, float] = {}

    def tell(self, nodes: Iterable[Node]) -> None:
        """To be called now and then."""
        if self._wanted is None:
            return
        found = self._asking.ask("base models", self._wanted)
        if not isinstance(found, Pending):
            self._models = tuple(found)
        for name in list(self._under_way):
            self._hear(name)
        for node in nodes:
            for model in self._models:
                if not node.draining and model.sha256 not in node.models:
                    self._copy(node.name, model)

    def _copy(self, node: str, model: StagedModel) -> None:
        name = f"copy of model {model.sha256[:12]} on {node}"
        waits = self._clock() < self._not_before.get(name, 0.0)
        if name not in self._under_way and not waits and len(self._under_way) < AT_A_TIME:
            self._under_way[name] = partial(self._stage, node, model)
            self._hear(name)

    def _stage(self, node: str, model: StagedModel) -> HeliostatError | None:
        try:
            self._nodes.stage_ahead(node, model)
        except HeliostatError as error:
            return error
        return None

    def _hear(self, name: str) -> None:
        answer = self._asking.ask(name, self._under_way[name])
        if isinstance(answer, Pending):
            return
        del self._under_way[name]
        if answer is not None:
            log.warning("%s: %s; again in %.0f minutes", name, answer.message, RETRY_S / 60)
            self._not_before[name] = self._clock() + RETRY_S
