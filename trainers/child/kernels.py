"""Liger's fused kernels (arXiv:2410.10989) in the place of torch's: norms, gated feed-forward layers and rotary embeddings of one
model, on GPUs, where `liger_kernel` is in the environment and computes the same. Its losses stay out: ours has logits only where
there is loss."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

import torch

from trainers.child.control import Control
from trainers.child.model import Loaded, begun_with
from trainers.child.parted import is_parted
from trainers.child.session import warn
from trainers.child.world import World
from trainers.config import TrainConfig

TORCH, LIGER = "torch", "liger"

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2", "gemma3_text")
"""Of those that Liger knows, the dense ones that are tried in the tests. Its kernels for mixtures of experts add up in no fixed
order, so that a run would not be repeated bit for bit."""

TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 2e-1)}
"""How far states and gradients may be off, as shares of their norms. Of SmolLM2-135M in bfloat16, gradients are 3e-2 off torch's,
and torch's are 1e-1 off those in float32."""

Change = Tuple[Dict[str, Any], str, Any]
"""In which namespace, which name, what it stood for."""

_ABSENT = object()


def fuse(loaded: Loaded, config: TrainConfig, world: World, control: Control) -> Loaded:
    """The same model with Liger's kernels in it where they can be used, and which ones it has. Decided once a run: what began with
    torch's goes on with them, and so does, with a warning, what began with Liger's where they cannot be used. Called by all
    ranks together, after `make_engine`: parted weights are put together only from then on."""
    wanted = config.hyperparams.use_liger_kernel
    if wanted is False or (config.resume_from and begun_with(config, "kernels") != LIGER):
        return loaded
    base = loaded.model.get_base_model() if hasattr(loaded.model, "peft_config") else loaded.model
    changes: List[Change] = []
    why_not = _unusable(base, world.device)
    tried = not world.sum(why_not is not None)[0]  # by all ranks or by none
    if tried:
        why_not = _try(loaded.model, base, changes)
        if not world.sum(why_not is not None)[0]:
            return replace(loaded, kernels=LIGER)
    _put_back(changes)
    if tried or wanted or config.resume_from:
        resumes = ". The run began with Liger's: its losses may differ in the last digits" if config.resume_from else ""
        warn(control, f"Torch's kernels are used: {why_not or 'another rank cannot use those of Liger'}{resumes}.")
    return loaded


def _unusable(base: Any, device: str) -> Optional[str]:
    """Why not even to try. On a processor Triton computes only in its interpreter, which is for tests."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "those of Liger need a GPU"
    missing = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the environment lacks {' and '.join(missing)}"
    if base.config.model_type not in FAMILIES:
        return f"those of Liger are not used for {base.config.model_type} models"
    return None


def _try(model: Any, base: Any, changes: List[Change]) -> Optional[str]:
    """Puts Liger's kernels in; why they are not to stay."""
    training = model.training
    model.eval()
    try:
        wanted = _computed(model, base)
        _put_in(base, changes)
        found = _computed(model, base)
    except Exception as error:  # noqa: BLE001 - whatever an import, a compiler or a driver may raise
        return f"those of Liger fail here ({type(error).__name__}: {str(error)[:300]})"
    finally:
        model.train(training)
    states, gradients = (_off(mine, torchs) for mine, torchs in zip(found, wanted, strict=True))
    most = TOLERANCE[base.dtype]
    if states <= most[0] and gradients <= most[1]:  # not so where one is no number
        return None
    return f"those of Liger compute something else here (states are off by {states:.1%}, gradients by {gradients:.1%})"


def _computed(model: Any, base: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of two short rows the logits, and the gradients of what enters the first layer and of norms that learn, in a row."""
    entered: List[torch.Tensor] = []

    def enter(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
        entered.append(states.detach().requires_grad_())
        return entered[0]

    places = torch.arange(1, 17, device=base.device).view(2, 8)
    ids = places * (base.config.vocab_size // 17)
    hook = base.get_input_embeddings().register_forward_hook(enter)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = (logits.logsumexp(-1) - logits[..., 1]).sum()
    finally:
        hook.remove()
    norms = [one for name, one in base.named_parameters() if name.endswith(".weight") and one.dim() == 1]
    weights = [one for one in norms if one.requires_grad and not is_parted(one)]
    gradients = torch.autograd.grad(loss, [*entered, *weights], materialize_grads=True)
    return logits.detach(), torch.cat([one.float().flatten() for one in gradients])


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """As a share of the norm."""
    return float((found - wanted).norm() / wanted.norm())


def _put_in(base: Any, changes: List[Change]) -> None:
    """Into this model; `changes` gets what undoes it. Liger also replaces classes in transformers' module, for models made later:
    those are put back at once. The rotary function stays: layers look it up there, and a rank has one model."""
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    shared = vars(sys.modules[type(base).__module__])
    places = [shared, *(vars(module) for module in base.modules())]
    before = [dict(place) for place in places]
    try:
        liger._apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        for place, old in zip(places, before, strict=True):
            changed = [name for name, value in place.items() if value is not old.get(name, _ABSENT)]
            changes += [(place, name, old.get(name, _ABSENT)) for name in changed]
        _put_back([one for one in changes if one[0] is shared and one[1] != "apply_rotary_pos_emb"])


def _put_back(changes: List[Change]) -> None:
    for place, name, old in changes:
        place[name] = old
        if old is _ABSENT:
            del place[name]
