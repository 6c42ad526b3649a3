"""One worker's peak memory, by part, counted from the model's shape and a trial's settings.

Every term is a tensor that exists; few constants are fitted, each a physical quantity with its name.
The activations are those that autograd keeps for a decoder layer of transformers 5.23 (`modeling_llama.py`): what a
frozen linear layer was given is not kept, unless an adapter hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.model_shape import ModelShape, lora_parameters, targeted

# Bytes of a 4-bit weight: half a byte, an 8-bit constant for 64 weights and an fp32 one for 256 of those (QLoRA,
# Dettmers et al. 2023, section 3: 0.127 bits).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8_BYTES = 1.0
"""bitsandbytes' LLM.int8(): one byte, and an fp32 constant a row, which is below a thousandth."""
CONTEXT_BYTES = 450 * 2**20
"""CUDA context and libraries, as the driver reports them over torch's own figure (cuBLAS and cuDNN loaded)."""
WORKSPACE_BYTES = 64 * 2**20
"""cuBLAS workspaces and what else is allocated once."""
FRAGMENTATION = 1.08
"""What torch's caching allocator reserves over the bytes that it gave out at its peak."""
CPU_IMPORTS_BYTES = 480 * 2**20
"""A trial's process on a CPU before its model: torch, transformers, peft and deepspeed, measured resident."""
UNCERTAINTY = 0.12
"""Half the width of the 90 % interval around `allocated_bytes`."""
ZERO3_LIVE_LAYERS = 2
"""Layers whose weights ZeRO-3 holds gathered: the one at work and the one fetched ahead."""


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes of one GPU at its peak."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    communication: int
    framework: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, name) for name in self.__slots__)

    @property
    def biggest(self) -> str:
        """The name of the largest part."""
        return max(self.__slots__, key=lambda name: int(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """All figures are one worker's peak; what the device does not have is None."""

    allocated_bytes: int | None
    """torch's `max_memory_allocated`."""
    reserved_bytes: int | None
    """torch's `max_memory_reserved`."""
    device_bytes: int
    """What the driver reports; on a CPU the process's peak resident memory."""
    low_bytes: int | None
    high_bytes: int | None
    parts: MemoryParts


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes an element, by what the element is."""

    linear: float
    rest: int
    compute: int
    adapter: int


def estimate(
    config: TrialConfig, shape: ModelShape, workers: int, device: Literal["cuda", "cpu"], has_bf16: bool
) -> MemoryEstimate:
    """Estimate one worker's peak; `micro_batch_size` is a number."""
    parts = memory_parts(config, shape, workers, _bytes_of(config, device, has_bf16))
    if device == "cpu":
        return MemoryEstimate(None, None, CPU_IMPORTS_BYTES + parts.total, None, None, parts)
    allocated = parts.total
    reserved = int(allocated * FRAGMENTATION)
    low, high = int(allocated * (1 - UNCERTAINTY)), int(allocated * (1 + UNCERTAINTY))
    return MemoryEstimate(allocated, reserved, reserved + CONTEXT_BYTES, low, high, parts)


def estimate_on(config: TrialConfig, shape: ModelShape, workers: int, hardware: Hardware) -> MemoryEstimate:
    """The estimate for this hardware."""
    return estimate(config, shape, workers, hardware.device, hardware.has_bf16)


def _bytes_of(config: TrialConfig, device: Literal["cuda", "cpu"], has_bf16: bool) -> _Bytes:
    precision = config.precision
    half = 2 if device == "cuda" or has_bf16 else 4
    if precision is Precision.FP32:
        return _Bytes(4, 4, 4, 4)
    if precision.is_autocast:
        return _Bytes(4, 4, 2, 4)
    adapter = 4 if config.engine == "ddp" else half
    if precision.is_quantized:
        # prepare_model_for_kbit_training makes fp32 of the rest (peft 0.21.2); DeepSpeed then casts it back.
        return _Bytes(NF4_BYTES if precision is Precision.NF4 else INT8_BYTES, adapter, half, adapter)
    return _Bytes(2, 2, 2, 2 if config.trains_all_weights else adapter)


def memory_parts(config: TrialConfig, shape: ModelShape, workers: int, width: _Bytes) -> MemoryParts:
    """The parts of the estimate."""
    shards = {stage: workers if config.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    adapter_weights = trainable_adapter_parameters(config, shape)
    trainable = shape.parameters if config.trains_all_weights else adapter_weights
    weights = shape.linear_parameters * width.linear + (shape.parameters - shape.linear_parameters) * width.rest
    activations = _activations(config, shape, width)
    optimizer_bytes = 0 if config.offload != "none" else _optimizer_bytes(config, width) * trainable / shards[1]
    host_parameters = config.offload == "optimizer_and_parameters"
    return MemoryParts(
        weights=0 if host_parameters else int(weights / shards[3]),
        adapter=0 if host_parameters else int(adapter_weights * width.adapter / shards[3]),
        gradients=int(trainable * width.adapter / shards[2]),
        optimizer=int(optimizer_bytes),
        activations=int(activations),
        logits=int(_logits(config, shape, width)),
        communication=int(_communication(config, shape, width, trainable, workers)),
        framework=WORKSPACE_BYTES,
    )


def trainable_adapter_parameters(config: TrialConfig, shape: ModelShape) -> int:
    """LoRA's weights; DoRA adds a magnitude for each output; 0 where all weights are trained."""
    if config.rank == "full":
        return 0
    targets = targeted(shape, config.target_modules)
    magnitudes = sum(m.rows * m.count for m in targets) if config.dora else 0
    return lora_parameters(config.rank, targets) + magnitudes


def _optimizer_bytes(config: TrialConfig, width: _Bytes) -> int:
    """Bytes a trainable weight: AdamW's two fp32 moments, and DeepSpeed's fp32 copy of a half-precision weight."""
    moments = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}[config.optimizer]
    copies = 4 if config.engine == "deepspeed" and width.adapter == 2 else 0
    if config.engine == "deepspeed" and config.zero_stage and width.adapter == 4:
        # ZeRO partitions a flat fp32 copy, whatever the weights are (deepspeed 0.19.8, stage_1_and_2.py).
        copies = 4
    if config.engine == "ddp" and width.adapter == 2:
        moments //= 2
    return moments + copies


def _tokens(config: TrialConfig) -> int:
    assert isinstance(config.micro_batch_size, int)
    return config.micro_batch_size * config.sequence_length


def _activations(config: TrialConfig, shape: ModelShape, width: _Bytes) -> float:
    layer = _layer_activations(config, shape, width)
    dequantised = 0.0
    if config.precision.is_quantized:
        dequantised = max(m.rows * m.columns for m in shape.matrices) * width.compute
    if config.gradient_checkpointing:
        # The layers' inputs, and one layer at work.
        inputs = shape.layers * _tokens(config) * shape.hidden * width.compute
        return inputs + layer + dequantised
    autocast = 0.0
    if config.precision.is_autocast:
        # Frozen fp32 weights are cast for each use, and autograd keeps the copies until the backward pass: autocast's
        # cache is for weights that need a gradient (torch 2.13, autocast_mode.cpp).
        autocast = shape.linear_parameters * 2.0
    return shape.layers * layer + dequantised + autocast


def _layer_activations(config: TrialConfig, shape: ModelShape, width: _Bytes) -> float:
    """Bytes that autograd keeps for one decoder layer and a micro-batch."""
    c, hidden = width.compute, shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = shape.intermediate * max(1, shape.experts_per_token)
    adapted = {
        m.name for m in (shape.matrices if config.trains_all_weights else targeted(shape, config.target_modules))
    }
    # Two norms keep an fp32 copy of what they normalise, and the half-precision result where an adapter reads it.
    per_token = 2 * 4.0 * hidden
    per_token += (c + (width.adapter if width.adapter != c else 0)) * hidden  # read by the attention's adapters
    per_token += c * (2 * q + 2 * kv)  # query, key, value and the attention's result
    if adapted & {"o_proj", "dense", "c_proj", "out_proj"}:
        per_token += c * q
    per_token += c * 3 * wide  # gate, its activation, up
    if adapted & {"gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h"}:
        per_token += c * hidden
    if adapted & {"down_proj", "dense_4h_to_h"}:
        per_token += c * wide
    if config.rank != "full":
        per_token += c * config.rank * len(adapted)
        if config.lora_dropout:
            per_token += (c + 1) * hidden * len(adapted)
    return _tokens(config) * per_token + _scores(config, shape, width)


def _scores(config: TrialConfig, shape: ModelShape, width: _Bytes) -> float:
    """The scores that only the eager kernel keeps: softmax in fp32, its cast, and the masked scores."""
    if config.attention != "eager":
        return _tokens(config) * shape.heads * 4.0  # log-sum-exp
    return _tokens(config) * config.sequence_length * shape.heads * (4.0 + width.compute)


def _logits(config: TrialConfig, shape: ModelShape, width: _Bytes) -> float:
    """Logits, their fp32 copy and log-softmax, all alive at the end of the forward pass."""
    return _tokens(config) * shape.vocabulary * (width.compute + 8.0)


def _communication(config: TrialConfig, shape: ModelShape, width: _Bytes, trainable: int, workers: int) -> float:
    """Buckets and gathered weights."""
    if workers == 1 and config.zero_stage < 3:
        return 0.0
    bucket = min(trainable, 50_000_000) * width.adapter
    if config.zero_stage < 3:
        return bucket * (2 if config.zero_stage else 1)
    layer = shape.linear_parameters / shape.layers * width.linear
    outside = max(shape.embedding_parameters, shape.head_parameters) * width.rest
    return bucket + ZERO3_LIVE_LAYERS * layer + outside
