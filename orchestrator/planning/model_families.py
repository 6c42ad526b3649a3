"""How each family of models builds its layers: what a transformers config leaves to the class that reads it.

`test_model_shape_counts` compares the parameters of every family here with those of the model that transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Family:
    """How a model type builds its layers; a text names the config's field that decides."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Query, key, value and output, or the fused first three and the output."""
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down; two names are the fused first two and down, or up and down where nothing is gated."""
    layers: str = "model.layers"
    """The path of its layers, in whose modules `attention_home` and `mlp_home` the matrices are."""
    attention_home: str = "self_attn"
    mlp_home: str = "mlp"
    outside: tuple[str, ...] = ("model.embed_tokens", "lm_head")
    """Paths of embeddings and head."""
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """What PEFT calls their gate, up and down (peft 0.21.2, utils/transformers_weight_conversion.py)."""
    expert_adapters: bool = True
    gated: bool = True
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    norms: int = 2
    norm_width: Literal[0, 1, 2] = 1
    """Vectors a norm: 0 none, 1 a weight, 2 a weight and a bias."""
    layer_norm: bool = False
    qk_norm: Literal["head", "all"] | None = None
    extra_norms: int = 1
    """Outside the layers."""
    activation_weights: int = 0
    """Of each layer's activation."""
    rotary: bool = True
    tied: bool = False
    full_attention_every: int | None = None
    """Of so many layers one looks back all the way, where there is a sliding window; None: no such pattern."""
    positions_offset: int | None = None
    """Rows of a learned position table beyond `max_position_embeddings`; None: there is no table."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' config class fills in where a config.json leaves it out."""


_GEMMA: Mapping[str, Any] = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
_LLAMA_BIAS: Mapping[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_BIASED: Mapping[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_NO_WINDOW: Mapping[str, Any] = {"use_sliding_window": False}
_UNGATED: Mapping[str, Any] = {"gated": False, "norm_width": 2, "layer_norm": True}
"""GPT-2's way, before Llama's: two matrices in the feed-forward part, norms with a bias."""
_TRANSFORMER: Mapping[str, Any] = {"layers": "transformer.h", "attention_home": "attn"}
_SELF_ATTENTION: Mapping[str, Any] = {
    "layers": "transformer.h",
    "attention_home": "self_attention",
    "outside": ("transformer.word_embeddings", "lm_head"),
}
_FUSED = ("query_key_value", "dense")
_NEOX_MLP = ("dense_h_to_4h", "dense_4h_to_h")
_GPT2 = Family(
    ("c_attn", "c_proj"),
    ("c_fc", "c_proj"),
    rotary=False,
    tied=True,
    positions_offset=0,
    defaults={"resid_pdrop": 0.1, "attn_pdrop": 0.1, "activation_function": "gelu_new"},
    outside=("transformer.wte", "transformer.wpe", "lm_head"),
    **_TRANSFORMER,
    **_UNGATED,
    **_BIASED,
)
_OPT: dict[str, Any] = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "mlp": ("fc1", "fc2"),
    "mlp_home": "",
    "rotary": False,
    "tied": True,
    "defaults": {"dropout": 0.1},
    **_UNGATED,
    **_BIASED,
}
_LLAMA = Family(**_LLAMA_BIAS)
_MIXTURE = Family(expert_adapters=False, **_LLAMA_BIAS)
_FAMILIES = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "arcee": Family(mlp=("up_proj", "down_proj"), gated=False, **_LLAMA_BIAS),
    "apertus": Family(mlp=("up_proj", "down_proj"), gated=False, qk_norm="head", activation_weights=2, **_LLAMA_BIAS),
    "jais2": Family(
        mlp=("up_proj", "down_proj"), defaults={"attention_bias": True, "mlp_bias": True}, **_UNGATED, **_LLAMA_BIAS
    ),
    "nemotron": Family(mlp=("up_proj", "down_proj"), **_UNGATED, **_LLAMA_BIAS),
    # Its norms have no weights.
    "nanochat": Family(
        mlp=("fc1", "fc2"),
        gated=False,
        norm_width=0,
        qk_norm="head",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        defaults={"final_logit_softcapping": 15.0},
    ),
    "smollm3": Family(tied=True, **_LLAMA_BIAS),
    "mistral": Family(defaults={"num_key_value_heads": 8}),
    "ministral": Family(defaults={"num_key_value_heads": 8}),
    "mixtral": Family(
        experts=("w1", "w3", "w2"),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(qkv_bias=True, defaults=_NO_WINDOW),
    "qwen2_moe": Family(
        qkv_bias=True,
        # Only its shared expert: the names meet that first.
        expert_adapters=False,
        defaults={**_NO_WINDOW, "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3": Family(
        qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias", defaults={**_NO_WINDOW, "head_dim": 128}
    ),
    "qwen3_moe": Family(
        qk_norm="head",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        defaults={**_NO_WINDOW, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4},
    ),
    # Its norm has no weights, and is computed in fp32.
    "olmo": Family(norm_width=0, extra_norms=0),
    "olmo2": Family(qk_norm="all"),
    "olmoe": Family(qk_norm="all", defaults={"num_experts": 64, "num_experts_per_tok": 8}),
    "gemma": Family(tied=True, defaults={"head_dim": 256}),
    "gemma2": Family(tied=True, norms=4, full_attention_every=2, defaults={**_GEMMA, "final_logit_softcapping": 30.0}),
    "gemma3": Family(
        tied=True,
        norms=4,
        qk_norm="head",
        full_attention_every=6,
        defaults={**_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 2**17},
    ),
    "cohere": Family(tied=True, norms=1, layer_norm=True, qkv_bias="attention_bias", out_bias="attention_bias"),
    "phi": Family(
        ("q_proj", "k_proj", "v_proj", "dense"),
        ("fc1", "fc2"),
        head_bias=True,
        norms=1,
        defaults={"hidden_act": "gelu_new"},
        **_UNGATED,
        **_BIASED,
    ),
    "phi3": Family(("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "glm": Family(mlp=("gate_up_proj", "down_proj"), qkv_bias="attention_bias", defaults={"attention_bias": True}),
    "glm4": Family(
        mlp=("gate_up_proj", "down_proj"), norms=4, qkv_bias="attention_bias", defaults={"attention_bias": True}
    ),
    "stablelm": Family(qkv_bias="use_qkv_bias", norm_width=2, layer_norm=True),
    "starcoder2": Family(
        mlp=("c_fc", "c_proj"),
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        tied=True,
        defaults={"use_bias": True},
        **_UNGATED,
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, defaults={**_GPT2.defaults, "activation_function": "gelu_pytorch_tanh"}),
    "gpt_neox": Family(
        _FUSED,
        _NEOX_MLP,
        layers="gpt_neox.layers",
        attention_home="attention",
        outside=("gpt_neox.embed_in", "lm_head"),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        defaults={"attention_bias": True},
        **_UNGATED,
    ),
    "gptj": Family(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc_in", "fc_out"),
        mlp_bias=True,
        head_bias=True,
        norms=1,
        defaults={"activation_function": "gelu_new"},
        outside=("transformer.wte", "lm_head"),
        **_TRANSFORMER,
        **_UNGATED,
    ),
    "codegen": Family(
        ("qkv_proj", "out_proj"),
        ("fc_in", "fc_out"),
        mlp_bias=True,
        head_bias=True,
        norms=1,
        outside=("transformer.wte", "lm_head"),
        defaults={"activation_function": "gelu_new"},
        **_TRANSFORMER,
        **_UNGATED,
    ),
    "gpt_neo": Family(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("c_fc", "c_proj"),
        layers="transformer.h",
        attention_home="attn.attention",
        outside=("transformer.wte", "transformer.wpe", "lm_head"),
        out_bias=True,
        mlp_bias=True,
        rotary=False,
        tied=True,
        positions_offset=0,
        defaults={"activation_function": "gelu_new"},
        **_UNGATED,
    ),
    "mpt": Family(
        ("Wqkv", "out_proj"),
        ("up_proj", "down_proj"),
        layers="transformer.blocks",
        attention_home="attn",
        mlp_home="ffn",
        outside=("transformer.wte", "lm_head"),
        gated=False,
        layer_norm=True,
        rotary=False,
        tied=True,
    ),
    "persimmon": Family(
        _FUSED,
        _NEOX_MLP,
        qk_norm="head",
        **_UNGATED,
        **_BIASED,
    ),
    "falcon": Family(
        _FUSED,
        _NEOX_MLP,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        tied=True,
        defaults={"multi_query": True, "parallel_attn": True},
        **_SELF_ATTENTION,
        **_UNGATED,
    ),
    "bloom": Family(
        _FUSED,
        _NEOX_MLP,
        extra_norms=2,
        rotary=False,
        tied=True,
        **_SELF_ATTENTION,
        **_UNGATED,
        **_BIASED,
    ),
    "opt": Family(
        positions_offset=2,
        layers="model.decoder.layers",
        outside=("model.decoder.embed_tokens", "model.decoder.embed_positions", "lm_head"),
        **_OPT,
    ),
    "biogpt": Family(
        positions_offset=2,
        layers="biogpt.layers",
        outside=("biogpt.embed_tokens", "biogpt.embed_positions", "output_projection"),
        **_OPT | {"defaults": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}},
    ),
    # Its positions are computed.
    "xglm": Family(**_OPT | {"defaults": {"dropout": 0.1, "attention_dropout": 0.1}}),
}
UNCOUNTED_PARTS = {
    "kv_lora_rank": "latent attention (DeepSeek's)",
    "n_routed_experts": "experts beside shared ones (DeepSeek's)",
    "moe_num_experts": "experts of another kind (ERNIE 4.5's)",
    "num_shared_experts": "experts beside shared ones (EXAONE's)",
    "num_dense_layers": "layers without experts before those with them (LFM2's)",
    "interleave_moe_layer_step": "layers with and without experts in turn (Llama 4's)",
    "linear_num_value_heads": "layers of linear attention (Qwen3-Next's)",
    "num_kv_shared_layers": "layers that share keys and values (Gemma 3n's)",
    "hidden_size_per_layer_input": "embeddings in every layer (Gemma 3n's)",
    "conv_L_cache": "convolutions in place of attention (LFM2's)",
    "state_size": "state-space layers (Mamba's)",
    "mamba_d_state": "state-space layers (Mamba's)",
    "ssm_state_size": "state-space layers (Mamba's)",
    "is_encoder_decoder": "an encoder",
    "type_vocab_size": "an encoder's segments (BERT's)",
    "classifier_pooling": "an encoder's pooling (ModernBERT's)",
    "is_moe": "experts of another kind (Doge's)",
    "vision_config": "a part that looks at images",
    "audio_config": "a part that hears",
}
"""Fields that tell of weights which a decoder such as Llama does not have: read as one, a model of 671 billion would
look like one of 39."""
UNCOUNTED_FAMILIES = {
    "beam": "a gate in its attention",
    "bert-generation": "an encoder's layers",
    "fuyu": "a part that looks at images",
    "gpt_neox_japanese": "a bias in its last layer alone",
    "hunyuan_v1_moe": "experts beside shared ones",
    "hrm_text": "layers that are passed again and again",
    "jetmoe": "experts in its attention",
    "moshi": "a feed-forward part of its own kind",
    "recurrent_gemma": "recurrent layers",
}
"""Model types that no field tells of, and that Llama's shape is far from (tests/training/test_families.py)."""
IMAGE_PARTS = {"gemma3": ("vision_tower", "multi_modal_projector")}
"""Of families whose part that looks at images training leaves out (`training.model`), what it is called."""
_UNADAPTED_MIXTURES = frozenset(
    {
        "flint",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "kolibri1",
        "laguna",
        "minimax_m3_vl_text",
        "phimoe",
    }
)
"""Of those that are counted as Llamas, whose experts PEFT does not reach (tests/training/test_families.py)."""
_ALIASES = {"gemma3_text": "gemma3", "mistral3": "mistral"}
SPELLINGS = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads", "attention_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_local_experts": ("num_experts",),
}
"""What a field is called otherwise."""


def is_known(model_type: str) -> bool:
    """Whether the family is one of those that are counted by their own."""
    return _ALIASES.get(model_type, model_type) in _FAMILIES


def family_of(model_type: str) -> Family:
    """A family by transformers' `model_type`; one that is not known is taken for Llama's."""
    counted_as = _MIXTURE if model_type in _UNADAPTED_MIXTURES else _LLAMA
    return _FAMILIES.get(_ALIASES.get(model_type, model_type), counted_as)
