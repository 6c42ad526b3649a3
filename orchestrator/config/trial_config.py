"""Every setting of one trial: the names are the same in a sweep file's `trial:` and `space:`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

AlphaMultiple = Annotated[
    str, StringConstraints(pattern=r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)x$", max_length=12)
]
"""`2x` is twice the rank; above 0."""


class Precision(StrEnum):
    """How the frozen base is stored and computed."""

    FP32 = "fp32"
    AMP_BF16 = "amp_bf16"
    AMP_FP16 = "amp_fp16"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    NF4 = "nf4"

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes stores the frozen matrices."""
        return self in (Precision.INT8, Precision.NF4)

    @property
    def is_autocast(self) -> bool:
        """Whether fp32 weights are computed with under torch.autocast."""
        return self in (Precision.AMP_BF16, Precision.AMP_FP16)


CHANGEABLE = ("learning_rate", "weight_decay", "lora_dropout", "max_grad_norm")
"""Settings that may be others from one optimizer step to the next: no weight, state or data order depends on them."""


def _unsigned_zero(value: float) -> float:
    """-0.0 trains as 0.0 does, and would have another name."""
    return value + 0.0


class TrialConfig(BaseModel):
    """The settings of one trial; each has a default, so a sweep file names only what matters to it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, title="Trial settings"
    )

    rank: Annotated[int, Field(strict=True, ge=1, le=65536)] | Literal["full"] = 16
    """LoRA rank, or `full` to train all weights without an adapter."""
    alpha: Annotated[float, Field(gt=0)] | AlphaMultiple = "2x"
    """LoRA's scaling numerator; `2x` is twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1), AfterValidator(_unsigned_zero)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["attention", "all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "attention"
    """Modules that get an adapter: `attention` (all attention projections), `all-linear`, or their names."""
    rslora: bool = False
    """Rank-stabilised scaling: alpha / sqrt(rank) in place of alpha / rank."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""

    precision: Precision = Precision.BF16
    """How the frozen base is stored and computed. Default: bf16 on GPUs, fp32 on CPUs."""
    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    """Who steps: DeepSpeed with ZeRO, or torch's plain data parallelism as the baseline."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards: 1 optimizer states, 2 also gradients, 3 also parameters. Always 0 under ddp."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What ZeRO keeps in host memory."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel, transformers' `attn_implementation`."""

    global_batch_size: Annotated[int, Field(strict=True, ge=1, le=2**20)] = 16
    """Sequences an optimizer step over all workers; accumulation follows from it."""
    micro_batch_size: Annotated[int, Field(strict=True, ge=1, le=2**16)] | Literal["auto"] = "auto"
    """Sequences a worker and forward pass; `auto` is the largest that the memory estimate and `constraints` allow."""
    sequence_length: Annotated[int, Field(strict=True, ge=8, le=2**22)] = 512
    """Tokens a sequence at most; longer rows are cut."""
    packing: bool = False
    """Fill every sequence with as many rows as fit; rows do not see each other."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass in place of keeping them."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after the warm-up, until `max_steps`."""
    warmup_steps: Annotated[int, Field(strict=True, ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1), AfterValidator(_unsigned_zero)] = 0.0
    """AdamW's decoupled weight decay."""
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    """The optimizer of the trainable weights; `adamw_8bit` is bitsandbytes'."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    max_steps: Annotated[int, Field(strict=True, ge=1, le=10**8)] = 100
    """Optimizer steps of a trial that nothing stops."""
    eval_every: Annotated[int, Field(strict=True, ge=1)] = 20
    """Optimizer steps between two evaluations; the last step is always evaluated."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    """Seed of adapter, data order and dropout; repeat n of a configuration takes seed + n."""

    @model_validator(mode="before")
    @classmethod
    def _plain_data_parallelism_shards_nothing(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("engine") == "ddp":
            return {**raw, "zero_stage": 0}
        return raw

    @property
    def trains_all_weights(self) -> bool:
        """Whether there is no adapter."""
        return self.rank == "full"

    @property
    def lora_alpha(self) -> float:
        """Alpha as a number.

        Raises:
            ValueError: all weights are trained, so that there is no rank to multiply.
        """
        if isinstance(self.alpha, float | int):
            return float(self.alpha)
        if self.rank == "full":
            raise ValueError("rank: full has no alpha")
        return float(re.sub("x$", "", self.alpha)) * self.rank


def micro_batches_per_step(config: TrialConfig, workers: int) -> int:
    """Gradient accumulation: global batch ÷ (micro-batch × workers).

    Raises:
        ValueError: it does not divide, or `micro_batch_size` is still `auto`.
    """
    if config.micro_batch_size == "auto":
        raise ValueError("micro_batch_size is auto: planning chooses the number first")
    micro_batches, rest = divmod(config.global_batch_size, config.micro_batch_size * workers)
    if rest or not micro_batches:
        raise ValueError(
            f"global_batch_size {config.global_batch_size} is no multiple of "
            f"micro_batch_size {config.micro_batch_size} × {workers} workers"
        )
    return micro_batches


def halved_micro_batch(config: TrialConfig, workers: int) -> TrialConfig | None:
    """Half the micro-batch, or the next smaller number that divides a worker's sequences; None: it is 1 already.

    The global batch stays: accumulation grows as much as the micro-batch shrinks.
    """
    micro = config.micro_batch_size
    if micro == "auto" or micro == 1:
        return None
    share = config.global_batch_size // workers
    smaller = next(n for n in range(micro // 2, 0, -1) if share % n == 0)
    return config.model_copy(update={"micro_batch_size": smaller})
