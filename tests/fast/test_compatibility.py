"""Every rule refuses its case and lets the nearest neighbour pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning import compatibility
from orchestrator.planning import notes as noting
from orchestrator.planning.compatibility import REFUSALS, Case, missing_targets, refusals
from orchestrator.planning.hardware import Hardware, named_gpu
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.notes import NOTES, notes

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SHAPE = shape_of(LLAMA)
BLOOM = shape_of({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100})
OPT, STARCODER = replace(SHAPE, model_type="opt"), replace(SHAPE, model_type="gpt_bigcode")
GPT_OSS = replace(SHAPE, model_type="gpt_oss")
MIXTRAL = shape_of(LLAMA | {"model_type": "mixtral", "num_local_experts": 8})
GEMMA_3 = shape_of(
    {"model_type": "gemma3", "text_config": LLAMA, "vision_config": {"model_type": "siglip_vision_model"}}
)
WIDE_HEADS = shape_of(LLAMA | {"head_dim": 288})
H100, T4, V100 = named_gpu("H100", 8), named_gpu("T4", 1), named_gpu("V100", 1)
CPU = Hardware("cpu", 0, 4, 1, 2**34, has_bf16=False, has_fp16=False, has_bitsandbytes=True)
BASE: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 16, "zero_stage": 0, "precision": "bf16"}


def case(hardware: Hardware = H100, workers: int = 1, shape: Any = SHAPE, **settings: Any) -> Case:
    return Case(TrialConfig.model_validate(BASE | settings), shape, hardware, workers)


# rule: a refused case, its nearest allowed neighbour
REFUSED: dict[str, tuple[Case, Case]] = {
    "fp16_needs_hardware": (case(CPU, precision="fp16"), case(precision="fp16")),
    "bf16_needs_ampere": (case(T4), case(T4, precision="fp16")),
    "torch_of_pypi_needs_turing": (
        case(replace(V100, torch_knows_volta=False), precision="fp16"),
        # Only named: which torch is there is not known.
        case(V100, precision="fp16"),
    ),
    "flash_attention_needs_ampere": (
        case(T4, attention="flash_attention_2", precision="fp16"),
        case(attention="flash_attention_2"),
    ),
    "attention_must_be_the_models": (case(shape=BLOOM), case(shape=BLOOM, attention="eager")),
    "expert_adapters_are_plain": (
        case(shape=MIXTRAL, target_modules="all-linear", lora_dropout=0.1),
        case(shape=MIXTRAL, lora_dropout=0.1),
    ),
    "offload_needs_zero": (case(zero_stage=1, offload="optimizer"), case(zero_stage=2, offload="optimizer")),
    "int8_excludes_zero3": (case(precision="int8", zero_stage=3), case(precision="int8", zero_stage=2)),
    "quantised_dora_needs_a_gpu": (case(CPU, precision="int8", dora=True), case(precision="int8", dora=True)),
    "quantisation_needs_an_adapter": (case(precision="nf4", rank="full"), case(precision="nf4", rank=8)),
    "quantisation_needs_bitsandbytes": (
        case(replace(H100, has_bitsandbytes=False), precision="nf4"),
        case(replace(H100, has_bitsandbytes=True), precision="nf4"),
    ),
    "eight_bit_adamw_needs_bitsandbytes": (
        case(replace(CPU, has_bitsandbytes=False), precision="fp32", optimizer="adamw_8bit"),
        case(CPU, precision="fp32", optimizer="adamw_8bit"),
    ),
    "fp16_autocast_excludes_zero": (
        case(precision="amp_fp16", zero_stage=1),
        case(precision="amp_fp16", zero_stage=0),
    ),
    "packing_needs_positions": (
        case(shape=BLOOM, attention="eager", packing=True),
        case(shape=BLOOM, attention="eager", packing=False),
    ),
    "pure_fp16_excludes_plain_ddp": (
        case(precision="fp16", engine="ddp", rank="full"),
        case(precision="fp16", engine="ddp", rank=8),
    ),
    "adapters_only_options": (case(rank="full", dora=True), case(rank=8, dora=True)),
    "whole_training_leaves_nothing_out": (case(shape=GEMMA_3, rank="full"), case(shape=GEMMA_3, rank=8)),
    "targets_must_exist": (case(target_modules=("qproj",)), case(target_modules=("q_proj",))),
    "global_batch_must_divide": (case(workers=3), case(workers=4)),
    "sequence_must_fit_the_model": (case(sequence_length=2049), case(sequence_length=2048)),
}
NOTED: dict[str, tuple[Case, Case]] = {
    "counted_as_a_llama": (case(shape=shape_of(LLAMA | {"model_type": "newcomer"})), case()),
    "zero_on_one_worker": (case(zero_stage=2), case(zero_stage=2, workers=2)),
    "emulated_half_precision": (case(CPU), case(CPU, precision="fp32")),
    "quantised_compute_dtype": (case(CPU, precision="nf4"), case(precision="nf4")),
    "warm_up_that_never_ends": (case(warmup_steps=100), case(warmup_steps=99)),
    "experts_stay_unquantised": (case(precision="nf4", shape=MIXTRAL), case(precision="nf4")),
    "quantised_weights_load_whole": (
        case(precision="nf4", zero_stage=3, workers=2),
        case(precision="bf16", zero_stage=3, workers=2),
    ),
    "int8_inputs_escape_checkpointing": (
        case(precision="int8", gradient_checkpointing=True),
        case(precision="nf4", gradient_checkpointing=True),
    ),
    "fp32_grouped_queries_write_scores": (
        case(precision="fp32", shape=replace(SHAPE, kv_heads=SHAPE.heads // 2)),
        case(precision="fp32", shape=replace(SHAPE, kv_heads=SHAPE.heads)),
    ),
    "evaluated_only_at_the_end": (case(eval_every=100), case(eval_every=99)),
    "offload_on_a_cpu": (
        case(CPU, precision="fp32", zero_stage=2, offload="optimizer"),
        case(zero_stage=2, offload="optimizer"),
    ),
    # A model of a billion weights whose state takes 22 bytes of each, and one worker's node of 128 GiB, or of 8.
    "offload_exceeds_the_host": (
        case(replace(H100, host_memory_bytes=2**33), rank="full", zero_stage=2, offload="optimizer"),
        case(H100, rank="full", zero_stage=2, offload="optimizer"),
    ),
    "volta_needs_another_torch": (
        case(V100, precision="fp16"),
        case(replace(V100, torch_knows_volta=True), precision="fp16"),
    ),
    "flash_attention_comes_apart": (
        case(attention="flash_attention_2"),
        case(replace(H100, has_flash_attention=True), attention="flash_attention_2"),
    ),
    "int8_is_slow_before_turing": (case(V100, precision="int8"), case(T4, precision="int8")),
    "adapter_settings_without_an_adapter": (case(rank="full", lora_dropout=0.1), case(rank=8, lora_dropout=0.1)),
}


def test_every_rule_has_its_two_cases() -> None:
    assert {rule.__name__ for rule in REFUSALS} == set(REFUSED)
    assert {rule.__name__ for rule in NOTES} == set(NOTED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_refuses_its_case_alone_and_not_the_neighbour(name: str) -> None:
    refused, allowed = REFUSED[name]
    rule = getattr(compatibility, name)
    assert refusals(refused) == (rule(refused),)
    assert refusals(allowed) == ()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_which_setting_and_what_to_do(name: str) -> None:
    reason = getattr(compatibility, name)(REFUSED[name][0])
    setting = reason.split(":")[0].split()[0]
    assert setting in TrialConfig.model_fields
    assert any(word in reason for word in ("; use", "; raise", "; lower", "; install", "; change", "; leave", ": name"))


@pytest.mark.parametrize("name", NOTED)
def test_a_note_is_told_of_its_case_alone(name: str) -> None:
    told, silent = NOTED[name]
    rule = getattr(noting, name)
    assert rule(told) in notes(told)
    assert rule(silent) is None


@pytest.mark.parametrize(
    ("refused", "allowed"),
    [
        (case(CPU, attention="flash_attention_2", precision="fp32"), case(CPU, attention="sdpa", precision="fp32")),
        (
            case(attention="flash_attention_2", precision="fp32"),
            case(attention="flash_attention_2", precision="amp_bf16"),
        ),
        (case(replace(H100, has_flash_attention=False), attention="flash_attention_2"), case(attention="sdpa")),
        (case(attention="flash_attention_2", shape=WIDE_HEADS), case(attention="sdpa", shape=WIDE_HEADS)),
        (case(offload="optimizer", engine="ddp"), case(engine="ddp")),
        (
            case(offload="optimizer_and_parameters", zero_stage=2),
            case(offload="optimizer_and_parameters", zero_stage=3),
        ),
        (case(optimizer="adamw_8bit", offload="optimizer", zero_stage=2), case(optimizer="adamw_8bit", zero_stage=2)),
        (case(micro_batch_size=3), case(micro_batch_size=4)),
        (case(precision="amp_bf16", hardware=T4), case(precision="amp_fp16", hardware=T4)),
        (case(rank="full", rslora=True), case(rank="full")),
        (case(shape=BLOOM, attention="flash_attention_2"), case(shape=BLOOM, attention="eager")),
        (
            case(CPU, precision="nf4", dora=True, zero_stage=3, workers=2),
            case(CPU, precision="nf4", dora=True, zero_stage=2, workers=2),
        ),
        (case(shape=GPT_OSS, packing=True, attention="eager"), case(shape=GPT_OSS, attention="eager")),
        (case(shape=OPT, packing=True), case(shape=OPT, packing=True, attention="flash_attention_2")),
        (
            case(shape=STARCODER, packing=True, attention="flash_attention_2"),
            case(shape=STARCODER, packing=True, attention="eager"),
        ),
        (
            case(shape=MIXTRAL, target_modules="all-linear", dora=True),
            case(shape=MIXTRAL, target_modules="all-linear"),
        ),
        (
            case(shape=MIXTRAL, target_modules=("q_proj", "experts.w2")),
            case(shape=MIXTRAL, target_modules=("q_proj", "o_proj")),
        ),
    ],
    ids=lambda c: "",
)
def test_a_rule_with_several_reasons_knows_each(refused: Case, allowed: Case) -> None:
    assert refusals(refused)
    assert refusals(allowed) == ()


GEMMA_2 = shape_of(LLAMA | {"model_type": "gemma2", "head_dim": 288})


@pytest.mark.parametrize(
    ("refused", "remedies"),
    [
        (case(CPU, precision="fp16"), [{"precision": "fp32"}]),
        (case(T4, precision="amp_bf16", zero_stage=2), [{"precision": "fp16"}]),
        (case(T4, precision="amp_bf16", engine="ddp"), [{"precision": "amp_fp16"}]),
        (case(T4, rank="full", engine="ddp"), [{"precision": "amp_fp16"}]),
        (case(T4, precision="fp16", shape=GEMMA_2, attention="flash_attention_2"), [{"attention": "eager"}]),
        (
            case(precision="fp32", shape=replace(GEMMA_2, head_dim=256), attention="flash_attention_2"),
            [{"precision": "bf16"}, {"attention": "eager"}],
        ),
        (case(shape=GEMMA_2, attention="flash_attention_2"), [{"attention": "eager"}]),
        (
            case(replace(H100, has_flash_attention=False), shape=GEMMA_2, attention="flash_attention_2"),
            [{"attention": "eager"}],
        ),
        (case(T4, precision="nf4", rank="full"), [{"rank": 8}, {"precision": "fp16"}]),
        (case(CPU, precision="nf4", rank="full"), [{"precision": "fp32"}]),
        (case(T4, precision="amp_fp16", zero_stage=2), [{"zero_stage": 0}, {"precision": "fp16"}]),
    ],
    ids=lambda c: "",
)
def test_a_remedy_is_refused_by_no_other_rule(refused: Case, remedies: list[dict[str, Any]]) -> None:
    (reason,) = refusals(refused)
    told = reason.partition("use ")[2]
    for remedy in remedies:
        (value,) = remedy.values()
        assert value == 8 or str(value) in told.replace(",", "").split()
        remedied = TrialConfig.model_validate(refused.config.model_dump() | remedy)
        assert refusals(replace(refused, config=remedied)) == ()


def test_a_stage_that_nobody_named_is_not_told_to_shard_nothing() -> None:
    by_default = Case(TrialConfig(micro_batch_size=1), SHAPE, H100, 1)
    assert by_default.config.zero_stage == 2
    assert noting.zero_on_one_worker(by_default) is None


def test_missing_target_modules_name_those_that_the_model_has() -> None:
    reason = missing_targets(TrialConfig(target_modules=("q_porj", "k_proj")), SHAPE)
    assert reason is not None
    assert "no q_porj (did you mean q_proj?)" in reason
    assert "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in reason


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mlp.q_proj", "no mlp.q_proj (did you mean self_attn.q_proj?)"),
        ("self_attn.gate_proj", "no self_attn.gate_proj (did you mean mlp.gate_proj?)"),
        ("foo.q_proj", "no foo.q_proj (did you mean self_attn.q_proj?)"),
        ("self_attn.qproj", "no self_attn.qproj (did you mean q_proj?)"),
        (
            "layers.22.self_attn.q_proj",
            "no layers.22.self_attn.q_proj (did you mean self_attn.q_proj? layers are numbered from 0 to 21)",
        ),
    ],
)
def test_a_module_that_is_elsewhere_is_missing_where_it_is_named_even_beside_one_that_is_there(
    name: str, meant: str
) -> None:
    reason = missing_targets(TrialConfig(target_modules=("q_proj", name)), SHAPE)
    assert reason is not None
    assert meant in reason


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_embeddings_and_head_are_refused_as_what_is_not_counted_and_not_as_missing(name: str) -> None:
    reason = missing_targets(TrialConfig(target_modules=("q_proj", name)), SHAPE)
    assert reason is not None
    assert f"{name} is outside of the model's layers, where no estimate counts an adapter yet; leave it out" in reason


def test_experts_that_are_named_are_told_as_what_has_no_names() -> None:
    reason = missing_targets(TrialConfig(target_modules=("w1", "w3", "w2")), MIXTRAL)
    assert reason == "target_modules: w1 is part of a mixture's experts, which have no names; use all-linear"


def test_a_trial_with_several_faults_hears_of_all() -> None:
    assert len(refusals(case(T4, precision="bf16", attention="flash_attention_2", sequence_length=4096))) == 3
