"""The estimator against torch itself: parameters of models on the meta device, and the tensors that autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainers.child.deepspeed_config import BUCKET as CHILD_BUCKET
from trainers.child.evaluate import MAX_BATCH
from trainers.child.head import CHUNK_LOGITS
from trainers.child.packing import PACKED_TOKENS
from trainers.run.architectures import ModelShape, read_shape
from trainers.run.footprint import ANSWERED, BUCKET, HEAD_CHUNK, PIECE_TOKENS, Training, footprint, total, trainable

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about token ids of models as small as these


def gated(kind: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 500, "head_dim": 24}
    return {"model_type": kind, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, **more}


GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 256}
BERT = {
    "model_type": "bert",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "vocab_size": 500,
}
CONFIGS = [
    gated("llama"),
    gated("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    gated("mistral"),
    gated("mistral", num_key_value_heads=1, head_dim=32),
    gated("qwen2"),
    gated("qwen2", tie_word_embeddings=True),
    gated("qwen3"),
    gated("qwen3", attention_bias=True, tie_word_embeddings=True),
    gated("gemma"),
    gated("gemma2"),
    gated("gemma3_text"),
    gated("smollm3"),
    GPT2,
    GPT2 | {"n_inner": 200},
    BERT,
]


def shape_of(config: dict[str, Any]) -> ModelShape:
    shape = read_shape(config)
    assert shape is not None
    return shape


def make(config: dict[str, Any], task: str = "causal_lm") -> Any:
    """On whatever device is the default."""
    import transformers

    made = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    if task == "sequence_classification":
        return transformers.AutoModelForSequenceClassification.from_config(made)
    if config["model_type"] == "bert":
        return transformers.AutoModel.from_config(made)
    return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_parameters_are_those_of_the_model(config: dict[str, Any]) -> None:
    import torch

    with torch.device("meta"):
        model = make(config)
        classifier = make(config, "sequence_classification")
    shape = shape_of(config)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    head = [
        weight.numel() for name, weight in classifier.named_parameters() if name.startswith(("score", "classifier"))
    ]
    counted = sum(weight.numel() for weight in classifier.parameters()) - sum(head)
    assert total(shape, Training(task="sequence_classification")) == counted


def kept_bytes(config: dict[str, Any], training: Training) -> tuple[int, int]:
    """(what autograd keeps of a forward pass up to the last hidden state but parameters, what is trained)."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = make(config).to(torch.float32 if training.precision == "fp32" else torch.bfloat16).train()
    if training.adapts:
        lora = LoraConfig(r=training.lora_r, target_modules="all-linear")
        wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model = wrapped.get_base_model()
    own = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 500, (training.micro_batch, training.seq_len))
    places: dict[str, Any] = {}
    if training.packing and config["model_type"] != "bert":
        mask = torch.zeros(1, 1, *[training.seq_len] * 2, dtype=model.dtype).masked_fill_(
            torch.ones(training.seq_len, training.seq_len).triu(1).bool(), -1e4
        )
        places = {"attention_mask": mask, "position_ids": torch.arange(training.seq_len)[None]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = getattr(model, model.base_model_prefix, model)(input_ids=ids, **places)[0]
        out = out * 1.0  # held while it is counted
    return sum(kept.values()), sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(("training_type", "precision"), [("lora", "bf16"), ("full", "bf16"), ("full", "fp32")])
@pytest.mark.parametrize("config", [CONFIGS[at] for at in (0, 6, 8, 9, 10, 12, 14)], ids=lambda one: one["model_type"])
def test_what_a_layer_keeps_is_what_autograd_keeps(config: dict[str, Any], training_type: str, precision: str) -> None:
    training = Training(
        training_type=training_type, precision=precision, seq_len=96, lora_r=4, batch_size=1, on_cpu=True, packing=True
    )
    found, trained = kept_bytes(config, training)
    parts = footprint(shape_of(config), training)
    assert parts["activations"] == pytest.approx(found, rel=0.06)
    if config["model_type"] != "bert":  # which has its pooler adapted too
        assert trainable(shape_of(config), training) == trained


def test_rows_without_packing_attend_to_fewer_keys() -> None:
    training = Training(precision="fp32", seq_len=96, micro_batch=3, packing=False, on_cpu=True, lora_r=4)
    found, _ = kept_bytes(CONFIGS[0], training)
    assert footprint(shape_of(CONFIGS[0]), training)["activations"] == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        gated("mistral", sliding_window=16),
        gated("gemma3_text", sliding_window=16, sliding_window_pattern=3),
        gated("qwen2", sliding_window=16, use_sliding_window=False),
    ],
    ids=lambda one: one["model_type"],
)
def test_beyond_its_window_each_layer_keeps_a_mask(config: dict[str, Any], precision: str) -> None:
    training = Training(precision=precision, seq_len=480, batch_size=1, on_cpu=True, lora_r=4, packing=False)
    found, _ = kept_bytes(config, training)
    packing = replace(training, packing=config["model_type"] != "qwen2")  # the others cannot
    assert footprint(shape_of(config), packing)["activations"] == pytest.approx(found, rel=0.06)


def test_the_constants_are_those_of_the_child() -> None:
    ours, theirs = (PIECE_TOKENS, HEAD_CHUNK, BUCKET, ANSWERED), (PACKED_TOKENS, CHUNK_LOGITS, CHILD_BUCKET, MAX_BATCH)
    assert ours == theirs


def test_checkpointing_offload_and_four_bits_need_less() -> None:
    shape = shape_of(gated("llama", num_hidden_layers=24))
    plain = Training(training_type="full", packing=False)
    all_of = sum(footprint(shape, plain).values())
    assert (
        footprint(shape, replace(plain, checkpointing=True))["activations"] * 8 < footprint(shape, plain)["activations"]
    )
    host = footprint(shape, replace(plain, offload="optimizer", slots=2))
    assert host["optimizer"] == 0 and host["weights"] > 0
    assert footprint(shape, replace(plain, offload="parameters", zero_stage=3, slots=2))["weights"] == 0
    quarter = footprint(shape, Training(training_type="qlora"))["weights"]
    linear = 24 * sum(one.inputs * one.outputs for one in shape.linears)
    whole = footprint(shape, Training())["weights"]
    assert whole - quarter == pytest.approx(linear * (2 - 0.5 - 1 / 64), rel=1e-6)
    assert sum(footprint(shape, Training()).values()) < all_of


def test_dpo_computes_both_answers_at_once() -> None:
    shape, training = shape_of(CONFIGS[0]), Training(seq_len=200, batch_size=1)
    one, two = footprint(shape, training), footprint(shape, replace(training, method="dpo"))
    assert two["activations"] > 1.9 * one["activations"]


def test_answering_questions_may_need_more_than_training() -> None:
    shape, training = shape_of(gated("llama", num_key_value_heads=4)), Training(seq_len=512, packing=False)
    plain, answering = footprint(shape, training), footprint(shape, replace(training, validation_len=512))
    assert sum(answering.values()) > sum(plain.values())
    longer = footprint(shape, replace(training, validation_len=1024))
    assert longer["activations"] == 2 * answering["activations"]
    assert answering["activations"] == 16 * 512 * 3 * 2 * 96 * 2, "rows, tokens, layers, keys and values"
    classes = replace(training, task="sequence_classification", validation_len=512)
    assert footprint(shape, classes)["activations"] < answering["activations"]


def test_freed_memory_that_stays_is_counted_without_a_limit() -> None:
    training = Training(on_cpu=True)
    assert "allocator" not in footprint(shape_of(CONFIGS[0]), training)
    assert footprint(shape_of(CONFIGS[0]), replace(training, bounded=False))["allocator"] > 0
