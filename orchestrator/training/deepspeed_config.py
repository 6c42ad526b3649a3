"""TrialConfig → the dict that DeepSpeed gets, and the dtype that a trial computes in (pure)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config.trial_config import Precision, TrialConfig, micro_batches_per_step
from orchestrator.planning.memory import ZERO_BUCKET_WEIGHTS

ComputeDtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class HalfPrecision:
    """What the worker's device computes in hardware."""

    bf16: bool
    fp16: bool


def compute_dtype(precision: Precision, device: HalfPrecision) -> ComputeDtype:
    """The dtype of matrix products and of what is not quantised; fp32 where autocast chooses by operation."""
    if precision is Precision.BF16:
        return "bf16"
    if precision is Precision.FP16:
        return "fp16"
    if precision.is_quantized:
        # Emulated half precision is up to 18 times slower than fp32 (135M model, NF4, AVX2).
        return "bf16" if device.bf16 else "fp16" if device.fp16 else "fp32"
    return "fp32"


def scales_loss(precision: Precision, dtype: ComputeDtype) -> bool:
    """Whether the loss is scaled for its gradients to be fp16: where they overflow, the scale may only be too high."""
    return dtype == "fp16" or precision is Precision.AMP_FP16


def deepspeed_config(
    config: TrialConfig, workers: int, dtype: ComputeDtype, on_gpu: bool, has_cpu_adam: bool = False
) -> dict[str, Any]:
    """The exact configuration for `deepspeed.initialize`.

    has_cpu_adam: DeepSpeed's AdamW for CPUs was built ahead, see `cpu_adam`.

    Raises:
        ValueError: the global batch does not divide, see `micro_batches_per_step`.
    """
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_step(config, workers),
        # max_grad_norm among the optimizer's parameters would be refused (deepspeed 0.19.8, engine.py).
        "gradient_clipping": config.max_grad_norm,
        **_optimizer(config, has_cpu_adam),
        **_precision(config, dtype),
        "zero_optimization": _zero(config, on_gpu),
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        # It would wait for the device at every micro-batch (deepspeed 0.19.8, utils/timer.py), as DDP does not.
        "timers": {"throughput": {"enabled": False}},
    }


def _optimizer(config: TrialConfig, has_cpu_adam: bool) -> dict[str, Any]:
    # DeepSpeed's own kernels for GPUs are compiled on first use, which needs nvcc; an adapter is too small to profit.
    torch_only: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False}
    if config.optimizer == "adamw_8bit":
        # bitsandbytes' optimizer is made by us and handed over.
        return {"zero_allow_untested_optimizer": True, **torch_only}
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.offload != "none":
        # The CPUs step: torch's fused AdamW takes a ninth of the time there (measured on one core, torch 2.13).
        shared["fused"] = True
    if config.optimizer == "sgd":
        return {"optimizer": {"type": "SGD", "params": shared}, "zero_allow_untested_optimizer": True, **torch_only}
    adamw = {**shared, "betas": [0.9, 0.999], "eps": 1e-8}
    if config.offload != "none" and has_cpu_adam:
        # DeepSpeed takes its own for what is offloaded, with fp32 states, and knows no `fused`.
        del adamw["fused"]
    else:
        adamw["torch_adam"] = True
    return {"optimizer": {"type": "AdamW", "params": adamw}, **torch_only}


def _precision(config: TrialConfig, dtype: ComputeDtype) -> dict[str, Any]:
    # data_types.grad_accum_dtype is left alone: one unlike the model's is refused without ZeRO. So half-precision
    # gradients are summed in half precision (deepspeed 0.19.8, engine.py, get_data_types), where DDP's adapter is fp32.
    if config.precision.is_autocast:
        autocast = "bfloat16" if config.precision is Precision.AMP_BF16 else "float16"
        return {"torch_autocast": {"enabled": True, "dtype": autocast}}
    if dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if dtype == "fp16":
        return {"fp16": {"enabled": True, "loss_scale": 0}}
    return {}


def _zero(config: TrialConfig, on_gpu: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 0:
        return zero
    host = {"device": "cpu", "pin_memory": on_gpu}
    zero |= {
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": ZERO_BUCKET_WEIGHTS,
    }
    if config.zero_stage < 3:
        zero["allgather_bucket_size"] = ZERO_BUCKET_WEIGHTS
    else:
        zero |= {
            "stage3_prefetch_bucket_size": ZERO_BUCKET_WEIGHTS,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.offload != "none":
        zero["offload_optimizer"] = dict(host)
    if config.offload == "optimizer_and_parameters":
        zero["offload_param"] = dict(host)
    return zero


def to_json(settings: dict[str, Any]) -> str:
    """As deepspeed.json holds it."""
    return json.dumps(settings, indent=1) + "\n"
