"""Rows of preference and of classification that the tiny models can learn, and runs in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders_child import Child, Recorder
from builders_llama import CAPITALS, WORDS
from safetensors.torch import load_file

from trainers.child.rank import run_rank
from trainers.config import TrainConfig


def train(config: TrainConfig) -> Recorder:
    wire = Recorder()
    run_rank(config, 0, 1, wire)
    return wire


def checkpoint_of(wire: Recorder | Child, step: int) -> str:
    return next(str(message["path"]) for message in wire.of("checkpoint") if message["step"] == step)


def weights_of(wire: Recorder | Child) -> dict[str, torch.Tensor]:
    """What the run has trained, as its artifact holds it."""
    folder = Path(wire.of("finished")[0]["artifact"])
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).is_file()))


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], share: float = 1e-3) -> None:
    """Each tensor to a share of its norm: AdamW divides by what may be tiny."""
    assert found and found.keys() <= wanted.keys()
    for name, value in found.items():
        assert (value - wanted[name]).norm() <= share * wanted[name].norm(), name


def preference_rows(count: int) -> list[dict[str, Any]]:
    """A country's own capital against another one's."""
    names, capitals = list(CAPITALS), list(CAPITALS.values())
    return [
        {
            "prompt": [{"role": "user", "content": f"what is the capital of {names[i % 4]}"}],
            "chosen": [{"role": "assistant", "content": capitals[i % 4]}],
            "rejected": [{"role": "assistant", "content": f"a {capitals[(i + 1 + i // 4 % 3) % 4]}"}],
        }
        for i in range(count)
    ]


def label_rows(count: int) -> list[dict[str, Any]]:
    """The label is the country that the text names."""
    names = list(CAPITALS)
    ways = ("what is the capital of {}", "{} you are", "answer in one word {} the", "the {} is a clerk")
    return [{"text": ways[i // 4 % 4].format(names[i % 4]), "label": names[i % 4]} for i in range(count)]


def make_tiny_bert(folder: Path) -> Path:
    """Two layers, hidden size 64, random weights; a Hugging Face folder as of a masked language model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(set(WORDS.split()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder
