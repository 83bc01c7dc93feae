"""Which slots a request may have, where its gang may span nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.db.models import Node
from app.schemas.finetune import ResourceConfig
from app.services.resources import Choice, ModelFacts, Rules, Wanted, choose
from cluster.errors import HeliostatError
from trainers.run.memory import Ask, Training

WANTED = Wanted(Training(), Ask())
MODEL = ModelFacts({}, 10_000_000)


def node(name: str, slots: int) -> Node:
    return Node(name=name, kind="cpu", slots=slots, memory_gb=8.0, price_per_hour=0.0, market="on_demand", region="")


def chosen(nodes: list[Node], max_nodes: int, **asked: int) -> Choice:
    return choose(ResourceConfig(**asked), nodes, MODEL, WANTED, Rules(max_nodes=max_nodes))


def test_a_gang_may_take_the_slots_of_as_many_like_nodes_as_it_may_span() -> None:
    nodes = [node("a", 2), node("b", 2), node("c", 2), node("d", 3)]
    shape = chosen(nodes, 8, num_gpus=6, num_nodes=3).shapes[0]
    assert (shape.slots, shape.nodes) == (6, 3)
    assert chosen(nodes, 8, num_gpus=1, num_nodes=3).shapes[0].nodes == 1


@pytest.mark.parametrize(
    ("asked", "code"), [({"num_gpus": 6, "num_nodes": 2}, "does_not_fit"), ({"num_gpus": 4}, "does_not_fit")]
)
def test_nodes_that_are_not_alike_are_no_gang(asked: dict[str, int], code: str) -> None:
    with pytest.raises(HeliostatError) as caught:
        chosen([node("a", 2), node("b", 2), node("d", 3)], 8, **asked)
    assert caught.value.code == code


def test_the_operator_says_how_many_nodes_a_training_may_span() -> None:
    with pytest.raises(HeliostatError) as caught:
        chosen([node("a", 2), node("b", 2)], 1, num_gpus=4, num_nodes=2)
    assert (caught.value.code, caught.value.param) == ("unsupported_num_nodes", "resource_config.num_nodes")
    assert "training.max_nodes" in (caught.value.hint or "")


def test_a_cpu_that_does_not_compute_in_bf16_needs_the_memory_of_fp32() -> None:
    """As the child resolves `auto`. One such node is enough: nobody knows yet where the job will run."""
    able, unable = node("a", 1), node("b", 1)
    able.bf16, unable.bf16 = True, False
    config = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
              "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
    model, auto = ModelFacts(config, None), Training(precision="auto", seq_len=512)

    def needs(nodes: list[Node], training: Training) -> float:
        return choose(ResourceConfig(), nodes, model, Wanted(training, Ask()), Rules()).estimate.total_gb

    half, whole = (needs([able], replace(auto, precision=precision)) for precision in ("bf16", "fp32"))
    assert whole > 1.3 * half
    assert needs([able], auto) == half and needs([unable], auto) == needs([able, unable], auto) == whole
    assert needs([unable], replace(auto, precision="bf16")) == half


@pytest.mark.parametrize(
    "other", [{"region": "north"}, {"market": "spot"}, {"price_per_hour": 1.0}, {"memory_gb": 16.0}]
)
def test_slots_of_nodes_that_the_scheduler_holds_apart_are_not_added_up(other: dict[str, object]) -> None:
    apart = node("b", 2)
    for name, value in other.items():
        setattr(apart, name, value)
    with pytest.raises(HeliostatError) as caught:
        chosen([node("a", 2), apart], 8, num_gpus=4, num_nodes=2)
    assert caught.value.code == "does_not_fit"
