"""Whatever the model and the settings: less work never looks like more memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.activations import writes_scores
from orchestrator.planning.compatibility import Case, expert_adapters_are_plain, int8_excludes_zero3
from orchestrator.planning.hardware import named_gpu
from orchestrator.planning.memory import MemoryEstimate, _bytes_of, estimate
from orchestrator.planning.model_shape import ModelShape, shape_of
from tests.fast.cases import LLAMA_2_7B, LLAMA_32_3B

H100 = named_gpu("H100", 64)
LONG = {"max_position_embeddings": 2**20}
MODELS = {
    "llama-2-7b": shape_of(LLAMA_2_7B | LONG),
    "llama-3.2-3b": shape_of(LLAMA_32_3B | LONG),
    "llama-2-70b": shape_of(
        LLAMA_2_7B
        | LONG
        | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
        | {"intermediate_size": 28672}
    ),
    "mistral": shape_of(
        LLAMA_2_7B | LONG | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2.5-0.5b": shape_of(
        LONG
        | {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}
    ),
    "gemma-2-9b": shape_of(
        LONG
        | {"model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 256000, "sliding_window": 4096}
    ),
    "gpt2": shape_of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257} | LONG),
    "gpt-neox-20b": shape_of(
        LONG
        | {"model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64}
        | {"intermediate_size": 24576, "vocab_size": 50432}
    ),
    "mixtral": shape_of(LLAMA_2_7B | LONG | {"model_type": "mixtral", "num_key_value_heads": 8}),
    "qwen3-30b-a3b": shape_of(
        LONG
        | {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "vocab_size": 151936}
    ),
}
RANKS = (1, 8, 64, 256, 1024, "full")
LENGTHS = (256, 1024, 2047, 4096, 8192, 32768)
MICRO_BATCHES = (1, 2, 4, 16, 64)
WORKERS = (64, 16, 8, 3, 2, 1)
KERNELS = ("flash_attention_2", "sdpa", "eager")
OFFLOADS = ("optimizer_and_parameters", "optimizer", "none")
"""Each of these from what takes least to what takes most."""

trials = st.fixed_dictionaries(
    {
        "rank": st.sampled_from(RANKS),
        "sequence_length": st.sampled_from(LENGTHS),
        "micro_batch_size": st.sampled_from(MICRO_BATCHES),
        "attention": st.sampled_from(KERNELS),
        "offload": st.sampled_from(OFFLOADS),
        "gradient_checkpointing": st.booleans(),
        "precision": st.sampled_from(list(Precision)),
        "target_modules": st.sampled_from(["attention", "all-linear"]),
        "engine": st.sampled_from(["deepspeed", "ddp"]),
        "zero_stage": st.sampled_from([0, 1, 2, 3]),
        "optimizer": st.sampled_from(["adamw", "adamw_8bit", "sgd"]),
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "packing": st.booleans(),
    }
)


def may_be(config: TrialConfig, shape: ModelShape) -> bool:
    """Whether it is a trial at all: what is refused has no order."""
    if config.precision.is_quantized and config.trains_all_weights:
        return False
    if config.offload == "optimizer_and_parameters" and config.zero_stage < 3:
        return False
    if config.offload == "optimizer" and config.zero_stage < 2:
        return False
    case = Case(config, shape, H100, 1)
    return not (int8_excludes_zero3(case) or expert_adapters_are_plain(case))


def after(values: tuple[Any, ...], value: Any) -> Any:
    """The next that takes more, or the same where it is the last."""
    return values[min(values.index(value) + 1, len(values) - 1)]


def dearer(config: TrialConfig, shape: ModelShape, workers: int) -> Iterator[tuple[TrialConfig, int]]:
    """The neighbours that do at least as much on each GPU; a rank is compared with a rank, since `full` has none."""
    changes: list[dict[str, Any]] = [
        {"sequence_length": after(LENGTHS, config.sequence_length)},
        {"micro_batch_size": after(MICRO_BATCHES, config.micro_batch_size)},
        {"gradient_checkpointing": False},
        {"optimizer": "adamw"},
        {"offload": after(OFFLOADS, config.offload)},
    ]
    if not config.trains_all_weights:
        rank = after(RANKS[:-1], config.rank)
        changes += [{"rank": rank}, {"target_modules": "all-linear"}, {"lora_dropout": 0.1}]
    kernel = after(KERNELS, config.attention)
    # Where it writes scores out, sdpa makes fp32 copies that eager attention has no use for.
    if not (kernel == "eager" and writes_scores(config, shape, _bytes_of(config, "cuda", has_bf16=True))):
        changes.append({"attention": kernel})
    yield from ((config.model_copy(update=change), workers) for change in changes)
    if config.zero_stage:
        yield config, after(WORKERS, workers)


def figures(memory: MemoryEstimate) -> tuple[int | None, ...]:
    needed = memory.needed_bytes
    return (
        memory.allocated_bytes,
        memory.reserved_bytes,
        memory.device_bytes,
        memory.low_bytes,
        memory.high_bytes,
        needed,
    )


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(MODELS)), trials, st.sampled_from(WORKERS))
def test_what_does_more_never_takes_less(model: str, trial: dict[str, Any], workers: int) -> None:
    config, shape = TrialConfig.model_validate(trial | {"global_batch_size": 2**18}), MODELS[model]
    if not may_be(config, shape):
        return
    least = figures(estimate(config, shape, workers, "cuda", has_bf16=True))
    for other, others_workers in dearer(config, shape, workers):
        if may_be(other, shape):
            most = figures(estimate(other, shape, others_workers, "cuda", has_bf16=True))
            # To the byte: every part is cut down to a whole number.
            told = f"{other} on {others_workers}"
            assert all(a <= b + 8 for a, b in zip(least, most, strict=True) if a and b), told


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MODELS)), trials, st.sampled_from(WORKERS))
def test_of_what_is_not_quantised_a_bare_loop_takes_no_less_than_this_packages(
    model: str, trial: dict[str, Any], workers: int
) -> None:
    config, shape = TrialConfig.model_validate(trial | {"global_batch_size": 2**18}), MODELS[model]
    if config.precision.is_quantized or not may_be(config, shape):
        return
    own, bare = (
        figures(estimate(config, shape, workers, "cuda", has_bf16=True, loop=loop)) for loop in ("trainer", "bare")
    )
    assert all(a <= b + 8 for a, b in zip(own, bare, strict=True) if a and b)
