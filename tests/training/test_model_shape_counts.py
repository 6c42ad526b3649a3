"""Every known family's parameters, adapters and target names equal those of the model that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, PretrainedConfig

from orchestrator.planning.model_shape import lora_parameters, shape_of, targeted

LLAMA: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {name: LLAMA[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, **TOKENS}
FALCON = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, **TOKENS}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GPT_NEO = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global"], 2]],
    **TOKENS,
}
XGLM = {"vocab_size": 1000, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 176, **TOKENS}
QWEN_MOE = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", LLAMA),
    "Llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "Llama, biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "Llama, wide heads": ("Llama", LLAMA | {"head_dim": 32}),
    "Mistral": ("Mistral", LLAMA),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", LLAMA | {"head_dim": 32}),
    "Gemma": ("Gemma", LLAMA),
    "Gemma 2": ("Gemma2", LLAMA),
    "Gemma 3": ("Gemma3Text", LLAMA),
    "Phi": ("Phi", LLAMA),
    "Phi-3": ("Phi3", LLAMA),
    "GPT-2": ("GPT2", GPT2),
    "GPT-NeoX": ("GPTNeoX", NEOX),
    "GPT-J": ("GPTJ", GPT2 | {"rotary_dim": 8}),
    "StarCoder": ("GPTBigCode", GPT2),
    "StarCoder 2": ("Starcoder2", LLAMA),
    "Falcon, one key head": ("Falcon", FALCON),
    "Falcon, serial": ("Falcon", FALCON | {"parallel_attn": False, "multi_query": False, "bias": True}),
    "Falcon, new": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "StableLM": ("StableLm", LLAMA),
    "StableLM, biases": ("StableLm", LLAMA | {"use_qkv_bias": True}),
    "Mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 80}),
    "Qwen2-MoE, dense layers": ("Qwen2Moe", QWEN_MOE | {"decoder_sparse_step": 2}),
    "Qwen2-MoE, dense alone": ("Qwen2Moe", QWEN_MOE | {"decoder_sparse_step": 4}),
    "Qwen3-MoE": ("Qwen3Moe", QWEN_MOE),
    "OLMo": ("Olmo", LLAMA),
    "OLMo 2": ("Olmo2", LLAMA),
    "OLMoE": ("Olmoe", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": ("Cohere", LLAMA),
    "Granite": ("Granite", LLAMA),
    "SmolLM3": ("SmolLM3", LLAMA),
    "GLM": ("Glm", LLAMA),
    "GLM-4": ("Glm4", LLAMA),
    "OPT": ("OPT", {**FALCON, "ffn_dim": 176, "word_embed_proj_dim": 64}),
    "Arcee": ("Arcee", LLAMA),
    "Apertus": ("Apertus", LLAMA),
    "Jais 2": ("Jais2", LLAMA),
    "Nemotron": ("Nemotron", LLAMA | {"head_dim": 16}),
    "nanochat": ("NanoChat", LLAMA),
    "CodeGen": ("CodeGen", GPT2 | {"rotary_dim": 8}),
    "GPT-Neo": ("GPTNeo", GPT_NEO),
    "MPT": ("Mpt", {"vocab_size": 1000, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "XGLM": ("XGLM", XGLM),
    "BioGPT": ("BioGpt", NEOX),
    "Persimmon": ("Persimmon", NEOX),
    "BLOOM": ("Bloom", {"vocab_size": 1000, "hidden_size": 64, "n_layer": 3, "n_head": 4, **TOKENS}),
}


def config_of(name: str) -> PretrainedConfig:
    kind, settings = FAMILIES[name]
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(**settings)
    return config


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config_of(name))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameters_are_those_of_the_model(name: str) -> None:
    assert shape_of(config_of(name).to_dict()).parameters == sum(p.numel() for p in build(name).parameters())


# PEFT warns that the rank of fused experts matches none of its modules, and applies it all the same.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_all_linear_layers_is_as_large_as_pefts(name: str) -> None:
    shape = shape_of(config_of(name).to_dict())
    model: Any = build(name)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(4, targeted(shape, "all-linear")) == trainable


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_attention_is_as_large_as_ours(name: str) -> None:
    from orchestrator.training.model import find_target_modules

    shape = shape_of(config_of(name).to_dict())
    model: Any = build(name)
    names = find_target_modules(model, "attention")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(4, targeted(shape, "attention")) == trainable
    assert lora_parameters(4, targeted(shape, tuple(names))) == trainable


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_of_any_length_means_as_many_modules_as_pefts_own_rule_finds(name: str) -> None:
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    shape = shape_of(config_of(name).to_dict())
    paths = [path for path, module in build(name).named_modules() if isinstance(module, linear)]
    inside = [path for path in paths if path not in shape.outside and path.rpartition(".")[2] not in shape.stacked]
    ends = {".".join(path.split(".")[-parts:]) for path in inside for parts in range(1, 8)}
    swapped = {f"{home}.{path.rpartition('.')[2]}" for path in inside for home in ("mlp", "self_attn", "experts")}
    for end in ends | swapped:
        found = [path for path in inside if check_target_module_exists(LoraConfig(target_modules=[end]), path)]
        assert sum(matrix.count for matrix in targeted(shape, (end,))) == len(found), end


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_outside_of_the_layers_is_known_by_its_path(name: str) -> None:
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    paths = [path for path, module in build(name).named_modules() if isinstance(module, kinds)]
    outside = {path for path in paths if not any(part.isdecimal() for part in path.split("."))}
    assert set(shape_of(config_of(name).to_dict()).outside) == outside


def test_an_adapter_on_one_layer_is_as_large_as_pefts() -> None:
    names = ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.2.mlp.up_proj"]
    adapted = get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(4, targeted(shape_of(config_of("Llama").to_dict()), names)) == trainable


@pytest.mark.parametrize("name", FAMILIES)
def test_the_modules_that_can_be_named_are_those_of_the_model(name: str) -> None:
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {full.rpartition(".")[2] for full, module in build(name).named_modules() if isinstance(module, linear)}
    shape = shape_of(config_of(name).to_dict())
    assert set(shape.adaptable) == names - shape.stacked - {path.rpartition(".")[2] for path in shape.outside}
