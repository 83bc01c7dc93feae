"""Base models that every node shall have before a job asks for them. Like a hint: the state machine takes no notice of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from cluster.asking import Asking, Pending
from cluster.core.job import Node
from cluster.ports import Nodes, SchedulerParts, StagedModel

AT_A_TIME = 4
"""Copies of models under way, over all nodes: each keeps a thread for minutes, and they share the storage's line."""

Copy = tuple[str, str, str]


class Prestage:
    """A node that joins later gets them too."""

    def __init__(self, parts: SchedulerParts, nodes: Nodes, asking: Asking) -> None:
        self._wanted = parts.base_models
        self._nodes = nodes
        self._asking = asking
        self._models: tuple[StagedModel, ...] = ()
        self._under_way: dict[Copy, Callable[[], None]] = {}

    def tell(self, nodes: Iterable[Node]) -> None:
        """To be called now and then."""
        if self._wanted is None:
            return
        found = self._asking.ask("base models", self._wanted)
        if not isinstance(found, Pending):
            self._models = tuple(found)
        self._hear()
        for node in nodes:
            for model in self._models:
                if not node.draining and model.sha256 not in node.models:
                    self._copy(node.name, model)

    def _hear(self) -> None:
        for key, call in self._under_way.items():
            if self._asking.is_open(key):
                self._asking.ask(key, call)
        self._under_way = {key: call for key, call in self._under_way.items() if self._asking.is_open(key)}

    def _copy(self, node: str, model: StagedModel) -> None:
        key = ("model", node, model.sha256)
        if key in self._under_way or len(self._under_way) >= AT_A_TIME:
            return
        call = partial(self._nodes.stage_model, node, model.prefix, model.sha256)
        self._asking.ask(key, call)
        if self._asking.is_open(key):
            self._under_way[key] = call
