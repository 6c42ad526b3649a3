"""What the rules allow the libraries' own checks accept, and what they refuse of a model those refuse too."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import Case, attention_must_be_the_models, expert_adapters_are_plain, refusals
from orchestrator.planning.model_shape import shape_of
from orchestrator.training.deepspeed_config import HalfPrecision, compute_dtype, deepspeed_config
from orchestrator.training.model import find_target_modules
from tests.compatibility_page import MACHINES, case_of

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "olmo2"), SMALL),
    "phi3": SMALL | {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "mixtral": SMALL | {"num_local_experts": 4},
    "qwen3_moe": SMALL | EXPERTS,
    "qwen2_moe": SMALL | EXPERTS | {"shared_expert_intermediate_size": 128},
}
MACHINE = MACHINES["CPU with bf16 and fp16"]


def case(family: str, **settings: Any) -> Case:
    shape = shape_of(AutoConfig.for_model(family, **FAMILIES[family]).to_dict())
    return Case(TrialConfig.model_validate(settings), shape, MACHINE, 1)


def built(family: str, attention: str) -> torch.nn.Module:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_kernels_that_are_allowed_and_no_others(family: str, attention: str) -> None:
    if attention_must_be_the_models(case(family, attention=attention)):
        with pytest.raises(ValueError, match="does not support"):
            built(family, attention)
    else:
        assert built(family, attention).config._attn_implementation == attention


# PEFT says so of a fused gate and up, whose rank it doubles all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_takes_the_adapters_that_are_allowed_and_no_others(family: str, targets: Any) -> None:
    for dora, rslora, dropout in itertools.product((False, True), (False, True), (0.0, 0.1)):
        settings = {"dora": dora, "rslora": rslora, "lora_dropout": dropout, "target_modules": targets}
        model = built(family, "eager")
        lora = LoraConfig(
            r=4,
            lora_dropout=dropout,
            use_dora=dora,
            use_rslora=rslora,
            target_modules=find_target_modules(model, targets),
            task_type="CAUSAL_LM",
        )
        if expert_adapters_are_plain(case(family, **settings)):
            with pytest.raises(ValueError, match="does not work with"):
                get_peft_model(model, lora)
        else:
            assert get_peft_model(model, lora).get_nb_trainable_parameters()[0]


def test_peft_really_loses_the_scale_of_an_int8_weight_on_a_cpu() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer.to("cpu").requires_grad_(False)
    layer(torch.randn(2, 64))
    dequantize_module_weight(layer)
    assert layer.weight.SCB is None, "PEFT keeps it now: drop quantised_dora_needs_a_gpu"


def test_peft_really_makes_another_parameter_of_a_4_bit_weight_on_a_cpu() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    sharded = layer.weight
    dequantize_module_weight(layer)
    assert layer.weight is not sharded, "PEFT leaves it alone now: quantised_dora_needs_a_gpu is for int8 only"


def test_deepspeed_takes_every_configuration_that_is_allowed() -> None:
    taken = 0
    product = itertools.product(
        Precision, range(4), ("none", "optimizer", "optimizer_and_parameters"), ("adamw", "adamw_8bit", "sgd")
    )
    for precision, stage, offload, optimizer in product:
        settings = {"precision": precision, "zero_stage": stage, "offload": offload, "optimizer": optimizer}
        one = case_of(MACHINE, **settings)
        if refusals(one):
            continue
        dtype = compute_dtype(precision, HalfPrecision(bf16=True, fp16=True))
        # Of one worker, since DeepSpeed asks the process group for more, and here is none.
        accepted = DeepSpeedConfig(deepspeed_config(one.config, 1, dtype, on_gpu=False))
        assert accepted.zero_config.stage == stage
        assert bool(accepted.zero_config.offload_optimizer) is (offload != "none")
        taken += 1
    assert taken > 100
