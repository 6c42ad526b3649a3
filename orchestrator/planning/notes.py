"""What a user should know of a trial that runs all the same: one pure function a note."""

from __future__ import annotations

from orchestrator.config.trial_config import Precision
from orchestrator.planning.compatibility import TORCH_FOR_VOLTA, Case, Rule
from orchestrator.planning.hardware import GIB
from orchestrator.planning.memory import host_bytes_on, loading_bytes_on
from orchestrator.planning.model_families import is_known


def notes(case: Case) -> tuple[str, ...]:
    """Every note on this trial."""
    return tuple(note for rule in NOTES if (note := rule(case)))


def zero_on_one_worker(case: Case) -> str | None:
    """Allowed, since a space may cross stages with workers; not told of a default, which nobody asked for."""
    is_named = "zero_stage" in case.config.model_fields_set
    if is_named and case.workers == 1 and case.config.zero_stage and case.config.offload == "none":
        return f"zero_stage {case.config.zero_stage} with one worker shards nothing"
    return None


def emulated_half_precision(case: Case) -> str | None:
    """Measured: a bf16 product without bf16 instructions takes 4 times as long as in fp32, a QLoRA step 18 times."""
    half = case.config.precision in (Precision.BF16, Precision.AMP_BF16)
    if half and case.hardware.device == "cpu" and not case.hardware.has_bf16:
        return f"precision {case.config.precision} is emulated on this CPU and slow; fp32 or nf4 are faster here"
    return None


def quantised_compute_dtype(case: Case) -> str | None:
    """The compute dtype follows the machine, so results of two machines differ."""
    if not case.config.precision.is_quantized or case.hardware.has_bf16:
        return None
    dtype = "fp16" if case.hardware.has_fp16 else "fp32"
    return f"precision {case.config.precision} computes in {dtype}, since this device lacks bf16"


def warm_up_that_never_ends(case: Case) -> str | None:
    """The learning rate never reaches what the file says."""
    if case.config.warmup_steps >= case.config.max_steps:
        return f"warmup_steps {case.config.warmup_steps} is not below max_steps {case.config.max_steps}"
    return None


def experts_stay_unquantised(case: Case) -> str | None:
    """Source: transformers 5.23, integrations/bitsandbytes.py, which replaces linear layers; experts are stacked; peft
    0.21.2, utils/other.py, `prepare_model_for_kbit_training`, which makes fp32 of what is not quantised."""
    if not case.config.precision.is_quantized or not case.shape.experts:
        return None
    share = case.shape.quantisable_parameters / case.shape.parameters
    return (
        f"precision {case.config.precision} quantises {share:.0%} of this model: transformers 5 stacks a mixture's "
        "experts, which bitsandbytes leaves as they are and PEFT makes fp32 as they load"
    )


def quantised_weights_load_whole(case: Case) -> str | None:
    """Source: transformers 5.23, modeling_utils.py: quantised models skip zero.Init."""
    config = case.config
    if not config.precision.is_quantized or config.zero_stage < 3 or case.workers == 1:
        return None
    loading = loading_bytes_on(config, case.shape, case.workers, case.hardware)
    return (
        f"precision {config.precision} under ZeRO-3: every worker holds the whole quantised model while it loads, and "
        f"must have {loading / GIB:.1f} GiB for it; the estimate counts the shard that stays"
    )


def int8_inputs_escape_checkpointing(case: Case) -> str | None:
    """Source: bitsandbytes 0.50, autograd/_functions.py, MatMul8bitLt: `ctx.tensors` holds the input as an attribute.

    torch's non-reentrant checkpointing drops only what went through `save_for_backward` (tests/training/
    test_memory_peak.py shows it).
    """
    if case.config.precision is Precision.INT8 and case.config.gradient_checkpointing:
        return (
            "gradient_checkpointing spares less under precision int8, which keeps every product's input, than under nf4"
        )
    return None


def fp32_grouped_queries_write_scores(case: Case) -> str | None:
    """Source: torch, sdp_utils.cpp: flash takes no fp32, the memory-efficient kernel no grouped queries.

    Measured with torch 2.6 (benchmarks/data, the run without checkpointing); not looked at on a GPU with 2.13. On GPUs
    before Ampere training repeats keys and values (training/model.py, `attend_without_grouped_queries`).
    """
    if case.config.precision is not Precision.FP32 or case.config.attention != "sdpa":
        return None
    if case.hardware.device == "cpu" or not case.hardware.has_bf16 or case.shape.kv_heads == case.shape.heads:
        return None
    return (
        "precision fp32 with attention sdpa: no fast kernel takes grouped queries, so memory grows with the square of "
        "sequence_length; amp_bf16 and bf16 have one"
    )


def evaluated_only_at_the_end(case: Case) -> str | None:
    """A scheduler can stop only what it has heard of."""
    config = case.config
    if config.eval_every >= config.max_steps > 1:
        return f"eval_every {config.eval_every} is not below max_steps {config.max_steps}: evaluated once, at its end"
    return None


def offload_on_a_cpu(case: Case) -> str | None:
    """What would go to the host's memory is there already."""
    if case.config.offload != "none" and case.hardware.device == "cpu":
        return f"offload {case.config.offload} on a CPU spares nothing: what it moves is in the same memory"
    return None


def offload_exceeds_the_host(case: Case) -> str | None:
    """Told and not refused, since the memory of a node with a GPU that is only named is assumed. Of this trial alone:
    others beside it take as much again."""
    config, hardware = case.config, case.hardware
    if config.offload == "none" or hardware.device == "cpu":
        return None
    together, taken = _workers_of_a_node(case), host_bytes_a_node(case)
    if taken <= hardware.host_memory_bytes:
        return None
    return (
        f"offload {config.offload} keeps at least {taken / GIB:,.0f} GiB in the host memory of a node with {together} "
        f"of its workers, and a node is taken to have {hardware.host_memory_bytes / GIB:,.0f} GiB: more workers on "
        "more nodes hold less each"
    )


def _workers_of_a_node(case: Case) -> int:
    return min(case.workers, max(gpus for _, gpus in case.hardware.each_node))


def host_bytes_a_node(case: Case) -> int:
    """Host memory that the trial's offloaded state takes of a node, which has as many of its workers as it can."""
    return _workers_of_a_node(case) * host_bytes_on(case.config, case.shape, case.workers, case.hardware)


def volta_needs_another_torch(case: Case) -> str | None:
    """Told and not refused where the torch there is not known; see `torch_of_pypi_needs_turing`."""
    if case.hardware.is_before_turing and case.hardware.torch_knows_volta is None:
        return f"{case.hardware.gpu_name} needs {TORCH_FOR_VOLTA}: that of PyPI, for CUDA 13, has no kernels for it"
    return None


def flash_attention_comes_apart(case: Case) -> str | None:
    """Told and not refused where nobody has looked; see `flash_attention_needs_ampere`."""
    if case.config.attention == "flash_attention_2" and case.hardware.has_flash_attention is None:
        return (
            "attention flash_attention_2 needs flash-attn on every node, which comes apart: "
            "pip install --no-build-isolation flash-attn"
        )
    return None


def int8_is_slow_before_turing(case: Case) -> str | None:
    """Source: bitsandbytes 0.50, diagnostics/cuda.py: "Only slow 8-bit matmul is supported" below 7.5."""
    capability = case.hardware.compute_capability
    if case.config.precision is Precision.INT8 and capability and capability < (7, 5):
        return f"precision int8: {case.hardware.gpu_name} has only a slow 8-bit product; nf4 is faster there"
    return None


def adapter_settings_without_an_adapter(case: Case) -> str | None:
    """Allowed, since a space may cross ranks with `full`."""
    config = case.config
    ignored = [name for name, used in (("lora_dropout", config.lora_dropout), ("alpha", config.alpha != "2x")) if used]
    if config.trains_all_weights and ignored:
        return f"{' and '.join(ignored)}: without effect where rank is full, which has no adapter"
    return None


def counted_as_a_llama(case: Case) -> str | None:
    """Allowed, since most new families are built so; of those that are not, the fields that are known are refused."""
    if is_known(case.shape.model_type):
        return None
    family = case.shape.model_type or "which its config does not name"
    return f"the model's family, {family}, is not known here and counted as a Llama: memory and time may be far off"


NOTES: tuple[Rule, ...] = (
    counted_as_a_llama,
    zero_on_one_worker,
    emulated_half_precision,
    quantised_compute_dtype,
    warm_up_that_never_ends,
    experts_stay_unquantised,
    quantised_weights_load_whole,
    int8_inputs_escape_checkpointing,
    fp32_grouped_queries_write_scores,
    evaluated_only_at_the_end,
    offload_on_a_cpu,
    offload_exceeds_the_host,
    volta_needs_another_torch,
    flash_attention_comes_apart,
    int8_is_slow_before_turing,
    adapter_settings_without_an_adapter,
)
