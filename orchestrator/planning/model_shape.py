"""The matrices of a model, out of its transformers config: what the estimates count with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ModelError

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "dense"})


@dataclass(frozen=True, slots=True)
class Matrix:
    """`count` linear layers (rows, columns) of one name: out features by in features."""

    name: str
    rows: int
    columns: int
    count: int
    is_attention: bool

    @property
    def parameters(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Layer counts and widths of a decoder."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    max_positions: int
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    matrices: tuple[Matrix, ...]
    other_parameters: int
    """Norms and biases."""
    position_parameters: int
    """Learned positions, as GPT-2 has."""

    @property
    def embedding_parameters(self) -> int:
        """The input embedding."""
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """The output head, 0 where it is the embedding."""
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @property
    def linear_parameters(self) -> int:
        """All matrices of the decoder layers: what quantisation stores in less."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def parameters(self) -> int:
        """All weights."""
        outside = self.embedding_parameters + self.head_parameters + self.position_parameters
        return self.linear_parameters + outside + self.other_parameters


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape out of a transformers config.

    Raises:
        ModelError: the config lacks a field, or its family is not known.
    """
    config = config.get("text_config") or config
    family = str(config.get("model_type", ""))
    if family == "gpt2":
        return _gpt2(config)
    if family == "gpt_neox":
        return _gpt_neox(config)
    return _llama_like(config, family)


def _field(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"the model's config has no usable `{name}` (it is {value!r}): use a config.json that transformers writes"
        )
    return value


def _llama_like(config: Mapping[str, Any], family: str) -> ModelShape:
    """Llama, Mistral, Qwen, Gemma, Phi-3, StableLM and all that have their fields; Mixtral and the Qwen MoEs."""
    hidden, layers, heads = (_field(config, n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    intermediate = config.get("moe_intermediate_size") or _field(config, "intermediate_size")
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    q, kv = heads * head_dim, kv_heads * head_dim
    if family == "phi3":
        attention = [("qkv_proj", q + 2 * kv, hidden), ("o_proj", hidden, q)]
        mlp = [("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)]
    else:
        attention = [("q_proj", q, hidden), ("k_proj", kv, hidden), ("v_proj", kv, hidden), ("o_proj", hidden, q)]
        mlp = [
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ]
    matrices = [Matrix(name, rows, columns, layers, True) for name, rows, columns in attention]
    matrices += [Matrix(name, rows, columns, layers * max(1, experts), False) for name, rows, columns in mlp]
    if experts:
        matrices.append(Matrix("gate", experts, hidden, layers, False))
    if shared := int(config.get("shared_expert_intermediate_size") or 0):
        matrices += [
            Matrix("gate_proj", shared, hidden, layers, False),
            Matrix("up_proj", shared, hidden, layers, False),
            Matrix("down_proj", hidden, shared, layers, False),
            Matrix("shared_expert_gate", 1, hidden, layers, False),
        ]
    norms = 4 if family in ("gemma2", "gemma3", "gemma3_text") else 2
    others = (norms * layers + 1) * hidden
    if family in ("qwen2", "qwen2_moe"):
        others += layers * (q + 2 * kv)
    if family in ("qwen3", "qwen3_moe", "gemma3", "gemma3_text"):
        others += layers * 2 * head_dim
    tied = bool(config.get("tie_word_embeddings", family.startswith("gemma")))
    return ModelShape(
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        _field(config, "vocab_size"),
        int(config.get("max_position_embeddings") or 2**30),
        tied,
        experts,
        int(config.get("num_experts_per_tok") or 1),
        tuple(matrices),
        others,
        0,
    )


def _gpt2(config: Mapping[str, Any]) -> ModelShape:
    hidden, layers, heads = (_field(config, name) for name in ("n_embd", "n_layer", "n_head"))
    intermediate = config.get("n_inner") or 4 * hidden
    positions = _field(config, "n_positions")
    matrices = (
        Matrix("c_attn", 3 * hidden, hidden, layers, True),
        Matrix("c_proj", hidden, hidden, layers, True),
        Matrix("c_fc", intermediate, hidden, layers, False),
        Matrix("c_proj", hidden, intermediate, layers, False),
    )
    others = layers * (3 * hidden + hidden + intermediate + hidden + 4 * hidden) + 2 * hidden
    return ModelShape(
        "gpt2",
        hidden,
        layers,
        heads,
        heads,
        hidden // heads,
        intermediate,
        _field(config, "vocab_size"),
        positions,
        bool(config.get("tie_word_embeddings", True)),
        0,
        1,
        matrices,
        others,
        positions * hidden,
    )


def _gpt_neox(config: Mapping[str, Any]) -> ModelShape:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    hidden, layers, heads, intermediate = (_field(config, name) for name in names)
    matrices = (
        Matrix("query_key_value", 3 * hidden, hidden, layers, True),
        Matrix("dense", hidden, hidden, layers, True),
        Matrix("dense_h_to_4h", intermediate, hidden, layers, False),
        Matrix("dense_4h_to_h", hidden, intermediate, layers, False),
    )
    others = layers * (3 * hidden + hidden + intermediate + hidden + 4 * hidden) + 2 * hidden
    return ModelShape(
        "gpt_neox",
        hidden,
        layers,
        heads,
        heads,
        hidden // heads,
        intermediate,
        _field(config, "vocab_size"),
        int(config.get("max_position_embeddings") or 2**30),
        bool(config.get("tie_word_embeddings", False)),
        0,
        1,
        matrices,
        others,
        0,
    )


def target_names(shape: ModelShape, target_modules: str | Collection[str]) -> frozenset[str]:
    """The names that `target_modules` stands for in this model."""
    if target_modules == "attention":
        return frozenset(matrix.name for matrix in shape.matrices if matrix.is_attention)
    if target_modules == "all-linear":
        return frozenset(matrix.name for matrix in shape.matrices)
    return frozenset(target_modules)


def lora_parameters(shape: ModelShape, rank: int, targets: Collection[str]) -> int:
    """Trainable parameters that LoRA adds: A (rank, in) and B (out, rank) for each target matrix (out, in).

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    return sum(rank * (m.rows + m.columns) * m.count for m in shape.matrices if m.name in targets)
