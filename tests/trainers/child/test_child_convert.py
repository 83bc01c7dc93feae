"""What becomes a base model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders_llama import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.child.convert import main


def convert(capsys: pytest.CaptureFixture[str], source: object, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()  # what making the source has printed
    code = main([str(source), str(out), *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, "one JSON object, and nothing else"
    return code, json.loads(lines[0])


def refused(capsys: pytest.CaptureFixture[str], source: object, out: Path, *options: str) -> str:
    code, answer = convert(capsys, source, out, *options)
    assert code == 1 and answer["error"]["message"] and answer["error"]["hint"]
    return str(answer["error"]["code"])


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_folder_is_taken_over_without_what_training_does_not_need(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = convert(capsys, tiny_llama, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert code == 0 and answer["parameters"] == model.num_parameters()
    assert answer["architecture"] == "LlamaForCausalLM" and answer["config"]["hidden_size"] == 64
    assert (answer["chat_template_source"], answer["warnings"]) == ("model", [])
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {path.name for path in tiny_llama.iterdir()}


def test_code_beside_the_weights_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_llama(tmp_path / "base")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    assert convert(capsys, base, tmp_path / "out")[0] == 0
    assert not list((tmp_path / "out").glob("*.py"))


def test_without_chat_template_chatml_is_added_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_llama(tmp_path / "base", chat_template=None)
    _, answer = convert(capsys, base, tmp_path / "out")
    assert answer["chat_template_source"] == "chatml" and "ChatML" in answer["warnings"][0]
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert AutoTokenizer.from_pretrained(base).chat_template is None


def test_a_chat_template_can_be_chosen(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    _, answer = convert(capsys, tiny_llama, tmp_path / "1", "--chat-template", str(tmp_path / "mine.jinja"))
    assert answer["chat_template_source"] == "option"
    assert AutoTokenizer.from_pretrained(tmp_path / "1").chat_template == "{{ messages[0].content }}"
    assert (
        convert(capsys, tiny_llama, tmp_path / "2", "--chat-template", "chatml")[1]["chat_template_source"] == "option"
    )
    assert refused(capsys, tiny_llama, tmp_path / "3", "--chat-template", "nowhere") == "chat_template_not_found"


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_llama(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert refused(capsys, base, tmp_path / "out") == "model_format_unsafe"


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path / "nowhere" / "deep" / "model", tmp_path / "out") == "model_not_found"
    (tmp_path / "empty").mkdir()
    assert refused(capsys, tmp_path / "empty", tmp_path / "out") == "model_not_found"


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"model_type": "bert"},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_models_that_cannot_be_trained_here_are_refused(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_llama(tmp_path / "base")
    edit(base / "config.json", **fields)
    assert refused(capsys, base, tmp_path / "out") == "model_unsupported"


def test_a_damaged_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert refused(capsys, tmp_path / "model.gguf", tmp_path / "out") == "gguf_unsupported"
