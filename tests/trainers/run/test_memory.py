"""The memory estimates against numbers worked out by hand, and what may never turn round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ResourceError
from trainers.run.architectures import read_shape
from trainers.run.memory import (
    GIB,
    PROCESS_GB,
    Ask,
    Offer,
    Training,
    choose_shape,
    choose_shapes,
    estimate,
    most_rows,
    rule_gb,
)

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
BERT = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
}
A100_40 = Offer("A100-40GB", 40.0, 8)
A100_80 = Offer("A100-80GB", 80.0, 8)
T4 = Offer("T4", 16.0, 1)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA_7B, 6_738_415_616),
        (SMOLLM2, 134_515_008),
        (GPT2, 124_439_808),
        (BERT, 109_482_240),
        (QWEN2_05B, 494_032_768),
        (GEMMA_2B, 2_506_172_416),
    ],
)
def test_parameters_are_the_published_ones(config: dict[str, Any], published: int) -> None:
    shape = read_shape(config)
    assert shape is not None
    assert shape.parameters == published


def test_lora_on_7b_by_hand() -> None:
    made = estimate(LLAMA_7B, Training(seq_len=2048))
    # rank 16 on 4 square projections and 3 of the MLP, 32 layers
    assert made.trainable_parameters == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert made.parts["weights"] == 6_738_415_616 * 2 + made.trainable_parameters * 2
    assert made.parts["optimizer"] == made.trainable_parameters * 12
    assert made.parts["context"] == int(0.8 * GIB)
    assert 20 < made.total_gb < 35
    assert made.rule_gb == pytest.approx(67.38)


def test_full_7b_by_hand_is_18_bytes_a_parameter_while_it_is_updated() -> None:
    made = estimate(LLAMA_7B, Training(training_type="full"))
    states = sum(made.parts[name] for name in ("weights", "gradients", "optimizer"))
    assert states == 6_738_415_616 * 18, "bf16 weights, fp32 gradients and masters, two moments"
    assert made.total_gb > 100


def test_the_rule_says_70_for_7_billion() -> None:
    assert rule_gb(7_000_000_000) == 70.0


def test_the_request_of_the_interface_is_accepted() -> None:
    shape, made = choose_shape(LLAMA_7B, Training(), Ask(kinds=("A100",), mem_limit_gb=48), [A100_40, A100_80])
    assert (shape.slots, shape.kinds, made.decided_by) == (1, ("A100-40GB", "A100-80GB"), "model")
    assert made.total_gb < 48 < made.rule_gb


def test_too_small_a_limit_names_both_estimates_and_what_would_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        choose_shape(LLAMA_7B, Training(), Ask(mem_limit_gb=8), [A100_80])
    assert caught.value.code == "memory_limit_too_small"
    one_gpu, most = estimate(LLAMA_7B, Training()), estimate(LLAMA_7B, Training(slots=8))
    assert f"{one_gpu.total_gb:g} GiB" in caught.value.message
    assert "67.38" in caught.value.message
    assert f"{most.total_gb:g}" in str(caught.value.hint)


def test_what_fits_nowhere_says_what_there_is() -> None:
    with pytest.raises(ResourceError) as caught:
        choose_shape(LLAMA_7B, Training(training_type="full"), Ask(), [T4])
    assert caught.value.code == "does_not_fit"
    assert "1 x T4 of 16 GiB" in caught.value.message


def test_a_model_too_large_for_one_slot_is_sharded() -> None:
    training = Training(training_type="full", zero_stage=3)
    shape, made = choose_shape(LLAMA_7B, training, Ask(), [A100_80])
    assert shape.slots == 2
    assert made.total_gb <= 80


def test_what_does_not_fit_is_recomputed_then_parted() -> None:
    """7B in full on slots of 62 GiB: two do not hold their halves of the states beside all weights, but beside half of them."""
    training, free = Training(training_type="full"), Ask(may_part=True, may_recompute=True)
    offer = Offer("A100-80GB", 62.0, 8)
    assert choose_shape(LLAMA_7B, training, Ask(), [offer])[1].slots == 4, "as it is asked for"
    _, made = choose_shape(LLAMA_7B, training, free, [offer])
    assert (made.slots, made.zero_stage) == (2, 3) and made.total_gb <= 62


def test_a_long_row_is_recomputed_before_it_takes_more_slots() -> None:
    training, free = Training(seq_len=4096), Ask(may_recompute=True)
    plain = estimate(LLAMA_7B, training)
    offer = Offer("A10G", round(plain.total_gb - 1), 8)
    _, made = choose_shape(LLAMA_7B, training, free, [offer])
    assert (made.slots, made.checkpointing) == (1, True) and made.parts["activations"] < plain.parts["activations"] / 4
    assert not choose_shape(LLAMA_7B, training, free, [A100_80])[1].checkpointing


def test_kinds_that_need_different_ways_are_different_shapes() -> None:
    training, free = Training(seq_len=4096), Ask(may_recompute=True)
    tight = Offer("A10G", round(estimate(LLAMA_7B, training).total_gb - 1), 8)
    options = choose_shapes(LLAMA_7B, training, free, [tight, A100_80])
    assert [(shape.kinds, made.slots, made.checkpointing) for shape, made in options] == [
        (("A100-80GB",), 1, False),
        (("A10G",), 1, True),
    ]
    assert options[1][0].memory_gb <= tight.memory_gb


def test_by_the_rule_a_training_keeps_what_was_asked_for() -> None:
    made = estimate({"model_type": "new"}, Training(zero_stage=1, checkpointing=True, slots=2), parameters=10**9)
    assert (made.decided_by, made.zero_stage, made.checkpointing) == ("rule", 1, True)


def test_adapters_are_not_parted() -> None:
    with pytest.raises(ResourceError) as caught:
        choose_shape(LLAMA_7B, Training(), Ask(may_recompute=True), [Offer("T4", 8.0, 8)])
    assert caught.value.code == "does_not_fit"


def test_what_is_offloaded_does_not_count_on_the_gpu() -> None:
    full = Training(training_type="full", zero_stage=3)
    kept, optimizer, all_of_it = (
        estimate(LLAMA_7B, replace(full, offload=what)) for what in ("none", "optimizer", "parameters")
    )
    assert (optimizer.parts["optimizer"], all_of_it.parts["weights"]) == (0, 0)
    assert all_of_it.parts["buffers"] > 0, "layers come from the host one by one"
    assert kept.total_gb > optimizer.total_gb > all_of_it.total_gb


def test_asked_slots_are_not_changed() -> None:
    shape, _ = choose_shape(LLAMA_7B, Training(), Ask(slots=4), [A100_80])
    assert shape.slots == 4


def test_other_kinds_are_alternatives_with_as_many_slots_as_they_need() -> None:
    training = Training(training_type="full", zero_stage=3, seq_len=256)
    small = Offer("A10G", 24.0, 8)
    options = choose_shapes(LLAMA_7B, training, Ask(), [small, A100_40, A100_80])
    assert [(shape.slots, shape.kinds) for shape, _ in options] == [
        (2, ("A100-80GB",)),
        (4, ("A100-40GB",)),
        (8, ("A10G",)),
    ]
    for shape, made in options:
        assert (shape.slots, shape.memory_gb) == (made.slots, made.total_gb)
        assert shape.memory_gb < shape.park_gb < 130, (
            "weights, gradients, optimizer of all its ranks: 16 bytes a parameter"
        )


def test_a_list_of_kinds_is_tried_in_its_order() -> None:
    small = Offer("A10G", 24.0, 8)
    training = Training(training_type="full", zero_stage=3, seq_len=256)
    options = choose_shapes(LLAMA_7B, training, Ask(kinds=("A10G", "A100")), [small, A100_80, A100_40])
    assert [(shape.slots, shape.kinds) for shape, _ in options] == [
        (8, ("A10G",)),
        (2, ("A100-80GB",)),
        (4, ("A100-40GB",)),
    ]


def test_on_cpu_a_parked_job_keeps_all_of_its_memory() -> None:
    shape, made = choose_shape(SMOLLM2, Training(on_cpu=True), Ask(slots=2), [Offer("cpu", 8.0, 4)])
    assert shape.park_gb == pytest.approx(2 * (made.total_gb + PROCESS_GB), abs=0.01)


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    training = Training(task="sequence_classification", seq_len=256, batch_size=32)
    made = most_rows(LLAMA_7B, training, room_gb=40)
    assert made.micro_batch > 1 and made.total_gb <= 40
    assert estimate(LLAMA_7B, replace(training, micro_batch=2 * made.micro_batch)).total_gb > 40
    assert most_rows(LLAMA_7B, training, room_gb=1).micro_batch == 1
    assert most_rows(LLAMA_7B, training, room_gb=10_000).micro_batch == 32, "the rows of a step"
    shape, wide = choose_shape(LLAMA_7B, training, Ask(mem_limit_gb=40), [A100_80])
    assert (shape.memory_gb, wide) == (made.total_gb, made)


def test_packed_rows_have_no_micro_batch_to_choose() -> None:
    assert most_rows(LLAMA_7B, Training(seq_len=64, batch_size=32), room_gb=80).micro_batch == 1


def test_an_unknown_architecture_goes_by_the_rule() -> None:
    made = estimate({"model_type": "new"}, Training(), parameters=1_000_000_000)
    assert (made.decided_by, made.total_gb) == ("rule", 10.0)


def test_an_unknown_architecture_without_a_count_is_refused() -> None:
    with pytest.raises(ResourceError) as caught:
        estimate({"model_type": "new"}, Training())
    assert caught.value.code == "model_size_unknown"


def test_a_config_that_lacks_its_sizes_is_unknown() -> None:
    assert read_shape({"model_type": "llama"}) is None


trainings = st.builds(
    Training,
    training_type=st.sampled_from(["lora", "full"]),
    precision=st.sampled_from(["auto", "bf16", "fp32"]),
    seq_len=st.integers(1, 8192),
    micro_batch=st.integers(1, 64),
    lora_r=st.integers(1, 256),
    zero_stage=st.integers(0, 3),
    slots=st.integers(1, 16),
    on_cpu=st.booleans(),
)


@given(trainings)
def test_more_of_anything_never_needs_less(training: Training) -> None:
    least = estimate(LLAMA_7B, training).total_gb
    for more in (
        replace(training, seq_len=training.seq_len + 1),
        replace(training, micro_batch=training.micro_batch + 1),
        replace(training, lora_r=training.lora_r + 1),
        replace(training, training_type="full"),
        replace(training, precision="fp32") if training.training_type == "lora" else training,
        replace(training, on_cpu=False),
    ):
        assert estimate(LLAMA_7B, more).total_gb >= least


@given(trainings)
def test_more_slots_and_higher_stages_never_need_more_each(training: Training) -> None:
    """Of two slots at least: one alone has no buffers. ZeRO-3 holds less, but its head's logits exist whole."""
    shared = replace(training, slots=training.slots + 1)
    least = estimate(LLAMA_7B, shared)
    assert estimate(LLAMA_7B, replace(shared, slots=shared.slots + 1)).total_gb <= least.total_gb
    assert estimate(LLAMA_7B, replace(shared, zero_stage=max(shared.zero_stage, 2))).total_gb <= least.total_gb
    parted = estimate(LLAMA_7B, replace(shared, zero_stage=3))
    assert all(parted.parts[name] <= least.parts[name] for name in ("weights", "optimizer"))
