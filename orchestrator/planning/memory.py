"""One worker's peak memory, by part, counted from the model's shape and a trial's settings.

Every term is a tensor that exists; few constants are fitted, each a physical quantity with its name.
The peak is the largest of three moments that do not coincide: the loss's backward pass, when all activations and the
float copies of the logits are alive; the backward pass of a layer, when those copies are gone and a layer is at work
(recomputed, where activations are checkpointed); and loading, when quantised weights and what is cast up are alive
twice. The parts are those of that moment, so that they sum to `allocated_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pydantic import computed_field

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.activations import (
    LOOPS,
    Loop,
    Widths,
    backward_bytes,
    dora_work_bytes,
    layer_bytes_per_token,
    linear_input_bytes,
    mask_bytes,
    score_blocks,
    score_bytes,
    writes_scores,
)
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.model_shape import ModelShape, lora_parameters, targeted

# Bytes of a 4-bit weight: half a byte, an 8-bit constant for 64 weights and an fp32 one for 256 of those (QLoRA,
# Dettmers et al. 2023, section 3: 0.127 bits).
NF4_CONSTANT_BYTES = 1 / 64 + 4 / (64 * 256)
NF4_BYTES = 0.5 + NF4_CONSTANT_BYTES
INT8_BYTES = 1.0
"""bitsandbytes' LLM.int8(): one byte, and an fp32 constant a row, which is below a thousandth."""
CONTEXT_BYTES, CONTEXT_THREAD_BYTES = 50 * 2**20, 2250
"""CUDA context and the kernels that training loads: so much, and so much for each thread that the GPU's multiprocessors
hold at once, since a context has local memory for all of them (NVIDIA's developer forum, "Local memory management"). A
line through 16 published processes that had a GPU alone, T4 to RTX 5090, of which the farthest is 56 MiB off
(benchmarks/data/outside_torch.csv)."""
NCCL_KERNELS_BYTES = 82 * 2**20
"""What a process' first NCCL communicator took beyond any further one (RTX 3060: sglang, pull request 35538)."""
NCCL_ALONE_BYTES = 10 * 2**20
"""A communicator of one worker, which has one channel (the same; training/worker_process.py)."""
NCCL_PCIE_BYTES, NCCL_NVLINK_BYTES = 72 * 2**20, 480 * 2**20
"""A communicator's share of each GPU, by what joins them: 4 channels, or 32 of which 24 are joined to rings. A channel
takes three pieces of 2 MiB, the least that can be mapped (NCCL 2.29.7, channel.cc, `initChannel`), and in a ring 10 MiB
to receive into and 2 to send from (transport/p2p.cc: 4 MiB for the protocol SIMPLE, 4.7 for LL128, 0.5 for LL). What
trees would take is not counted: a connection is made when it is first used, and four A100 had 4 % more than is told
with rings alone, eight H100 13 % (benchmarks/data/outside_torch.csv). GPUs that meet in the host's memory take less."""
NVLS_BYTES = 32 * 2**20
"""For each worker of a node whose switch sums, Hopper's and later: 16 channels with two buffers of 1 MiB
(transport/nvls.cc). NCCL sums so among more than two (vLLM, issue 9699)."""
WORKSPACE_BYTES = 64 * 2**20
"""On a GPU: cuBLAS workspaces and what else is allocated once."""
FRAGMENTATION = 0.19
"""What torch's caching allocator reserves beyond what it gave out at its peak, as a share of what comes and goes, for
weights lie without gaps: three of four of benchmarks/memory_accuracy.py's runs on one GPU took no more. Equal settings
in other lengths measured 0.07 and 0.21, so that no formula of the settings comes nearer than 4 % of the reserved
bytes."""
FRAGMENTATION_SHARDED = 0.445
"""The same where weights come and go layer by layer, gathered from other workers or from the host: of those runs. They
come on a stream of their own (deepspeed 0.19.8, partitioned_param_coordinator.py, `__allgather_stream`), and the
allocator gives no stream another's blocks (torch 2.13, CUDACachingAllocator.cpp)."""
GAPS = 0.05
"""What of it cannot be given back when memory runs short, as a share of what comes and goes: torch then frees all
blocks that it only keeps (2.13, CUDACachingAllocator.cpp, `release_cached_blocks`), and gaps beside those in use stay.
The least that benchmarks/memory_accuracy.py's runs on one GPU reserved beyond, in a GPU that was far from full."""
CPU_IMPORTS_BYTES = 450 * 2**20
"""A trial's process on a CPU beside its model: torch, transformers, peft and deepspeed. Resident under jemalloc, six
trials of `builtin:tiny-llama` took 444 to 453 MiB beside the tensors that are counted."""
FILE_BYTES = 2
"""A weight in the model's files, as most are published."""
LOSS_COPIES_BYTES = 12
"""A logit's fp32 copies at the worst moment, within log-softmax's backward: its result and two gradients (torch 2.13).

Logits that are held come on top (`_held_at_loss`).
"""
ADAM_8BIT_BYTES = 2 + 2 * 4 / 256
"""bitsandbytes' two moments: a byte each, and an fp32 constant for 256 of them (0.50, optim/optimizer.py)."""
MOMENTS_BYTES = {"adamw": 8.0, "adamw_8bit": ADAM_8BIT_BYTES, "sgd": 0.0}
"""An optimizer's states of a weight; AdamW's are fp32."""
REST_LOW, REST_HIGH = 0.56, 1.30
"""The ends of the 90 % interval, over all that is predicted beside the weights: those are counted exactly, and the rest
depends on the library, which no setting names. One that keeps a quantised model's activations in half precision takes a
quarter less. Where nine of ten calibration points lay before loops were told apart, and 0.2 wider each way for
libraries that are not among them; of the larger loop's they are 0.48 and 1.20 now (benchmarks/memory_accuracy.py),
within what the low end of the one loop and the high end of the other hold."""
ZERO_BUCKET_WEIGHTS = 50_000_000
"""Gradients of a bucket that ZeRO reduces at once; a tenth of DeepSpeed's default, since an adapter's fill no more."""
ZERO3_STEP_WEIGHTS = 1_000_000_000
"""Weights that ZeRO-3 steps at once: DeepSpeed's default of `sub_group_size`."""
ZERO3_LIVE_LAYERS = 2
"""Layers whose weights ZeRO-3 holds gathered at least: the one at work and the one fetched ahead."""
ZERO3_REUSED_WEIGHTS = 500_000_000
"""Weights that ZeRO-3 holds gathered while the forward pass turns to the backward pass: those used again within its
`stage3_max_reuse_distance` of 1e9 weights, there and back (deepspeed 0.19.8, partitioned_param_coordinator.py)."""


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
        """Their sum; written out, as below."""
        held = self.weights + self.adapter + self.gradients + self.optimizer
        return held + self.activations + self.logits + self.communication + self.framework

    @property
    def comes_and_goes(self) -> int:
        """Bytes that are not held from the first step to the last."""
        return self.total - self.weights - self.adapter - self.optimizer

    @property
    def biggest(self) -> str:
        """The name of the largest part."""
        parts = self.by_name()
        return max(parts, key=parts.__getitem__)

    def by_name(self) -> dict[str, int]:
        """As the contract names them; written out, since `dataclasses.asdict` costs more than the whole estimate."""
        return {
            "weights": self.weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "communication": self.communication,
            "framework": self.framework,
        }


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """All figures are one worker's peak; what the device does not have is None."""

    allocated_bytes: int | None
    """torch's `max_memory_allocated`."""
    reserved_bytes: int | None
    """torch's `max_memory_reserved`."""
    device_bytes: int
    """What the driver reports: `reserved_bytes`, and what is outside of torch's allocator (`outside_torch_bytes`); on a
    CPU the process's peak resident memory."""
    low_bytes: int | None
    high_bytes: int | None
    parts: MemoryParts

    @property
    def measured_bytes(self) -> int:
        """What a trial's measured peak is comparable with: allocated on a GPU, resident on a CPU."""
        return self.device_bytes if self.allocated_bytes is None else self.allocated_bytes

    @property
    def _outside_bytes(self) -> int:
        return 0 if self.reserved_bytes is None else self.device_bytes - self.reserved_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def needed_bytes(self) -> int:
        """The least that a device must have: on a GPU without what the allocator keeps and can give back."""
        if self.allocated_bytes is None:
            return self.device_bytes
        return self.allocated_bytes + int(self.parts.comes_and_goes * GAPS) + self._outside_bytes

    def may_exceed(self, memory_bytes: int) -> bool:
        """Whether so much may be too little: at the upper end of the 90 % range."""
        if self.allocated_bytes is None or self.high_bytes is None:
            return False
        return self.high_bytes + self.needed_bytes - self.allocated_bytes > memory_bytes

    def within(self, memory_bytes: int) -> MemoryEstimate:
        """The same on a device that has so much: the allocator keeps no more than that, or than what is needed."""
        if self.reserved_bytes is None:
            return self
        device_bytes = min(self.device_bytes, max(memory_bytes, self.needed_bytes))
        return replace(self, reserved_bytes=device_bytes - self._outside_bytes, device_bytes=device_bytes)


def estimate(
    config: TrialConfig,
    shape: ModelShape,
    workers: int,
    device: Literal["cuda", "cpu"],
    has_bf16: bool,
    outside_bytes: int = 0,
    loop: Loop = "trainer",
) -> MemoryEstimate:
    """Estimate one worker's peak; `micro_batch_size` is a number, `outside_bytes` what is not torch's on a GPU."""
    if loop == "any":
        every = [estimate(config, shape, workers, device, has_bf16, outside_bytes, one) for one in LOOPS]
        return _largest_of(every)
    width = _bytes_of(config, device, has_bf16, loop)
    phases = _phases(config, shape, workers, width)
    parts = _largest(phases)
    if device == "cpu":
        parts = replace(parts, framework=parts.framework + CPU_IMPORTS_BYTES)
        return MemoryEstimate(None, None, parts.total, None, None, parts)
    # Loading may hold most and yet leave the allocator less to keep than training, of which more comes and goes.
    reserved = max(_reserved(config, shape, workers, width, part) for part in phases)
    low, high = (
        max(part.weights + int((part.total - part.weights) * share) for part in phases)
        for share in (REST_LOW, REST_HIGH)
    )
    return MemoryEstimate(parts.total, reserved, reserved + outside_bytes, low, high, parts)


def _largest_of(every: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """What the loop that allocates most does, from the lowest of all their low ends to the highest of the others."""
    largest = max(every, key=lambda memory: memory.measured_bytes)
    if largest.low_bytes is None or largest.high_bytes is None:
        return largest
    low, high = (min(memory.low_bytes or 0 for memory in every), max(memory.high_bytes or 0 for memory in every))
    return replace(largest, low_bytes=low, high_bytes=high)


def _reserved(config: TrialConfig, shape: ModelShape, workers: int, width: Widths, parts: MemoryParts) -> int:
    share = FRAGMENTATION_SHARDED if config.zero_stage == 3 else FRAGMENTATION
    reserved = parts.total + int(parts.comes_and_goes * share + _idle_bytes(config, shape, width))
    if config.offload != "optimizer_and_parameters":
        return reserved
    # Blocks of the copies' stream hold weights, and no more of them than would else be there all the time.
    kept = config.model_copy(update={"offload": "optimizer"})
    bound = _reserved(kept, shape, workers, width, memory_parts(kept, shape, workers, width))
    return min(reserved, bound)


def _idle_bytes(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """What the allocator holds beyond the most that is alive, since scores and the loss's copies need blocks of unlike
    sizes: one may serve something smaller, and blocks that were allocated apart are never joined (torch 2.13,
    CUDACachingAllocator.cpp). A step computes scores, then the loss, then scores again and their gradients.

    Where scores outgrow the loss's tensors, blocks come to serve those all of a sudden. A longer sequence is not told
    less for it: rows are not all of the full length.
    """
    if not writes_scores(config, shape, width):
        return 0.0
    # Each of these tensors is as many times larger as a micro-batch has sequences, and so is what is idle.
    assert isinstance(config.micro_batch_size, int)
    one_bytes = _idle_of_a_sequence(config.attention, config.precision, config.sequence_length, shape, width)
    return config.micro_batch_size * one_bytes


_ONE_SEQUENCE = TrialConfig(micro_batch_size=1)


@lru_cache(maxsize=1024)
def _idle_of_a_sequence(
    attention: str, precision: Precision, sequence_length: int, shape: ModelShape, width: Widths
) -> float:
    config = _ONE_SEQUENCE.model_copy(update={"attention": attention, "precision": precision})
    even = shape.vocabulary / shape.heads
    shorter = (math.ceil(share * even) - 1 for share in (0.5, 1.0, 2.0))
    lengths = [length for length in shorter if 0 < length < sequence_length]
    return max(
        _idle_at(config.model_copy(update={"sequence_length": length}), shape, width)
        for length in (*lengths, sequence_length)
    )


def _idle_at(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    forward, backward = score_blocks(config, shape, width)
    copy = 4.0 * shape.vocabulary * _tokens(config)
    loss = [copy * width.logits / 4, *[copy] * (LOSS_COPIES_BYTES // 4)]
    blocks: list[float] = []
    for needed in (forward, loss, forward, backward):
        free = sorted(blocks)
        for size in sorted(needed, reverse=True):
            place = next((place for place, block in enumerate(free) if block >= size), None)
            if place is None:
                blocks.append(size)
            else:
                free[place] -= size
                free.sort()
    return sum(blocks) - max(map(sum, (forward, loss, backward)))


def estimate_on(
    config: TrialConfig, shape: ModelShape, workers: int, hardware: Hardware, loop: Loop = "trainer"
) -> MemoryEstimate:
    """The estimate for this hardware."""
    outside_bytes = outside_torch_bytes(config.engine, workers, hardware)
    return estimate(config, shape, workers, hardware.device, hardware.has_bf16, outside_bytes, loop)


def outside_torch_bytes(engine: Literal["deepspeed", "ddp"], workers: int, hardware: Hardware) -> int:
    """What a worker's process has on its GPU beside what torch reserves: its context, and what NCCL takes."""
    context = CONTEXT_BYTES + CONTEXT_THREAD_BYTES * hardware.resident_threads
    if workers == 1:
        communicator, summing = NCCL_ALONE_BYTES, 0
    elif not hardware.has_nvlink:
        communicator, summing = NCCL_PCIE_BYTES, 0
    else:
        has_nvls = workers > 2 and hardware.compute_capability is not None and hardware.compute_capability >= (9, 0)
        communicator, summing = NCCL_NVLINK_BYTES, NVLS_BYTES * min(workers, 8) * has_nvls
    # DeepSpeed clones the group of all workers, and both are used (0.19.8, utils/groups.py, `_clone_world_group`).
    communicators = 2 if engine == "deepspeed" else 1
    return context + NCCL_KERNELS_BYTES + communicators * communicator + summing


def _bytes_of(config: TrialConfig, device: Literal["cuda", "cpu"], has_bf16: bool, loop: Loop = "trainer") -> Widths:
    precision, on_gpu, is_bare = config.precision, device == "cuda", loop == "bare"
    # A GPU without bf16 is one before Ampere.
    repeats_keys = on_gpu and not has_bf16
    half = 2 if on_gpu or has_bf16 else 4
    if precision is Precision.FP32:
        return Widths(4, 4, 4, 4, 4, 0, 4, 4, 4, is_bare, on_gpu, repeats_keys)
    if precision.is_autocast:
        return Widths(4, 4, 4, 2, 2, 0, 4, 2, 2, is_bare, on_gpu, repeats_keys)
    # An adapter of half-precision weights is fp32, and computed with in half under autocast; DeepSpeed makes it half
    # again to hold its own copy.
    adapter = 4 if config.engine == "ddp" else half
    computed = adapter if loop == "bare" else half
    if precision.is_quantized:
        # prepare_model_for_kbit_training makes fp32 of the rest (peft 0.21.2), so that all flows in fp32, and products
        # return what they were given (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward); autocast computes
        # attention, adapters and head in half. DeepSpeed casts the whole module back (deepspeed 0.19.8, engine.py,
        # _configure_distributed_model).
        linear = NF4_BYTES if precision is Precision.NF4 else INT8_BYTES
        # Training on a CPU int8 takes a plain product of the whole weight, which autocast makes one in half
        # (bitsandbytes 0.50, autograd/_functions.py, MatMul8bitFp).
        product = half if precision is Precision.INT8 and not on_gpu else adapter
        # Queries and keys in fp32 come with a mask of padded rows, with which keys are repeated.
        repeats_keys = repeats_keys or computed == 4
        return Widths(
            linear,
            adapter,
            adapter,
            product,
            computed,
            half,
            adapter,
            computed,
            computed,
            is_bare,
            on_gpu,
            repeats_keys,
        )
    adapter, computed = (2, 2) if config.trains_all_weights else (adapter, computed)
    return Widths(2, 2, 2, 2, 2, 0, adapter, computed, 2, is_bare, on_gpu, repeats_keys)


def host_bytes_on(config: TrialConfig, shape: ModelShape, workers: int, hardware: Hardware) -> int:
    """Host memory that one worker's offloaded state takes here; 0 where nothing is offloaded."""
    return offloaded_bytes(config, shape, workers, _bytes_of(config, hardware.device, hardware.has_bf16))


def offloaded_bytes(config: TrialConfig, shape: ModelShape, workers: int, width: Widths) -> int:
    """Bytes that a worker keeps in host memory from its first step to its last, as deepspeed 0.19.8 allocates them.

    Of its share of what is trained: fp32 copies and their gradients, AdamW's moments, and gradients as they were
    summed, which stage 3 has always (stage3.py, `grad_partitions_flat_buffer`) and stage 2 where a step has several
    micro-batches (stage_1_and_2.py, `accumulated_grads_in_cpu`); stage 2 also the new weights on their way to the
    device (`param_buffer_of_bit16_for_cpu_offload_groups`). With the parameters, its shard of all weights. What a step
    takes besides, and the process itself, come on top.
    """
    if config.offload == "none":
        return 0
    trainable = trainable_parameters(config, shape)
    at_once = config.global_batch_size if config.micro_batch_size == "auto" else config.micro_batch_size * workers
    accumulates = config.zero_stage == 3 or config.global_batch_size > at_once
    copies = (config.zero_stage < 3) + accumulates
    kept = trainable * (4 + 4 + MOMENTS_BYTES[config.optimizer] + copies * width.adapter)
    if config.offload == "optimizer_and_parameters":
        adapter = 0 if config.trains_all_weights else trainable
        kept += _weight_bytes(shape, width) - _constants_bytes(config, shape) + adapter * width.adapter
    return int(kept / workers)


def memory_parts(config: TrialConfig, shape: ModelShape, workers: int, width: Widths) -> MemoryParts:
    """The parts of the estimate, at the moment of the peak."""
    return _largest(_phases(config, shape, workers, width))


def _largest(phases: Sequence[MemoryParts]) -> MemoryParts:
    return max(phases, key=lambda parts: parts.total)


def _phases(config: TrialConfig, shape: ModelShape, workers: int, width: Widths) -> tuple[MemoryParts, ...]:
    """The peaks of training and, where it counts, of loading."""
    training = _training(config, shape, workers, width)
    if not width.on_gpu:
        return training, MemoryParts(_loading_on_a_cpu(config, shape, workers, width), 0, 0, 0, 0, 0, 0, 0)
    if not config.precision.is_quantized or config.zero_stage == 3:
        return (training,)
    return training, MemoryParts(_loading(shape, width), 0, 0, 0, 0, 0, 0, WORKSPACE_BYTES)


def _training(config: TrialConfig, shape: ModelShape, workers: int, width: Widths) -> MemoryParts:
    shards = {stage: workers if config.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    trainable = trainable_parameters(config, shape)
    adapter_weights = 0 if config.trains_all_weights else trainable
    host_parameters = config.offload == "optimizer_and_parameters"
    constants = _constants_bytes(config, shape)
    weights = constants + (0.0 if host_parameters else (_weight_bytes(shape, width) - constants) / shards[3])
    # What is stepped in host memory has neither gradients nor optimizer states on the device.
    stepped = 0.0 if config.offload != "none" else float(trainable)
    at_once = config.micro_batch_size * workers if config.micro_batch_size != "auto" else 0
    is_whole = shards[2] == 1 and config.offload == "none"
    gradients = _Gradients(
        kept=stepped * width.adapter / shards[2],
        stepped=_stepped_bytes(config, width, stepped / shards[1]),
        at_step=_step_bytes(config, width, stepped / shards[1]),
        of_a_table=float(shape.embedding_parameters * width.adapter) if config.trains_all_weights else 0.0,
        is_added=not is_whole or config.global_batch_size > at_once,
    )
    activations, logits, gradient_bytes, passing = max(_moments(config, shape, width, gradients), key=sum)
    return MemoryParts(
        weights=int(weights),
        adapter=0 if host_parameters else int(adapter_weights * width.adapter / shards[3]),
        gradients=int(gradient_bytes),
        optimizer=int(_optimizer_bytes(config, width) * stepped / shards[1]),
        activations=int(activations),
        logits=int(logits),
        communication=int(_communication(config, shape, width, trainable, workers)),
        framework=(WORKSPACE_BYTES if width.on_gpu else 0) + int(passing),
    )


def _constants_bytes(config: TrialConfig, shape: ModelShape) -> float:
    """Of 4-bit weights: bitsandbytes keeps them beside the parameter, where ZeRO-3 neither shards nor offloads."""
    return shape.quantisable_parameters * NF4_CONSTANT_BYTES if config.precision is Precision.NF4 else 0.0


def _weight_bytes(shape: ModelShape, width: Widths) -> float:
    return _linear_bytes(shape, width) + (shape.parameters - shape.linear_parameters) * width.rest


def _linear_bytes(shape: ModelShape, width: Widths) -> float:
    """Bytes of the decoder layers' matrices; experts are stored as the rest is."""
    return shape.quantisable_parameters * width.linear + shape.expert_parameters * width.rest


def loading_bytes_on(config: TrialConfig, shape: ModelShape, workers: int, hardware: Hardware) -> int:
    """What a GPU must have while quantised weights are loaded under ZeRO-3; 0 where the estimate counts loading itself.

    Each worker holds the whole model, which is sharded afterwards: quantised ones skip zero.Init (transformers 5.23,
    modeling_utils.py, `get_init_context`), and go to the worker's GPU (quantizer_bnb_4bit.py, `update_device_map`). No
    phase of the estimate, whose measured runs load into shards, by FSDP.
    """
    if hardware.device == "cpu" or not config.precision.is_quantized or config.zero_stage < 3:
        return 0
    width = _bytes_of(config, hardware.device, hardware.has_bf16)
    return _loading(shape, width) + WORKSPACE_BYTES + outside_torch_bytes(config.engine, workers, hardware)


def _loading_on_a_cpu(config: TrialConfig, shape: ModelShape, workers: int, width: Widths) -> int:
    """Resident bytes while weights are read: beside what they become, the pages of the file, which is mapped.

    Under ZeRO-3 a worker holds the weights that it has read, and the model's gathered to take them, beside its shard.
    With the 135M model this and the imports were 1.05 of what loading took for nf4, 1.03 for fp32.
    """
    pages = shape.parameters * FILE_BYTES
    if config.precision.is_quantized:
        return pages + int(_quantised_bytes(shape, width))
    if config.zero_stage == 3:
        return pages + int(shape.parameters * width.rest * (2 + 1 / workers))
    # Weights of the file's own type stay the file's pages.
    return pages + (shape.parameters * width.rest if width.rest > FILE_BYTES else 0)


def _loading(shape: ModelShape, width: Widths) -> int:
    """Quantised weights, and the largest tensor that is being cast, twice."""
    # Gate and up of all of a layer's experts are one tensor.
    stacked = max((2 * m.parameters // m.count * shape.experts for m in shape.matrices if m.is_expert), default=0)
    return int(_quantised_bytes(shape, width) + max(shape.embedding_parameters, stacked) * width.dequantised)


def _quantised_bytes(shape: ModelShape, width: Widths) -> float:
    """Quantised weights, and the rest cast up to fp32."""
    return shape.quantisable_parameters * width.linear + (shape.parameters - shape.quantisable_parameters) * 4


def trainable_parameters(config: TrialConfig, shape: ModelShape) -> int:
    """LoRA's weights, to which DoRA adds a magnitude for each output, or all of the model's."""
    if config.rank == "full":
        return shape.parameters
    targets = targeted(shape, config.target_modules)
    magnitudes = sum(m.rows * m.count for m in targets) if config.dora else 0
    return lora_parameters(config.rank, targets) + magnitudes


def _optimizer_bytes(config: TrialConfig, width: Widths) -> float:
    """Bytes a trainable weight: AdamW's two fp32 moments, and DeepSpeed's fp32 copy of a half-precision weight."""
    moments = MOMENTS_BYTES[config.optimizer]
    if config.engine == "ddp":
        return moments / 2 if width.adapter == 2 and config.optimizer == "adamw" else moments
    # ZeRO partitions a flat fp32 copy, whatever the weights are (deepspeed 0.19.8, stage_1_and_2.py).
    return moments + (4 if width.adapter == 2 or config.zero_stage else 0)


def _stepped_bytes(config: TrialConfig, width: Widths, share: float) -> float:
    """Gradients as a worker's optimizer takes them: DeepSpeed's in fp32, which ZeRO-3 makes group by group."""
    if config.engine == "ddp":
        return share * width.adapter
    at_once = _stepped_at_once(config, share)
    return at_once * 4 + (share - at_once) * width.adapter


def _stepped_at_once(config: TrialConfig, share: float) -> float:
    return min(share, ZERO3_STEP_WEIGHTS) if config.zero_stage == 3 else share


def _step_bytes(config: TrialConfig, width: Widths, share: float) -> float:
    """Gradients and what else is there for the `share` of weights that a worker steps.

    DeepSpeed's step takes gradients as one fp32 copy, made while they are there, flat, once more (deepspeed 0.19.8,
    stage_1_and_2.py, `step`; stage3.py, `_prepare_fp32_grad_for_sub_group`). torch's AdamW then has a root for each
    second moment: a GPU's kernels over many tensors hold all of them at once (torch 2.13, optim/adam.py,
    `_multi_tensor_adam`); a CPU's go tensor by tensor, of which a partition is one,
    and were measured to hold two for each (ZeRO-1 to 3).
    """
    each = width.adapter
    is_flat = config.engine == "deepspeed" and config.zero_stage > 0
    roots = 0.0
    if config.optimizer == "adamw" and (width.on_gpu or is_flat):
        roots = 8.0 if not width.on_gpu else float(each if config.engine == "ddp" else 4)
    if not is_flat:
        # Without ZeRO half-precision gradients stay beside their fp32 copies (fp16/unfused_optimizer.py, `step`).
        copies = 4 if config.engine == "deepspeed" and each < 4 else 0
        return share * (each + copies + roots)
    at_once = _stepped_at_once(config, share)
    flat = each + 4 if each < 4 else each
    return share * each + at_once * max(flat, 4 + roots - each)


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Bytes of gradients on a worker's device."""

    kept: float
    """Of all weights that it keeps them of, after a backward pass."""
    stepped: float
    """Of those that it steps, as the optimizer takes them: in fp32 under DeepSpeed."""
    at_step: float
    """With what the optimizer's step takes besides."""
    of_a_table: float
    """Of the embedding or of the head, where they are trained: new, before they are added or shared out."""
    is_added: bool
    """A new gradient is beside what is kept: of an earlier micro-batch, or of a worker's share alone."""


def _tokens(config: TrialConfig) -> int:
    assert isinstance(config.micro_batch_size, int)
    return config.micro_batch_size * config.sequence_length


def _moments(
    config: TrialConfig, shape: ModelShape, width: Widths, gradients: _Gradients
) -> tuple[tuple[float, float, float, float], ...]:
    """Activations, logits, gradients and what passes beside them: at the loss's backward, at the last layer's, the
    first layer's, the embedding's, and the step.

    Gradients of earlier micro-batches are there from the start; those of an offloaded optimizer go to the host bucket
    by bucket (its documentation, "Memory requirements"). Where head and embedding are one, the gradient by way of the
    head waits for the other, and autograd adds them to a third (measured with torch 2.13's profiler on a CPU). Nobody
    needs the logits at the step.
    """
    tokens = _tokens(config)
    kept, at_work, alone, forward = _layer_activations(config, shape, width)
    # tanh's result, which softcapped logits are scaled from, is kept for its gradient.
    held = float(shape.vocabulary * width.logits * (width.is_bare + shape.softcapped_logits) * tokens)
    at_loss = LOSS_COPIES_BYTES * shape.vocabulary * tokens + _held_at_loss(shape, width, held)
    last_norm = tokens * shape.hidden * (4 if shape.rms_norm else width.stream)
    # An adapter's are too small to tell the two apart: a larger micro-batch should not look like less memory.
    earlier = gradients.kept if gradients.is_added or not config.trains_all_weights else 0.0
    table = gradients.of_a_table
    waiting = table if shape.tied_embeddings else 0.0
    added = table if gradients.is_added else 0.0
    return (
        (kept + forward, 0.0, earlier, 0.0),
        (kept + last_norm, at_loss, earlier, 0.0),
        (kept + at_work, held, earlier, table),
        (alone, held, gradients.kept, min(waiting, added)),
        (0.0, held, gradients.kept, 2 * waiting + added),
        (0.0, 0.0, gradients.stepped, gradients.at_step - gradients.stepped),
    )


def _layer_activations(config: TrialConfig, shape: ModelShape, width: Widths) -> tuple[float, float, float, float]:
    """Bytes kept until the backward pass, bytes more while a layer's is at work, bytes of the first layer alone, and
    bytes more while the forward pass is at work."""
    tokens, batch = _tokens(config), config.micro_batch_size
    assert isinstance(batch, int)
    layer = tokens * layer_bytes_per_token(config, shape, width)
    layer += batch * score_bytes(config, shape, width)
    at_work = backward_bytes(config, shape, width, tokens)
    forward, _ = dora_work_bytes(config, shape, width, tokens)
    if config.gradient_checkpointing:
        # The layers' inputs, and one layer recomputed.
        own = shape.hidden * width.stream + _escaping_bytes(config, shape, width)
        mask = batch * mask_bytes(config, shape, width)
        at_work = max(at_work, forward + width.stream * shape.hidden * tokens)
        recomputed = at_work + layer + _weight_copies(config, shape, width, 1)
        return shape.layers * tokens * own + mask, recomputed, recomputed + mask, forward
    kept = shape.layers * layer + _weight_copies(config, shape, width, shape.layers)
    return kept, at_work, layer + at_work, forward


def _held_at_loss(shape: ModelShape, width: Widths, logits: float) -> float:
    """Bytes beside the loss's own: logits that are held, and autocast's copy of the head.

    A head that was made fp32 is cast for autocast, and the copy of a frozen weight is kept for the backward pass.
    """
    return logits + (0.0 if width.logits == width.rest else float(width.logits * shape.vocabulary * shape.hidden))


def _escaping_bytes(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Bytes a token and layer that checkpointing does not spare: LLM.int8() holds its inputs as plain attributes, which
    torch's saved-tensor hooks never see (bitsandbytes 0.50, MatMul8bitLt; torch 2.13, non-reentrant checkpointing)."""
    if config.precision is not Precision.INT8:
        return 0.0
    return linear_input_bytes(config, shape, width) + width.attention * shape.heads * shape.head_dim


def _weight_copies(config: TrialConfig, shape: ModelShape, width: Widths, layers: int) -> float:
    """Bytes of weights that autograd keeps as they were used, rather than as they are stored.

    Autocast casts fp32 ones, frozen ones for each use: its cache is for weights that need a gradient (torch 2.13,
    autocast_mode.cpp). An adapter on a mixture's stacked experts is added to all of them at once (peft 0.21.2,
    tuners/lora/layer.py, ParamWrapper). DoRA keeps of each output the weight's norm, the magnitude over it, and that
    less one; with dropout also the weight that it multiplies once more, unless that is the parameter itself
    (tuners/lora/dora.py, forward).
    """
    share = layers / shape.layers
    if config.trains_all_weights:
        return 2.0 * shape.linear_parameters * share if config.precision.is_autocast else 0.0
    is_cast = width.adapter_input < width.adapter
    cast = 2.0 * trainable_parameters(config, shape) if is_cast else 0.0
    if config.dora:
        targets = targeted(shape, config.target_modules)
        cast += 3.0 * width.adapter * sum(m.rows * m.count for m in targets)
        if config.lora_dropout and (is_cast or width.dequantised):
            cast += float(width.adapter_input * sum(m.parameters for m in targets))
    if config.precision.is_autocast:
        return (cast + 2.0 * shape.linear_parameters) * share
    if width.rest > width.attention:
        cast += 2.0 * shape.expert_parameters
    adapted = (m for m in targeted(shape, config.target_modules) if m.is_expert and m.name != "gate")
    return (cast + sum(m.parameters for m in adapted) * max(width.rest, width.dequantised)) * share


def _communication(config: TrialConfig, shape: ModelShape, width: Widths, trainable: int, workers: int) -> float:
    """Buckets and gathered weights."""
    if config.zero_stage == 0:
        # Buckets hold all gradients once more (torch 2.13, DistributedDataParallel, gradient_as_bucket_view).
        return float(trainable * width.adapter) if workers > 1 else 0.0
    # Allocated whole, also by a single worker; on a CPU what no gradient fills is never touched.
    bucket = float((ZERO_BUCKET_WEIGHTS if width.on_gpu else min(trainable, ZERO_BUCKET_WEIGHTS)) * width.adapter)
    if config.zero_stage < 3:
        # Two in turn, where communication overlaps (deepspeed 0.19.8, stage_1_and_2.py, setup_buckets).
        return bucket * 2
    matrices = _linear_bytes(shape, width)
    # Packed weights look to ZeRO like as many as their bytes would be in half precision.
    reused = ZERO3_REUSED_WEIGHTS * max(width.linear, 2.0)
    gathered = min(max(ZERO3_LIVE_LAYERS * matrices / shape.layers, reused), matrices)
    outside = max(shape.embedding_parameters, shape.head_parameters) * width.rest
    return bucket + gathered + outside
