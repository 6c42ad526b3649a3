"""Seconds an optimizer step: floating-point work over what the device really reaches, as a range."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.model_shape import ModelShape

CPU_CORE_FLOPS = 60e9
"""fp32 FLOP/s that one core reached training SmolLM2-135M (4 × 64 tokens, AVX2: 2.15 s a step)."""
CPU_EMULATION = 8.0
"""Half precision on a CPU that lacks it: between 4 (one product) and 18 times (a QLoRA step) slower than fp32."""
GPU_UTILIZATION = 0.35
"""Share of the data sheet's FLOP/s that fine-tuning reaches; published runs lie between 0.2 and 0.55."""
NF4_SLOWDOWN = 1.3
"""Weights are dequantised in each forward and backward pass (QLoRA runs against LoRA: 1.2 to 1.5)."""
INT8_SLOWDOWN = 2.0
"""LLM.int8()'s decomposition of outliers."""
OFFLOAD_SLOWDOWN = 1.5
EAGER_SLOWDOWN = 1.15
ZERO3_SLOWDOWN = 1.25
SPREAD = 2.0
"""The range is the expected time divided and multiplied by this: nothing was measured on the device yet."""


@dataclass(frozen=True, slots=True)
class Range:
    """A quantity that is known only so far."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Range:
        """Scaled."""
        return Range(self.low * factor, self.expected * factor, self.high * factor)


def step_flops(config: TrialConfig, shape: ModelShape) -> float:
    """FLOPs of one optimizer step over all workers.

    2 a weight and token forward and 2 for the gradient of the activations; frozen weights get none of their own
    (2 more where all are trained). Checkpointing repeats the forward pass. Attention adds 4·s·q a token and layer
    forward, twice that backward (Kaplan et al. 2020, arXiv:2001.08361, table 1).
    """
    tokens = config.global_batch_size * config.sequence_length
    idle = shape.expert_parameters * (1 - shape.experts_per_token / shape.experts) if shape.experts else 0.0
    active = shape.linear_parameters - idle
    weights = active + shape.vocabulary * shape.hidden
    passes = 6.0 if config.trains_all_weights else 4.0
    if config.gradient_checkpointing:
        passes += 2.0
    scores = 4.0 * config.sequence_length * shape.heads * shape.head_dim * shape.layers
    return tokens * (passes * weights + passes / 2 * scores)


def step_seconds(config: TrialConfig, shape: ModelShape, hardware: Hardware, workers: int, cpus: float) -> Range:
    """Seconds an optimizer step takes."""
    if hardware.device == "cuda":
        speed = hardware.fp32_flops if config.precision is Precision.FP32 else hardware.half_flops
        speed *= GPU_UTILIZATION
    else:
        emulated = _computes_half(config) and not hardware.has_bf16
        speed = CPU_CORE_FLOPS * max(1.0, cpus) / (CPU_EMULATION if emulated else 1.0)
    expected = step_flops(config, shape) / (speed * workers) * _slowdown(config)
    return Range(expected / SPREAD, expected, expected * SPREAD)


def _computes_half(config: TrialConfig) -> bool:
    return config.precision in (Precision.BF16, Precision.FP16) or config.precision.is_autocast


def _slowdown(config: TrialConfig) -> float:
    factor = {Precision.NF4: NF4_SLOWDOWN, Precision.INT8: INT8_SLOWDOWN}.get(config.precision, 1.0)
    factor *= OFFLOAD_SLOWDOWN if config.offload != "none" else 1.0
    factor *= EAGER_SLOWDOWN if config.attention == "eager" else 1.0
    return factor * (ZERO3_SLOWDOWN if config.zero_stage == 3 else 1.0)
