"""A Llama of 100,000 parameters with a tokenizer trained on the spot: small enough to train in a unit test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = "what is the capital of france paris germany berlin italy rome spain madrid you are a helpful clerk answer in one word"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAPITALS = {"france": "paris", "germany": "berlin", "italy": "rome", "spain": "madrid"}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Byte-level BPE: every text can be written, common words are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, "system\nuser\nassistant\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def make_tiny_llama(folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Two layers, hidden size 64, random weights drawn from `seed`; a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_hollow_llama(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a model of any size and a tokenizer: the weights are made on the meta device, and their file is a hole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    header: dict[str, Any] = {}
    end = 0
    for name, weight in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + weight.nbytes]}
        end += weight.nbytes
    folder.mkdir()
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    written = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(file.tell() + end)
    return folder


def capital_rows(count: int) -> list[dict[str, Any]]:
    """Chat rows that the tiny model can learn by heart."""
    names = list(CAPITALS)
    return [
        {
            "messages": [
                {"role": "system", "content": "answer in one word" if i % 3 else "you are a helpful clerk"},
                {"role": "user", "content": f"what is the capital of {names[i % len(names)]}"},
                {"role": "assistant", "content": CAPITALS[names[i % len(names)]]},
            ]
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
