"""From a run's configuration to DeepSpeed's JSON; pure functions. Optimizer, learning rate and accumulation are ours."""

from __future__ import annotations

from typing import Any

from trainers.config import TrainConfig

BUCKET = 1 << 25
"""Gradients that travel together: DeepSpeed's own 5·10⁸ is a buffer of 2 GB in fp32, for adapters of a hundredth of that."""
PERSISTENT = 1 << 13
"""Parameters up to so many numbers are never parted by ZeRO-3: norms and biases, not worth a message each."""
DEFAULT_STAGE = 2


def zero_stage(config: TrainConfig) -> int:
    """What the ranks of this run share out; 0: each holds everything, and DeepSpeed is not needed."""
    hyper = config.hyperparams
    if hyper.offload == "parameters":
        return 3  # layer by layer from the host, for one rank too
    if config.world_size == 1:
        return 0
    return DEFAULT_STAGE if hyper.zero_stage is None else hyper.zero_stage


def deepspeed_config(config: TrainConfig, micro_batch_size: int, *, bf16: bool) -> dict[str, Any]:
    """`bf16`: what is trained is in bfloat16, adapters too; DeepSpeed keeps fp32 masters of it."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop sets the boundary itself, since the last batch may be short
        "gradient_clipping": config.hyperparams.max_grad_norm,
        "zero_optimization": {
            "stage": zero_stage(config),
            "reduce_bucket_size": BUCKET,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": config.devices != "cpu",  # gloo reduces, but does not scatter
            **_offload(config),
            **(_stage_3() if zero_stage(config) == 3 else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPUAdam needs a compiler; torch's fused AdamW does not
        "bf16": {"enabled": bf16},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _offload(config: TrainConfig) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": config.devices != "cpu"}
    match config.hyperparams.offload:
        case "optimizer":
            return {"offload_optimizer": host}
        case "parameters":
            return {"offload_optimizer": host, "offload_param": host}
    return {}


def _stage_3() -> dict[str, Any]:
    """What a layer has fetched goes when it is done, unless the next wants it: the estimate counts on that."""
    return {
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_reuse_distance": BUCKET,
    }
