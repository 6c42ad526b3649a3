"""Published parameter counts, and configs that lack or garble a field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import ModelError
from orchestrator.planning.model_families import UNCOUNTED_PARTS
from orchestrator.planning.model_shape import lora_parameters, shape_of, targeted

LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_32_3B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA_2_7B,
    "model_type": "mixtral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}
FALCON_7B: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_32_3B, 3_212_749_824),
        (MIXTRAL, 46_702_792_704),
        (FALCON_7B, 6_921_720_704),
        (GPT2, 124_439_808),
    ],
    ids=["Llama-2-7B", "Llama-3.2-3B", "Mixtral-8x7B", "Falcon-7B", "GPT-2"],
)
def test_the_parameters_are_the_published_ones(config: dict[str, Any], parameters: int) -> None:
    assert shape_of(config).parameters == parameters


@pytest.mark.parametrize(("config", "rank", "count"), [(LLAMA_2_7B, 8, 4_194_304), (LLAMA_32_3B, 32, 9_175_040)])
def test_an_adapter_on_query_and_value_has_the_published_size(config: dict[str, Any], rank: int, count: int) -> None:
    assert lora_parameters(rank, targeted(shape_of(config), ("q_proj", "v_proj"))) == count


def test_a_dotted_name_means_the_namesake_of_its_home() -> None:
    shape = shape_of({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 9})
    assert len(targeted(shape, ("c_proj",))) == 2
    assert [m.is_attention for m in targeted(shape, ("attn.c_proj",))] == [True]
    assert [m.is_attention for m in targeted(shape, ("mlp.c_proj",))] == [False]


def test_the_text_part_of_a_larger_model_is_read() -> None:
    found, alone = shape_of({"model_type": "gemma3", "text_config": LLAMA_2_7B}), shape_of(LLAMA_2_7B)
    # It is the part of a model, and its modules' paths say so.
    assert replace(found, matrices=alone.matrices, outside=alone.outside) == alone
    in_part = ("model.language_model.layers.3.self_attn.q_proj",)
    assert [m.layers for m in targeted(found, in_part)] == [(3,)]
    assert targeted(alone, in_part) == ()
    assert targeted(found, ("model.layers.3.self_attn.q_proj",)) == ()


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (("layers.0.self_attn.q_proj",), 1),
        (("layers.0.self_attn.q_proj", "3.self_attn.q_proj"), 2),
        (("layers.0.self_attn.q_proj", "q_proj"), 32),
        (("model.layers.31.self_attn.q_proj",), 1),
        (("layers.32.self_attn.q_proj",), 0),
        (("layers.00.self_attn.q_proj",), 0),
        (("base_model.model.layers.0.self_attn.q_proj",), 0),
        (("attn.q_proj",), 0),
        (("mlp.q_proj",), 0),
        (("*.self_attn.q_proj",), 0),
        (("_proj",), 0),
        (("",), 0),
    ],
)
def test_a_name_means_the_matrices_whose_path_ends_in_it(names: tuple[str, ...], layers: int) -> None:
    assert sum(matrix.count for matrix in targeted(shape_of(LLAMA_2_7B), names)) == layers


def test_only_gemma_3_is_counted_without_its_part_for_images() -> None:
    """Training leaves that out; of others nobody knows what is loaded."""
    whole = {"text_config": LLAMA_2_7B, "vision_config": {"hidden_size": 1152}}
    found = shape_of({"model_type": "gemma3", **whole})
    assert found.parameters == shape_of(LLAMA_2_7B).parameters
    assert found.leaves_out_images
    assert not shape_of(LLAMA_2_7B).leaves_out_images
    with pytest.raises(ModelError, match="has a part that looks at images, which no estimate counts"):
        shape_of({"model_type": "mistral3", **whole})
    with pytest.raises(ModelError, match="has a part that hears"):
        shape_of({"model_type": "gemma3", "audio_config": {"hidden_size": 8}, **whole})


def test_an_unknown_family_with_llamas_fields_is_read_as_llama() -> None:
    assert shape_of(LLAMA_2_7B | {"model_type": "newcomer"}).parameters == 6_738_415_616


@pytest.mark.parametrize("part", UNCOUNTED_PARTS)
def test_a_model_with_weights_that_nobody_counts_is_refused_and_not_read_as_llama(part: str) -> None:
    with pytest.raises(ModelError, match=r"deepseek_v3 has .* no estimate counts"):
        shape_of(LLAMA_2_7B | {"model_type": "deepseek_v3", part: 8})
    assert shape_of(LLAMA_2_7B | {part: None}).parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("told", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "by bitsandbytes"), ("fp8", "fp8")],
)
def test_a_model_that_is_quantised_already_is_refused_whatever_the_precision(told: object, method: str) -> None:
    with pytest.raises(ModelError, match=rf"already quantised \({method}\): name the unquantised model"):
        shape_of(LLAMA_2_7B | {"quantization_config": told})
    with pytest.raises(ModelError, match="already quantised"):
        shape_of({"model_type": "gemma3", "text_config": LLAMA_2_7B, "quantization_config": told})
    assert shape_of(LLAMA_2_7B | {"quantization_config": None}) == shape_of(LLAMA_2_7B)


@pytest.mark.parametrize("value", ["false", 2, []])
def test_embeddings_are_tied_or_not(value: object) -> None:
    with pytest.raises(ModelError, match="`tie_word_embeddings`: it must be true or false"):
        shape_of(LLAMA_2_7B | {"tie_word_embeddings": value})


@pytest.mark.parametrize("field", sorted(set(LLAMA_2_7B) - {"model_type"}))
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ModelError, match=f"`{field}`"):
        shape_of({name: value for name, value in LLAMA_2_7B.items() if name != field})


@pytest.mark.parametrize("value", [-1, 1.5, "4096", True, 10**30, [1]])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_an_absurd_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"`{field}`"):
        shape_of(LLAMA_2_7B | {field: value})


def test_a_mixture_all_of_whose_layers_are_dense_has_no_experts() -> None:
    mixture = LLAMA_2_7B | {"model_type": "qwen2_moe", "num_experts": 4, "decoder_sparse_step": 64}
    found = shape_of(mixture)
    assert found.parameters == shape_of(LLAMA_2_7B | {"model_type": "qwen2"}).parameters
    assert (found.experts, found.shared_intermediate) == (0, 0)


def test_a_family_that_names_experts_without_having_any_is_no_mixture() -> None:
    """Doge's config has `num_experts` 16,384 where `is_moe` is false."""
    doge = LLAMA_2_7B | {"model_type": "doge", "num_experts": 16_384, "num_experts_per_tok": 64, "is_moe": False}
    assert shape_of(doge).parameters == shape_of(LLAMA_2_7B).parameters
    with pytest.raises(ModelError, match="doge has experts of another kind"):
        shape_of(doge | {"is_moe": True})


@pytest.mark.parametrize(
    ("config", "hidden", "intermediate"),
    [
        (
            {"model_type": "gpt_neo", "hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": None},
            768,
            3072,
        ),
        ({"model_type": "codegen", "n_embd": 1024, "n_layer": 20, "n_head": 16, "n_inner": None}, 1024, 4096),
        ({"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 3}, 4096, 12_288),
    ],
    ids=["GPT-Neo", "CodeGen", "MPT"],
)
def test_a_width_that_transformers_leaves_null_is_the_classs_own(
    config: dict[str, Any], hidden: int, intermediate: int
) -> None:
    shape = shape_of({"vocab_size": 50_257, **config})
    assert (shape.hidden, shape.intermediate) == (hidden, intermediate)


def test_a_family_that_no_field_tells_of_is_refused_by_its_type_and_also_as_a_part() -> None:
    with pytest.raises(ModelError, match="jetmoe has experts in its attention, which no estimate counts"):
        shape_of(LLAMA_2_7B | {"model_type": "jetmoe"})
    with pytest.raises(ModelError, match="has a part that looks at images"):
        shape_of({"model_type": "fuyu", "text_config": LLAMA_2_7B})


def test_layers_of_another_kind_than_attention_are_refused() -> None:
    kinds = {"layer_types": ["full_attention", "linear_attention"] * 16}
    with pytest.raises(ModelError, match="minimax has layers of linear_attention, which no estimate counts"):
        shape_of(LLAMA_2_7B | {"model_type": "minimax"} | kinds)
    assert shape_of(LLAMA_2_7B | {"layer_types": ["full_attention", "sliding_attention"] * 16})


def test_who_lacks_a_field_of_an_unknown_family_may_take_another_model() -> None:
    config = {"model_type": "blt", "vocab_size": 100}
    with pytest.raises(
        ModelError, match=r"no usable `hidden_size`.* or another model, since its family, blt, is not kn"
    ):
        shape_of(config)
    with pytest.raises(ModelError, match=r"`hidden_size` \(it is None\): use a config.json that transformers writes$"):
        shape_of(config | {"model_type": "llama"})


@pytest.mark.parametrize("told", [["llama"], 5, {"a": 1}, True])
def test_a_model_type_that_is_no_text_is_refused(told: object) -> None:
    with pytest.raises(ModelError, match="`model_type`: it must be a text"):
        shape_of(LLAMA_2_7B | {"model_type": told})
    with pytest.raises(ModelError, match="`model_type`: it must be a text"):
        shape_of({"model_type": told, "text_config": LLAMA_2_7B})


def test_a_token_goes_to_no_more_experts_than_there_are() -> None:
    mixture = LLAMA_2_7B | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 768}
    assert shape_of(mixture | {"num_experts_per_tok": 8}).experts_per_token == 8
    with pytest.raises(ModelError, match="9 as `num_experts_per_tok` of 8 experts: correct one of them"):
        shape_of(mixture | {"num_experts_per_tok": 9})


def test_heads_of_no_width_are_refused() -> None:
    with pytest.raises(ModelError, match="0 as `head_dim`"):
        shape_of(LLAMA_2_7B | {"head_dim": 0})
    with pytest.raises(ModelError, match="no `head_dim`, and 4097 is no multiple of 32 heads"):
        shape_of(LLAMA_2_7B | {"head_dim": None, "hidden_size": 4097})


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_model_far_larger_than_any_is_refused_with_the_number_that_makes_it_so(field: str) -> None:
    with pytest.raises(ModelError, match=rf"e\+\d\d weights: correct its `{field}`"):
        shape_of(LLAMA_2_7B | {field: 2**31 - 32})


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads"])
def test_numbers_that_contradict_each_other_are_refused(field: str) -> None:
    with pytest.raises(ModelError, match=field):
        shape_of(LLAMA_2_7B | {field: 100_003})
