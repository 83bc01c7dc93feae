"""From a run's configuration to DeepSpeed's JSON; a pure function. Optimizer, learning rate and accumulation are ours."""

from __future__ import annotations

from typing import Any

from trainers.config import TrainConfig

BUCKET = 1 << 25
"""Gradients that travel together: DeepSpeed's own 5·10⁸ is a buffer of 2 GB in fp32, for adapters of a hundredth of that."""


def deepspeed_config(config: TrainConfig, micro_batch_size: int, *, bf16: bool) -> dict[str, Any]:
    """`bf16`: what is trained is in bfloat16, adapters too; DeepSpeed keeps fp32 masters of it."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop sets the boundary itself, since the last batch may be short
        "gradient_clipping": config.hyperparams.max_grad_norm,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": BUCKET,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": config.devices != "cpu",  # gloo reduces, but does not scatter
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
