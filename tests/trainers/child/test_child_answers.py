"""What it costs to have a model answer the questions of an evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from builders_child import make_config
from builders_llama import make_tiny_llama, make_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from trainers.child.control import Control
from trainers.child.evaluate import Asked, Evaluator
from trainers.child.loss import SummedLoss
from trainers.child.world import World


class Nobody:
    def send(self, type: str, **fields: object) -> None: ...

    def receive(self) -> None: ...


def test_no_answer_takes_a_copy_of_the_head_for_each_question(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path), dtype=torch.bfloat16)
    model.requires_grad_(False)
    loaded = SimpleNamespace(model=model, tokenizer=make_tokenizer())
    config = make_config(tmp_path, tmp_path / "rows", tmp_path / "out", max_new_tokens=2)
    evaluator = Evaluator(SummedLoss(model), loaded, config, World(), Control(Nobody(), World(), 1e9))  # type: ignore[arg-type]
    asked = [Asked("", [5 + number, *range(10, 22)], "", 2) for number in range(16)]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        evaluator._answers(asked, [], 2)
    head = model.get_output_embeddings().weight.nbytes
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest < 4 * head
    assert not model.get_output_embeddings()._forward_pre_hooks, "the model is as it was"
