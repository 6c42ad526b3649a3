"""Seconds an optimizer step, as a range.

A micro-batch takes what its slowest resource takes: floating-point work, reading the weights, or starting kernels. What
goes over a link (gradients, gathered or offloaded weights) comes on top; that some of it overlaps is within the range.
Trials that share a GPU take turns on it, one's kernels while another starts its own (NVIDIA's Multi-Process Service
documentation: without MPS the kernels of several processes are time-sliced).
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import trainable_parameters
from orchestrator.planning.model_shape import ModelShape, lora_parameters, targeted

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
EAGER_SLOWDOWN = 1.15
LAYER_STARTS_S = 1.5e-3
"""Starting the kernels of a layer with adapters, forward and backward: some 150 of them at 10 µs each. Not measured."""
HOST_LINK_BYTES_PER_S, OLD_HOST_LINK_BYTES_PER_S = 25e9, 12e9
"""PCIe 4 with 16 lanes, and PCIe 3 of GPUs before Ampere, as copies reach them: what offloaded weights go over."""
NODE_LINK_BYTES_PER_S = 12.5e9
"""100 Gb/s between two nodes, as AWS prints for g5.48xlarge (8 A10G): 50 for 4 T4, 400 for 8 A100, 3,200 for 8 H100."""
CPU_OPTIMIZER_S = {"adamw": 0.7e-9, "sgd": 0.35e-9}
"""Of a weight on one core, as we measured torch's own fused optimizers (torch 2.13, 60 million weights, AVX2): what
offloaded weights are stepped with; DeepSpeed's AdamW for CPUs takes about as long. A worker's threads are its CPUs."""
WEIGHT_BYTES = {Precision.BF16: 2.0, Precision.FP16: 2.0, Precision.INT8: 1.0, Precision.NF4: 0.52}
"""A weight of the decoder layers; 4 where it is not named."""
SPREAD = 2.0
"""The range is the expected time divided and multiplied by this, where nothing was measured on the device yet."""


@dataclass(frozen=True, slots=True)
class Range:
    """A quantity that is known only so far."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Range:
        """Scaled."""
        return Range(self.low * factor, self.expected * factor, self.high * factor)

    def plus(self, more: Range) -> Range:
        """With so much more, low where this is low."""
        return Range(self.low + more.low, self.expected + more.expected, self.high + more.high)


def certain(value: float) -> Range:
    """A quantity that is known."""
    return Range(value, value, value)


UNMEASURED = Range(1 / SPREAD, 1.0, SPREAD)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a trial's workers run."""

    workers: int
    cpus: float
    """Of each worker."""
    gpu_shared_by: int = 1
    """Trials at a time on a worker's GPU."""
    nodes: int = 1
    """That the workers lie on."""


def step_flops(config: TrialConfig, shape: ModelShape) -> float:
    """FLOPs of one optimizer step over all workers.

    2 a weight and token forward and 2 for the gradient of the activations; frozen weights get none of their own
    (2 more where all are trained, and for an adapter's). Checkpointing repeats the forward pass. Attention adds 4·s·q a
    token and layer forward, twice that backward (Kaplan et al. 2020, arXiv:2001.08361, table 1).
    """
    tokens = config.global_batch_size * config.sequence_length
    idle = shape.expert_parameters * (1 - shape.experts_per_token / shape.experts) if shape.experts else 0.0
    active = shape.linear_parameters - idle
    weights = active + shape.vocabulary * shape.hidden
    repeated = int(config.gradient_checkpointing)
    passes = (3 if config.trains_all_weights else 2) + repeated
    scores = 4.0 * config.sequence_length * shape.heads * shape.head_dim * shape.layers
    return tokens * (2 * passes * weights + (3 + repeated) * (2 * _adapter_weights(config, shape) + scores))


def _adapter_weights(config: TrialConfig, shape: ModelShape) -> float:
    """That a token passes, of all layers."""
    if config.rank == "full":
        return 0.0
    return sum(
        lora_parameters(config.rank, [matrix]) * (shape.experts_per_token / shape.experts if matrix.is_expert else 1)
        for matrix in targeted(shape, config.target_modules)
    )


def step_seconds(
    config: TrialConfig,
    shape: ModelShape,
    hardware: Hardware,
    placement: Placement,
    correction: Range = UNMEASURED,
) -> Range:
    """Seconds an optimizer step takes; `correction` is measured over predicted, as `planning.pace` knows it."""
    workers = placement.workers
    seconds = step_flops(config, shape) / (_speed(config, hardware, placement.cpus) * workers) * _slowdown(config)
    if hardware.device == "cuda":
        passes, turns = _micro_batches(config, workers) * _passes(config), placement.gpu_shared_by
        reading = passes * _weight_bytes(config, shape) / hardware.bandwidth_bytes_per_s
        starting = passes / 2 * LAYER_STARTS_S * shape.layers
        seconds = max(turns * max(seconds, reading), starting)
        seconds += turns * _link_seconds(config, shape, hardware, placement)
        if config.offload != "none":
            stepped = trainable_parameters(config, shape) / workers
            seconds += stepped * CPU_OPTIMIZER_S[config.optimizer] / max(1, int(placement.cpus))
    return correction.times(seconds)


def _speed(config: TrialConfig, hardware: Hardware, cpus: float) -> float:
    if hardware.device == "cuda":
        speed = hardware.fp32_flops if config.precision is Precision.FP32 else hardware.half_flops
        return speed * GPU_UTILIZATION
    emulated = _computes_half(config) and not hardware.has_bf16
    return CPU_CORE_FLOPS * max(1.0, cpus) / (CPU_EMULATION if emulated else 1.0)


def _micro_batches(config: TrialConfig, workers: int) -> float:
    micro = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    return max(1.0, config.global_batch_size / (micro * workers))


def _passes(config: TrialConfig) -> int:
    """Times that a micro-batch goes over the weights."""
    return 3 if config.gradient_checkpointing else 2


def _weight_bytes(config: TrialConfig, shape: ModelShape) -> float:
    """Of the decoder layers; a mixture's experts are not quantised, but as wide as the rest: see `planning.memory`."""
    width = rest = WEIGHT_BYTES.get(config.precision, 4.0)
    if config.precision.is_quantized:
        rest = 4.0 if config.engine == "ddp" else 2.0
    return shape.quantisable_parameters * width + shape.expert_parameters * rest


def _link_seconds(config: TrialConfig, shape: ModelShape, hardware: Hardware, placement: Placement) -> float:
    """A ring all-reduce sends 2 (n - 1) / n of the gradients; ZeRO-3 gathers the weights in every pass (Rajbhandari et
    al. 2020, arXiv:1910.02054, section 7); offloaded weights come from the host in every pass. A ring is as fast as
    its slowest link."""
    workers = placement.workers
    others = (workers - 1) / workers
    micro_batches = _micro_batches(config, workers)
    passed_bytes = micro_batches * _passes(config) * _weight_bytes(config, shape)
    width = 2 if config.precision in (Precision.BF16, Precision.FP16) or config.precision.is_quantized else 4
    gradient_bytes = trainable_parameters(config, shape) * width
    sent_bytes = 2 * others * gradient_bytes + (others * passed_bytes if config.zero_stage == 3 else 0.0)
    link = hardware.interconnect_bytes_per_s
    if placement.nodes > 1:
        link = min(link, NODE_LINK_BYTES_PER_S)
    seconds = sent_bytes / link if sent_bytes else 0.0
    host_link = OLD_HOST_LINK_BYTES_PER_S if hardware.is_before_ampere else HOST_LINK_BYTES_PER_S
    if config.offload != "none":
        # Gradients to the host, weights back; each worker has its share.
        seconds += 2 * gradient_bytes / workers / host_link
    if config.offload == "optimizer_and_parameters":
        seconds += passed_bytes / workers / host_link
    return seconds


def _computes_half(config: TrialConfig) -> bool:
    return config.precision in (Precision.BF16, Precision.FP16) or config.precision.is_autocast


def _slowdown(config: TrialConfig) -> float:
    factor = {Precision.NF4: NF4_SLOWDOWN, Precision.INT8: INT8_SLOWDOWN}.get(config.precision, 1.0)
    return factor * (EAGER_SLOWDOWN if config.attention == "eager" else 1.0)
