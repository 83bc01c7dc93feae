"""More forms of a tuned model: each is read back by the library that it is for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_llama import make_tiny_llama
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers

from app.services.hyperparams import GGUF_MODELS
from trainers.child.convert import convert
from trainers.child.failure import TrainFailure
from trainers.child.outputs.__main__ import main
from trainers.child.outputs.forms import require_forms
from trainers.child.outputs.merged import merge
from trainers.child.outputs.pretokenizer import pretokenizer_of, read_tokenizer
from trainers.child.outputs.to_gguf import ARCHITECTURES, to_gguf
from trainers.child.shards import INDEX, Shards
from trainers.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.tensor([[5, 9, 12, 40, 7, 33]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


def logits_of(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return model(IDS).logits


def make_adapter(base: Path, folder: Path, **fields: Any) -> Any:
    """An adapter whose B is not zero; the logits with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return model(IDS).logits


def make_tiny_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, **ends)).save_pretrained(
        folder
    )
    return folder


def shard(base: Path, folder: Path) -> Path:
    """The same model in three files."""
    weights = load_file(base / "model.safetensors")
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    index: dict[str, str] = {}
    for number in range(3):
        names = sorted(weights)[number::3]
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_model_answers_as_the_adapter_does(base: Path, tmp_path: Path, use_rslora: bool) -> None:
    wanted = make_adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    hashes = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert set(hashes) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.allclose(logits_of(tmp_path / "merged"), wanted, atol=1e-5)
    assert not torch.allclose(logits_of(base), wanted, atol=1e-2)


def test_merging_keeps_the_files_of_a_sharded_model(base: Path, tmp_path: Path) -> None:
    wanted = make_adapter(base, tmp_path / "adapter")
    merge(shard(base, tmp_path / "sharded"), tmp_path / "adapter", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 3
    assert torch.allclose(logits_of(tmp_path / "merged"), wanted, atol=1e-5)


def test_merging_into_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "gpt2")
    wanted = make_adapter(base, tmp_path / "adapter", fan_in_fan_out=True)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(logits_of(tmp_path / "merged"), wanted, atol=1e-5)


def test_an_adapter_that_is_more_than_lora_or_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(TrainFailure, match="use_dora"):
        merge(base, tmp_path / "dora", tmp_path / "out")
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(TrainFailure, match="no weight for"):
        merge(make_tiny_gpt2(tmp_path / "gpt2"), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 1e-5), pytest.param("bf16", 5e-2, marks=pytest.mark.integration)]
)
def test_transformers_reads_the_gguf_file(base: Path, tmp_path: Path, kind: str, tolerance: float) -> None:
    from transformers import AutoTokenizer

    to_gguf(base, tmp_path / "model.gguf", kind)
    assert torch.allclose(logits_of(tmp_path, gguf_file="model.gguf"), logits_of(base), atol=tolerance)
    text = "what is the capital of france, zürich?"
    there = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    here = AutoTokenizer.from_pretrained(base)
    assert there(text, add_special_tokens=False)["input_ids"] == here(text, add_special_tokens=False)["input_ids"]
    assert there.chat_template == here.chat_template and there.eos_token_id == here.eos_token_id


@pytest.mark.parametrize(("kind", "head_dim"), [("Qwen2", 16), ("Qwen3", 128)])
def test_qwen_models_have_their_gguf_file_too(base: Path, tmp_path: Path, kind: str, head_dim: int) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": head_dim,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, bos_token_id=0, eos_token_id=2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases begin as zeros, norms as ones
                weight.add_(torch.randn_like(weight), alpha=0.3)
    folder = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(folder)
    to_gguf(folder, tmp_path / "model.gguf", "f32")
    assert torch.allclose(logits_of(tmp_path, gguf_file="model.gguf"), logits_of(folder), atol=1e-5)
    assert set(GGUF_MODELS) == set(ARCHITECTURES), "what the service accepts is what the child writes"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scaled"),
        ({"attention_bias": True}, "biases"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "window"),
    ],
)
def test_what_gguf_cannot_say_is_refused(base: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainFailure, match=reason):
        to_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def with_tokenizer(base: Path, folder: Path, **changes: Any) -> Path:
    """The model with parts of its tokenizer.json replaced."""
    shutil.copytree(base, folder)
    described = json.loads((base / "tokenizer.json").read_text())
    described["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(described | changes))
    return folder


def pre_of(*steps: Any) -> Any:
    """As tokenizers writes it."""
    return json.loads(pre_tokenizers.Sequence(list(steps)).__getstate__())


WORDS, BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole) for whole in (True, False))
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
PRETOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"pre_tokenizer": pre_of(WORDS)}, "gpt-2"),
    ({"pre_tokenizer": pre_of(pre_tokenizers.Digits(individual_digits=True), WORDS)}, "smollm"),
    (
        {
            "pre_tokenizer": pre_of(pre_tokenizers.Split(Regex(QWEN_2), "isolated"), BYTES),
            "normalizer": {"type": "NFC"},
        },
        "qwen2",
    ),
    ({"pre_tokenizer": pre_of(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES)}, "dbrx"),
    (
        {
            "pre_tokenizer": pre_of(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES),
            "model": {"ignore_merges": True},
        },
        "llama-bpe",
    ),
]
NO_RULES: list[tuple[dict[str, Any], str]] = [
    ({"pre_tokenizer": pre_of(pre_tokenizers.ByteLevel(add_prefix_space=True))}, "byte-level"),
    ({"pre_tokenizer": pre_of(pre_tokenizers.Metaspace())}, "byte-level"),
    ({"pre_tokenizer": None}, "byte-level"),
    ({"pre_tokenizer": pre_of(pre_tokenizers.Digits(individual_digits=False), WORDS)}, "splits text"),
    ({"pre_tokenizer": pre_of(pre_tokenizers.Split(Regex("a+"), "isolated"), BYTES)}, "splits text"),
    ({"normalizer": {"type": "Lowercase"}}, "splits text"),
]


@pytest.mark.parametrize(("changes", "name"), PRETOKENIZERS, ids=lambda one: one if isinstance(one, str) else "")
def test_gguf_names_the_rule_by_which_the_tokenizer_splits(
    base: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    from gguf import GGUFReader

    to_gguf(with_tokenizer(base, tmp_path / "model", **changes), tmp_path / "model.gguf", "f32")
    assert GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre").contents() == name


@pytest.mark.parametrize("name", ["smollm", "llama-bpe"])
def test_a_model_from_a_gguf_file_splits_text_as_before(base: Path, tmp_path: Path, name: str) -> None:
    changes = next(changes for changes, known in PRETOKENIZERS if known == name)
    model = with_tokenizer(base, tmp_path / "model", **changes)
    to_gguf(model, tmp_path / "model.gguf", "f32")
    convert(str(tmp_path / "model.gguf"), tmp_path / "again")
    assert pretokenizer_of(read_tokenizer(tmp_path / "again")) == name
    there, here = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tmp_path / "again", model))
    for text in ("what is  7, or 1234567?\n\nWE'LL see", "  paris\t12"):
        assert there.encode(text, add_special_tokens=False).tokens == here.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(("changes", "reason"), NO_RULES)
def test_a_tokenizer_that_gguf_has_no_rule_for_is_refused_before_the_training(
    base: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    model = with_tokenizer(base, tmp_path / "model", **changes)
    config = TrainConfig(base_model=str(model), train_file="rows", output_dir="out", outputs=["gguf"])
    with pytest.raises(TrainFailure, match=reason) as caught:
        require_forms(config)
    assert caught.value.code == "gguf_unsupported"
    require_forms(replace(config, outputs=["merged"]))
    (model / "tokenizer.json").unlink()
    with pytest.raises(TrainFailure, match=r"no tokenizer\.json"):
        require_forms(config)


def test_shards_read_only_what_is_asked_for(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    with Shards(shard(base, tmp_path / "sharded")) as shards:
        assert sorted(shards.names) == sorted(weights) and len(shards.files) == 3
        second = list(shards.layers(1, 2))
        assert second and all(".layers.1." in name for name in second)
        name = second[0]
        assert torch.equal(shards.read(name), weights[name])
        assert shards.read(name, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TrainFailure, match="no safetensors"):
        Shards(tmp_path)


def test_an_index_that_leads_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(TrainFailure, match="outside"):
        Shards(tmp_path)


@pytest.mark.integration
def test_the_command(base: Path, tmp_path: Path) -> None:
    assert main(["gguf", str(tmp_path / "nothing"), str(tmp_path / "m.gguf"), "--type", "q8"]) == 1
    make_adapter(base, tmp_path / "adapter")
    assert main(["merged", str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert main(["gguf", str(tmp_path / "merged"), str(tmp_path / "m.gguf")]) == 0
    assert (tmp_path / "m.gguf").stat().st_size > 100_000
