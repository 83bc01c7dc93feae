from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainers.child.lora import scale_early

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _with_adapter(folder: Path, **lora: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    made: torch.nn.Module = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
    return made


def _pass(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.tensor([[1, 5, 9, 7, 3]])
    torch.manual_seed(1)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_the_same_function_as_pefts(tiny_llama: Path, lora: dict[str, object]) -> None:
    theirs = _with_adapter(tiny_llama, **lora)
    ours = scale_early(copy.deepcopy(theirs))

    (wanted, wanted_grads), (found, found_grads) = _pass(theirs), _pass(ours)

    torch.testing.assert_close(found, wanted)
    assert found_grads.keys() == wanted_grads.keys() and found_grads
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(found_grads[name], grad, msg=name)


def test_an_adapter_that_is_off_changes_nothing(tiny_llama: Path) -> None:
    model = scale_early(_with_adapter(tiny_llama))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])

    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
