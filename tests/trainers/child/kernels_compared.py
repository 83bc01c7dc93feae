"""`python kernels_compared.py`: of a small model of each family and in both precisions, how far Liger's kernels are off torch's, and
whether torch's are back when they are taken out. Prints JSON."""

from __future__ import annotations

import json

import torch
import triton_on_cpu  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.child import kernels

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def compared(family: str, dtype: torch.dtype) -> dict[str, float | bool]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # as norms are drawn, their weights would not matter
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype)
    changes: list[kernels.Change] = []
    wanted = kernels._computed(model, model)
    kernels._put_in(model, changes)
    replaced = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    found = kernels._computed(model, model)
    kernels._put_back(changes)
    back = all(torch.equal(one, other) for one, other in zip(kernels._computed(model, model), wanted, strict=True))
    states, gradients = (kernels._off(one, other) for one, other in zip(found, wanted, strict=True))
    return {"states": states, "gradients": gradients, "back": back, "replaced": len(replaced)}


if __name__ == "__main__":
    print(json.dumps({
        f"{family} {str(dtype).removeprefix('torch.')}": compared(family, dtype)
        for family in kernels.FAMILIES
        for dtype in (torch.float32, torch.bfloat16)
    }))  # fmt: skip
