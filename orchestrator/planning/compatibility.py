"""Which settings exclude each other, anywhere or on this hardware: one pure function a rule.

Each rule returns a reason that ends in what to change, or None. `Case` holds what a rule may look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.errors import cut
from orchestrator.planning.activations import Loop
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.model_shape import ModelShape, targeted

INSTALL_BITSANDBYTES = "install it (pip install 'bitsandbytes>=0.50.2,<0.51')"


@dataclass(frozen=True, slots=True)
class Case:
    """A trial, the model, and where it would run."""

    config: TrialConfig
    shape: ModelShape
    hardware: Hardware
    workers: int
    loop: Loop = "trainer"
    """What would train it, of which memory depends alone."""


Rule = Callable[[Case], str | None]


def refusals(case: Case) -> tuple[str, ...]:
    """Every reason why the trial cannot run."""
    return tuple(reason for rule in REFUSALS if (reason := rule(case)))


def _half(case: Case) -> str:
    """The half precision that this device computes and this engine trains all weights in; fp32 where it has none."""
    if case.hardware.has_bf16 or not case.hardware.has_fp16:
        return "bf16" if case.hardware.has_bf16 else "fp32"
    return "amp_fp16" if case.config.engine == "ddp" and case.config.trains_all_weights else "fp16"


def _kernel(case: Case) -> str:
    """The attention that the model has on any device."""
    return "eager" if case.shape.model_type in WITHOUT_SDPA else "sdpa"


def fp16_needs_hardware(case: Case) -> str | None:
    """Source: deepspeed 0.19.8, runtime/engine.py: "Type fp16 is not supported on your device"."""
    if case.config.precision in (Precision.FP16, Precision.AMP_FP16) and not case.hardware.has_fp16:
        others = "bf16 or fp32" if case.hardware.has_bf16 else "fp32"
        return f"precision {case.config.precision}: this device does not compute fp16; use {others}"
    return None


def bf16_needs_ampere(case: Case) -> str | None:
    """Source: bfloat16 tensor operations need compute capability 8.0 (CUDA programming guide, table of arithmetic)."""
    config = case.config
    if config.precision in (Precision.BF16, Precision.AMP_BF16) and case.hardware.is_before_ampere:
        # See `fp16_autocast_excludes_zero`.
        other = "amp_fp16" if config.precision.is_autocast and config.zero_stage == 0 else _half(case)
        return f"precision {config.precision}: {case.hardware.gpu_name} does not compute bf16; use {other}"
    return None


TORCH_FOR_VOLTA = "torch for CUDA 12.6 (PyTorch's installation page gives the command)"


def torch_of_pypi_needs_turing(case: Case) -> str | None:
    """Source: github.com/pytorch/pytorch, issues 172352 and 190385: CUDA 13, which torch 2.13 of PyPI is built for,
    compiles for compute capability 7.5 and newer; the wheels for CUDA 12.6 have kernels for Volta."""
    if case.hardware.is_before_turing and case.hardware.torch_knows_volta is False:
        return (
            f"precision {case.config.precision}: torch for CUDA 13 has no kernels for {case.hardware.gpu_name}; "
            f"install {TORCH_FOR_VOLTA}"
        )
    return None


def flash_attention_needs_ampere(case: Case) -> str | None:
    """Source: flash-attn's README: Ampere, Ada or Hopper GPUs, fp16 and bf16, head dimension up to 256."""
    if case.config.attention != "flash_attention_2":
        return None
    if case.hardware.compute_capability is None or case.hardware.is_before_ampere:
        return f"attention flash_attention_2: it needs an Ampere GPU or newer; use {_kernel(case)}"
    if case.config.precision is Precision.FP32:
        told = "it computes in half precision only; use precision bf16"
        return f"attention flash_attention_2: {told}, or attention {_kernel(case)}"
    if case.hardware.has_flash_attention is False:
        return (
            "attention flash_attention_2: flash-attn is not installed; "
            f"pip install --no-build-isolation flash-attn, or use {_kernel(case)}"
        )
    if case.shape.head_dim > 256:
        told = f"heads of {case.shape.head_dim} are wider than its 256"
        return f"attention flash_attention_2: {told}; use {_kernel(case)}"
    return None


def attention_must_be_the_models(case: Case) -> str | None:
    """Source: transformers 5.23, modeling_utils.py: `_supports_sdpa`, `_supports_flash_attn` of a model's class."""
    attention, family = case.config.attention, case.shape.model_type
    if attention == "sdpa" and family in WITHOUT_SDPA:
        return f"attention sdpa: transformers has none for {family} models; use eager"
    if attention == "flash_attention_2" and family in WITHOUT_FLASH_ATTENTION:
        return f"attention flash_attention_2: transformers has none for {family} models; use {_kernel(case)}"
    return None


def expert_adapters_are_plain(case: Case) -> str | None:
    """Source: peft 0.21.2, tuners/lora/layer.py, ParamWrapper, which adapts the stacked weights of experts."""
    config = case.config
    if config.trains_all_weights or not any(m.is_expert for m in targeted(case.shape, config.target_modules)):
        return None
    if config.lora_dropout:
        return "lora_dropout: adapters of experts have none; use 0, or target_modules attention"
    if config.dora:
        return "dora: adapters of experts cannot be decomposed; use dora false, or target_modules attention"
    return None


def offload_needs_zero(case: Case) -> str | None:
    """Source: DeepSpeed's configuration reference, ZeRO optimizations: offload_optimizer needs stage 2 or 3."""
    config = case.config
    if config.offload == "none":
        return None
    if config.engine == "ddp":
        return f"offload {config.offload}: it is DeepSpeed's; use engine deepspeed, or offload none"
    if config.zero_stage < 2:
        return f"offload {config.offload}: it needs zero_stage 2 or 3, not {config.zero_stage}; raise zero_stage"
    if config.offload == "optimizer_and_parameters" and config.zero_stage < 3:
        return f"offload {config.offload}: parameters are offloaded at zero_stage 3 only; use offload optimizer"
    return None


def int8_excludes_zero3(case: Case) -> str | None:
    """Source: bitsandbytes' Int8Params keep integer weights, which ZeRO-3 cannot partition and gather as floats."""
    if case.config.precision is Precision.INT8 and case.config.zero_stage == 3:
        return "precision int8: ZeRO-3 cannot shard integer weights; use zero_stage 2, or nf4"
    return None


def quantised_dora_needs_a_gpu(case: Case) -> str | None:
    """Source: peft 0.21.2, utils/integrations.py, `dequantize_module_weight`: on a CPU it moves the weight that DoRA
    looks at. An int8 weight loses its scale by that (bitsandbytes 0.50, nn/modules.py, `Int8Params.to`), and the next
    forward pass fails; a 4-bit one what ZeRO-3 keeps at the parameter, and the backward pass fails."""
    config = case.config
    if not config.dora or case.hardware.device != "cpu":
        return None
    if config.precision is Precision.INT8:
        return "dora: PEFT cannot read int8 weights again and again on a CPU; use precision nf4, or dora false"
    if config.precision is Precision.NF4 and config.zero_stage == 3:
        return "dora: PEFT takes nf4 weights from ZeRO-3 on a CPU; use zero_stage 2, or dora false"
    return None


def quantisation_needs_an_adapter(case: Case) -> str | None:
    """Source: transformers 5.23, trainer.py: purely quantised models cannot be fine-tuned without adapters."""
    if case.config.precision.is_quantized and case.config.trains_all_weights:
        return f"rank full: quantised weights ({case.config.precision}) cannot be trained; use a rank, or {_half(case)}"
    return None


def quantisation_needs_bitsandbytes(case: Case) -> str | None:
    """Source: transformers 5.23, quantizers/quantizer_bnb_4bit.py: bitsandbytes must be installed."""
    if case.config.precision.is_quantized and case.hardware.has_bitsandbytes is False:
        return f"precision {case.config.precision}: bitsandbytes is not installed; {INSTALL_BITSANDBYTES}"
    return None


def eight_bit_adamw_needs_bitsandbytes(case: Case) -> str | None:
    """Source: bitsandbytes 0.50, optim/adamw.py, and backends/cpu/ops.py for CPUs. ZeRO-Offload is documented for
    DeepSpeed's Adam, Adagrad and Lion, whose states are fp32."""
    if case.config.optimizer != "adamw_8bit":
        return None
    if case.hardware.has_bitsandbytes is False:
        return f"optimizer adamw_8bit: bitsandbytes is not installed; {INSTALL_BITSANDBYTES}, or use adamw"
    if case.config.offload != "none":
        return "optimizer adamw_8bit: its states cannot be offloaded; use adamw, or offload none"
    return None


def fp16_autocast_excludes_zero(case: Case) -> str | None:
    """Source: deepspeed 0.19.8, zero/stage_1_and_2.py and stage3.py: `unscale_and_clip_grads` knows the loss scaler and
    not `torch_autocast_gradscaler`, so that gradients are clipped while they are 65,536 times too large; and where a
    step overflows at stage 1 or 2 the scaler never hears of it, and keeps its scale."""
    config = case.config
    # Without fp16 another precision is the only mend, and `fp16_needs_hardware` names it.
    if not case.hardware.has_fp16:
        return None
    if config.precision is Precision.AMP_FP16 and config.engine == "deepspeed" and config.zero_stage:
        others = "amp_bf16 or fp16" if case.hardware.has_bf16 else "fp16"
        return (
            f"precision amp_fp16: DeepSpeed clips its gradients before they are unscaled at zero_stage "
            f"{config.zero_stage}; use zero_stage 0, or precision {others}"
        )
    return None


def packing_needs_positions(case: Case) -> str | None:
    """Source: transformers 5.23, masking_utils.py and modeling_flash_attention_utils.py: packed rows are told apart by
    `position_ids`. Not all models take them (BLOOM), give them to the mask (opt/modeling_opt.py, `create_causal_mask`),
    or pass them on to flash attention (gpt_bigcode/modeling_gpt_bigcode.py, `block`)."""
    family = case.shape.model_type
    if not case.config.packing:
        return None
    if family in WITHOUT_POSITIONS:
        return f"packing: {family} models take no position_ids, by which packed rows are kept apart; use false"
    if case.config.attention == "flash_attention_2":
        if family in FLASH_WITHOUT_POSITIONS:
            return (
                f"packing: in {family} models packed rows see each other under flash_attention_2; use eager, or false"
            )
    elif family in MASK_WITHOUT_POSITIONS:
        return f"packing: in {family} models packed rows see each other; use false"
    return None


def pure_fp16_excludes_plain_ddp(case: Case) -> str | None:
    """Source: torch 2.13, amp/grad_scaler.py: "Attempting to unscale FP16 gradients"."""
    config = case.config
    if config.precision is Precision.FP16 and config.engine == "ddp" and config.trains_all_weights:
        return "precision fp16: torch cannot scale fp16 gradients; use amp_fp16, or engine deepspeed"
    return None


def adapters_only_options(case: Case) -> str | None:
    """Source: peft 0.21.2, tuners/lora/config.py: DoRA and rank stabilisation are properties of an adapter."""
    if case.config.trains_all_weights and (case.config.dora or case.config.rslora):
        return "rank full: there is no adapter for dora or rslora; leave them out, or use a rank"
    return None


def whole_training_leaves_nothing_out(case: Case) -> str | None:
    """Source: training/model.py: of Gemma 3 the part that looks at images is left out, which text never goes through,
    and transformers would fill it with random weights where a model saved without it is loaded."""
    if case.config.trains_all_weights and case.shape.leaves_out_images:
        return "rank full: the model's part for images is not loaded, and could not be saved; use a rank"
    return None


def targets_must_exist(case: Case) -> str | None:
    """Source: peft 0.21.2, tuners/tuners_utils.py, `check_target_module_exists`: a name is the end of a module's path.
    PEFT refuses names of which none matches, training/model.py (`find_target_modules`) each that does not. A mixture's
    experts are no modules (transformers 5.23 stacks them)."""
    return missing_targets(case.config, case.shape)


def missing_targets(config: TrialConfig, shape: ModelShape) -> str | None:
    """Which target modules the model does not have, and which it has."""
    targets, known = config.target_modules, shape.adaptable
    if isinstance(targets, str) or config.trains_all_weights:
        return None
    missing = [name for name in targets if not targeted(shape, (name,))]
    if not missing:
        return None
    name, last = missing[0], missing[0].rpartition(".")[2]
    if last in shape.stacked:
        return f"target_modules: {name} is part of a mixture's experts, which have no names; use all-linear"
    if any(f".{path}".endswith(f".{name}") for path in shape.outside):
        told = "is outside of the model's layers, where no estimate counts an adapter yet"
        return f"target_modules: {name} {told}; leave it out, and name any of {', '.join(known)}"
    told = f"the model has no {cut(', '.join(missing))}{_meant(name, shape)}"
    return f"target_modules: {told}; it has {', '.join(known)}: name those"


def _meant(name: str, shape: ModelShape) -> str:
    last = name.rpartition(".")[2]
    places = [matrix.short_path for matrix in shape.matrices if matrix.name == last and not matrix.is_expert]
    near = places or get_close_matches(last, shape.adaptable, n=1)
    if not near:
        return ""
    numbered = any(part.isdecimal() for part in name.split("."))
    layers = f" layers are numbered from 0 to {shape.layers - 1}" if numbered else ""
    return f" (did you mean {near[0]}?{layers})"


def global_batch_must_divide(case: Case) -> str | None:
    """Source: deepspeed 0.19.8, runtime/config.py, `_batch_assertion`: the global batch is micro-batch × accumulation ×
    workers."""
    config, workers = case.config, case.workers
    micro = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    if config.global_batch_size % (micro * workers):
        return (
            f"global_batch_size {config.global_batch_size} is no multiple of micro_batch_size "
            f"{config.micro_batch_size} × {workers} workers; change one of them"
        )
    return None


def sequence_must_fit_the_model(case: Case) -> str | None:
    """Source: the model's `max_position_embeddings`: positions past it were never trained, and learned ones do not
    exist."""
    longest = case.shape.max_positions
    if case.config.sequence_length > longest:
        return f"sequence_length {case.config.sequence_length}: the model has {longest} positions; lower it"
    return None


# transformers 5.23's classes of decoders that a shape is known of, by what they declare (tests/training/
# test_families.py).
WITHOUT_SDPA = frozenset(
    {
        "bloom",
        "codegen",
        "flint",
        "gemma2",
        "gpt_neo",
        "gpt_oss",
        "gptj",
        "granite_swa",
        "granitemoe_swa",
        "mpt",
        "vaultgemma",
        "xglm",
    }
)
WITHOUT_FLASH_ATTENTION = frozenset({"bloom", "codegen", "doge", "minimax_m3_vl_text", "mpt", "xglm"})
WITHOUT_POSITIONS = frozenset({"bloom", "mpt"})
# They take `position_ids` and keep them from what would tell packed rows apart (tests/training/test_packed_rows.py).
MASK_WITHOUT_POSITIONS = frozenset({"biogpt", "falcon", "gpt_oss", "opt", "xglm"})
FLASH_WITHOUT_POSITIONS = frozenset({"gpt_bigcode", "gpt_neo", "gptj", "persimmon"})
REFUSALS: tuple[Rule, ...] = (
    fp16_needs_hardware,
    bf16_needs_ampere,
    torch_of_pypi_needs_turing,
    flash_attention_needs_ampere,
    attention_must_be_the_models,
    expert_adapters_are_plain,
    offload_needs_zero,
    int8_excludes_zero3,
    quantised_dora_needs_a_gpu,
    quantisation_needs_an_adapter,
    quantisation_needs_bitsandbytes,
    eight_bit_adamw_needs_bitsandbytes,
    fp16_autocast_excludes_zero,
    pure_fp16_excludes_plain_ddp,
    packing_needs_positions,
    adapters_only_options,
    whole_training_leaves_nothing_out,
    targets_must_exist,
    global_batch_must_divide,
    sequence_must_fit_the_model,
)
