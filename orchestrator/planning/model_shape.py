"""The matrices of a model, out of its transformers config: what the estimates count with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from orchestrator.errors import ModelError, cut, shown
from orchestrator.planning.model_families import (
    IMAGE_PARTS,
    SPELLINGS,
    UNCOUNTED_FAMILIES,
    UNCOUNTED_PARTS,
    Family,
    family_of,
    is_known,
)

LARGEST_FIELD = 2**31
"""No config means more than this by any of its fields."""
LONGEST_MODEL_LAYERS = 10_000
LARGEST_MODEL = 10**13
"""Weights; the largest models that were published have some 10**12."""
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "num_attention_heads", "head_dim")
_FOURFOLD = ("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj")
"""Families whose feed-forward part is four times as wide as the rest where its width is null."""
_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_DROPOUTS = ("resid_pdrop", "resid_dropout", "dropout", "hidden_dropout", "hidden_dropout_prob")
_ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True, slots=True)
class Matrix:
    """Linear layers (rows, columns) of one name: out features by in features."""

    name: str
    home: str
    """The path of the module that holds it, with `*` for the layer's number."""
    rows: int
    columns: int
    layers: range | tuple[int, ...]
    """Numbers of the layers that have it."""
    is_attention: bool
    is_expert: bool = False
    """Of a mixture's experts, stacked in one tensor (transformers 5), or its router."""
    adapter: Literal["plain", "fused", "none"] = "plain"
    """peft 0.21.2 gives half of a fused gate and up as many rows of B as both have; some it cannot adapt at all."""
    per_layer: int = 1

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.layers) * self.per_layer

    @property
    def is_stacked(self) -> bool:
        """Part of a mixture that only an adapter on all matrices reaches."""
        return self.is_expert and self.adapter != "none"

    @property
    def short_path(self) -> str:
        """Its name within a layer."""
        return f"{self.home}.{self.name}".partition("*.")[2]

    def layers_named(self, name: str) -> range | tuple[int, ...]:
        """Those in which PEFT takes it by this name: the end of its path, from a dot on (peft 0.21.2,
        tuners/tuners_utils.py, check_target_module_exists)."""
        path, parts = [*self.home.split("."), self.name], name.split(".")
        layers = self.layers
        if len(parts) > len(path):
            return ()
        for part, own in zip(reversed(parts), reversed(path), strict=False):
            if own == "*":
                layers = tuple(layer for layer in layers if str(layer) == part)
            elif own != part:
                return ()
        return layers

    @property
    def parameters(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class ModelShape:
    """Layer counts and widths of a decoder."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Of one expert in a mixture."""
    vocabulary: int
    max_positions: int
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    shared_intermediate: int
    """Of the expert that every token takes, 0 where there is none."""
    sliding_window: int | None
    sliding_layers: int
    """Layers that look no further back than the window."""
    matrices: tuple[Matrix, ...]
    other_parameters: int
    """Norms and biases."""
    position_parameters: int
    """Learned positions, as GPT-2 has."""
    norms_per_layer: int
    rms_norm: bool
    """transformers' own RMSNorm computes and keeps fp32; torch's LayerNorm keeps its input alone."""
    norm_gains: bool
    """They have weights."""
    qk_norm: bool
    gated: bool
    """down(act(gate) × up), rather than down(act(up))."""
    activation: str | None
    """transformers' name of the feed-forward part's; None: the config leaves it to the class."""
    rotary: bool
    fused_attention: bool
    """One matrix makes query, key and value, so that keeping one of them keeps all."""
    parallel_residual: bool
    """Attention and feed-forward part read the same, so that their norms share what they keep."""
    softcapped_logits: bool
    """The logits go through tanh (Gemma 2), which keeps them once more."""
    dropout: bool
    """The frozen model drops out of its own accord, as GPT-2 and OPT do, and keeps what it drew."""
    attention_dropout: bool
    """Of its attention scores too, as GPT-2."""
    outside: tuple[str, ...] = ()
    """Paths of embeddings and head, which PEFT could adapt as well, and no estimate counts adapters of."""
    leaves_out_images: bool = False
    """The checkpoint has a part that looks at images, which is not trained."""

    @property
    def embedding_parameters(self) -> int:
        """The input embedding."""
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """The output head, 0 where it is the embedding."""
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @cached_property
    def linear_parameters(self) -> int:
        """All matrices of the decoder layers."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def quantisable_parameters(self) -> int:
        """Those of `linear_parameters` that bitsandbytes stores in less: linear layers, which stacked experts and their
        router are not (transformers 5.23, integrations/bitsandbytes.py, replace_with_bnb_linear)."""
        return self.linear_parameters - self.expert_parameters

    @cached_property
    def expert_parameters(self) -> int:
        """Those of `linear_parameters` of which a token uses only some."""
        return sum(matrix.parameters for matrix in self.matrices if matrix.is_expert)

    @cached_property
    def parameters(self) -> int:
        """All weights."""
        outside = self.embedding_parameters + self.head_parameters + self.position_parameters
        return self.linear_parameters + outside + self.other_parameters

    @cached_property
    def adaptable(self) -> tuple[str, ...]:
        """Names of the modules that can carry an adapter of their own."""
        named = dict.fromkeys(matrix.name for matrix in self.matrices if matrix.adapter != "none")
        return tuple(name for name in named if name not in self.stacked)

    @cached_property
    def stacked(self) -> frozenset[str]:
        """Names of a mixture's matrices that are no modules, and that only an adapter on all matrices reaches."""
        return frozenset(matrix.name for matrix in self.matrices if matrix.is_stacked)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape out of a transformers config; a family that is not known is read as if it were Llama's.

    Raises:
        ModelError: the config lacks a field, or one makes no sense, or it has a part that is not counted here, or is
            that of a model which is quantised already.
    """
    _refuse_quantised(config)
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    model_type, name = _model_type(config), cut(_model_type(text))
    leaves_out_images = bool(config.get("vision_config")) and model_type in IMAGE_PARTS
    uncounted = [UNCOUNTED_FAMILIES[kind] for kind in (model_type, name) if kind in UNCOUNTED_FAMILIES]
    for field, part in UNCOUNTED_PARTS.items():
        if (config.get(field) and not (field == "vision_config" and leaves_out_images)) or text.get(field):
            uncounted.append(part)
    kinds = text.get("layer_types")
    uncounted += [f"layers of {cut(str(k))}" for k in kinds if k not in _LAYERS] if isinstance(kinds, list) else []
    if uncounted:
        raise ModelError(f"{name or 'the model'} has {uncounted[0]}, which no estimate counts yet: take another model")
    family = family_of(name)
    given = {**family.defaults, **{field: value for field, value in text.items() if value is not None}}
    # Where a model has parts, its text part is one of them.
    root = "model.language_model" if isinstance(inner, Mapping) else "model"
    reader = _Reader(given, family, name, root)
    shape = replace(reader.shape(), leaves_out_images=leaves_out_images)
    if shape.parameters > LARGEST_MODEL:
        widest = max(_WIDTHS, key=lambda field: reader.whole(field) or 0)
        raise ModelError(f"the model's config means {shape.parameters:.1e} weights: correct its `{widest}`")
    return shape


def _model_type(config: Mapping[str, Any]) -> str:
    told = config.get("model_type") or ""
    if not isinstance(told, str):
        raise ModelError(f'the model\'s config has {shown(told)} as `model_type`: it must be a text, as "llama"')
    return told


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    """transformers goes by the checkpoint's own quantisation, whatever the trial's precision (5.23, quantizers/auto.py,
    `merge_quantization_configs`): bf16 would train 4 bits, and int8 of a GPTQ model fail after its launch."""
    if told := config.get("quantization_config"):
        method = cut(str(told.get("quant_method") or "by bitsandbytes" if isinstance(told, Mapping) else told))
        raise ModelError(
            f"the model is already quantised ({method}): name the unquantised model, and let `precision` quantise it"
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """One config, read field by field."""

    config: Mapping[str, Any]
    family: Family
    name: str
    root: str
    """What the family's paths call `model`."""

    def shape(self) -> ModelShape:
        """The whole shape."""
        hidden, layers, heads = self.need("hidden_size"), self._layers(), self.need("num_attention_heads")
        head_dim, kv_heads = self._head_dim(hidden, heads), self._kv_heads(heads)
        experts = self._experts_count(layers)
        intermediate = self._intermediate(hidden, experts)
        matrices = self._matrices(hidden, layers, heads * head_dim, kv_heads * head_dim, intermediate, experts)
        return ModelShape(
            model_type=self.name,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocabulary=self.need("vocab_size"),
            max_positions=self._positions(),
            tied_embeddings=self._is_tied(),
            experts=experts,
            experts_per_token=self._experts_per_token(experts),
            shared_intermediate=(self.whole("shared_expert_intermediate_size") or 0) if experts else 0,
            sliding_window=self.whole("sliding_window"),
            sliding_layers=self._sliding_layers(layers),
            matrices=tuple(matrices),
            other_parameters=self._others(hidden, layers, heads, kv_heads, head_dim, matrices),
            position_parameters=self._learned_positions() * hidden,
            norms_per_layer=self._norms(),
            rms_norm=not self.family.layer_norm,
            norm_gains=self.family.norm_width > 0,
            qk_norm=self.family.qk_norm is not None,
            gated=self.family.gated,
            activation=self._activation(),
            rotary=self.family.rotary and not self.config.get("alibi"),
            fused_attention=len(self.family.attention) == 2,
            parallel_residual=self._is_parallel(),
            softcapped_logits=bool(self.config.get("final_logit_softcapping")),
            dropout=any(self.config.get(name) for name in _DROPOUTS),
            attention_dropout=any(self.config.get(name) for name in _ATTENTION_DROPOUTS),
            outside=tuple(self._rooted(path) for path in self.family.outside),
        )

    def _activation(self) -> str | None:
        names = ("hidden_act", "activation_function", "hidden_activation")
        return next((told for name in names if isinstance(told := self.config.get(name), str)), None)

    def whole(self, name: str) -> int | None:
        """A whole number by any of its spellings, None where there is none.

        Raises:
            ModelError: it is there and makes no sense.
        """
        for spelling in (name, *SPELLINGS.get(name, ())):
            value = self.config.get(spelling)
            if value is None or value == 0:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST_FIELD:
                raise ModelError(
                    f"the model's config has {shown(value)} as `{spelling}`: it must be a whole number above 0"
                )
            return value
        return None

    def need(self, name: str) -> int:
        """A whole number that must be there.

        Raises:
            ModelError: it is missing.
        """
        value = self.whole(name)
        if value is None:
            mend = "use a config.json that transformers writes"
            if self.name and not is_known(self.name):
                mend += f", or another model, since its family, {self.name}, is not known here"
            raise ModelError(
                f"the model's config has no usable `{name}` (it is {shown(self.config.get(name))}): {mend}"
            )
        return value

    def _experts_count(self, layers: int) -> int:
        experts = self.whole("num_local_experts") or 0
        # Doge names experts whether it has any or not.
        return 0 if self.config.get("is_moe") is False or len(self._dense_layers(layers)) == layers else experts

    def _experts_per_token(self, experts: int) -> int:
        each = self.whole("num_experts_per_tok") or 1
        if experts and each > experts:
            raise ModelError(
                f"the model's config has {each} as `num_experts_per_tok` of {experts} experts: correct one of them"
            )
        return each

    def _is_tied(self) -> bool:
        tied = self.config.get("tie_word_embeddings", self.family.tied)
        if tied not in (True, False):
            raise ModelError(f"the model's config has {shown(tied)} as `tie_word_embeddings`: it must be true or false")
        return bool(tied)

    def _layers(self) -> int:
        layers = self.need("num_hidden_layers")
        if layers > LONGEST_MODEL_LAYERS:
            raise ModelError(f"the model's config has {layers} layers as `num_hidden_layers`: correct it")
        return layers

    def _head_dim(self, hidden: int, heads: int) -> int:
        if self.config.get("head_dim") == 0:
            raise ModelError("the model's config has 0 as `head_dim`: it must be a whole number above 0")
        if "head_dim" not in self.config and hidden % heads:
            raise ModelError(
                f"the model's config has no `head_dim`, and {hidden} is no multiple of {heads} heads: correct "
                "`hidden_size` or `num_attention_heads`"
            )
        return self.whole("head_dim") or hidden // heads

    def _positions(self) -> int:
        return self.whole("max_position_embeddings") or 2**30

    def _learned_positions(self) -> int:
        offset = self.family.positions_offset
        return 0 if offset is None else self._positions() + offset

    def _sliding_layers(self, layers: int) -> int:
        if self.whole("sliding_window") is None or not self.config.get("use_sliding_window", True):
            return 0
        kinds = self.config.get("layer_types")
        if isinstance(kinds, list | tuple):
            return list(kinds)[:layers].count("sliding_attention")
        every = self.whole("sliding_window_pattern") or self.family.full_attention_every
        return layers - layers // every if every else max(0, layers - (self.whole("max_window_layers") or 0))

    def _is_parallel(self) -> bool:
        if self.name == "gpt_neox":
            return bool(self.config.get("use_parallel_residual", True))
        return self._norms() == 1

    def _kv_heads(self, heads: int) -> int:
        if self.name == "gpt_bigcode":
            return 1 if self.config.get("multi_query", True) else heads
        if self.name == "falcon" and not self.config.get("new_decoder_architecture"):
            return 1 if self.config["multi_query"] else heads
        kv_heads = self.whole("num_key_value_heads")
        if kv_heads is None:
            if self.config.get("num_key_value_heads") == 0:
                raise ModelError("the model's config has 0 as `num_key_value_heads`: it must be a whole number above 0")
            return heads
        if heads % kv_heads:
            raise ModelError(
                f"the model's config has {kv_heads} key-value heads for {heads} heads: correct one of them"
            )
        return kv_heads

    def _intermediate(self, hidden: int, experts: int) -> int:
        if experts and (width := self.whole("moe_intermediate_size")):
            return width
        width = self.whole("intermediate_size")
        if width is None and self.name in _FOURFOLD:
            return 4 * hidden
        if width is None and self.name == "mpt":
            return (self.whole("expansion_ratio") or 4) * hidden
        return width or self.need("intermediate_size")

    def _matrices(self, hidden: int, layers: int, q: int, kv: int, intermediate: int, experts: int) -> list[Matrix]:
        names, rows, every = self.family.attention, (q, kv, kv), range(layers)
        home, widths = self._home(self.family.attention_home), rows if len(names) == 4 else (sum(rows),)
        matrices = [
            *(Matrix(n, home, width, hidden, every, True) for n, width in zip(names[:-1], widths, strict=True)),
            Matrix(names[-1], home, hidden, q, every, True),
        ]
        home = self.family.mlp_home
        if not experts:
            return [*matrices, *self._mlp(home, hidden, intermediate, every)]
        dense = self._dense_layers(layers)
        sparse = tuple(sorted(set(every) - set(dense)))
        matrices += self._experts(hidden, intermediate, sparse, experts)
        if dense:
            matrices += self._mlp(home, hidden, self.need("intermediate_size"), dense)
        shared = self.whole("shared_expert_intermediate_size")
        if shared:
            matrices += self._mlp(f"{home}.shared_expert", hidden, shared, sparse)
            matrices.append(Matrix("shared_expert_gate", self._home(home), 1, hidden, sparse, False))
        return matrices

    def _rooted(self, path: str) -> str:
        first, dot, rest = path.partition(".")
        return f"{self.root}{dot}{rest}" if first == "model" else path

    def _home(self, within_layer: str) -> str:
        return self._rooted(f"{self.family.layers}.*.{within_layer}").removesuffix(".")

    def _dense_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of a mixture that have one feed-forward part all the same (Qwen's fields)."""
        only = self.config.get("mlp_only_layers") or ()
        if not isinstance(only, list | tuple):
            raise ModelError(f"the model's config has {shown(only)} as `mlp_only_layers`: it must be a list of layers")
        every = self.whole("decoder_sparse_step") or 1
        return tuple(layer for layer in range(layers) if layer in only or (layer + 1) % every)

    def _experts(self, hidden: int, width: int, layers: tuple[int, ...], experts: int) -> list[Matrix]:
        gate, up, down = self.family.experts
        plain: Literal["plain", "none"] = "plain" if self.family.expert_adapters else "none"
        fused: Literal["fused", "none"] = "fused" if self.family.expert_adapters else "none"
        router = self._home(self.family.mlp_home)
        home = f"{router}.experts"
        return [
            Matrix(gate, home, width, hidden, layers, False, True, fused, experts),
            Matrix(up, home, width, hidden, layers, False, True, fused, experts),
            Matrix(down, home, hidden, width, layers, False, True, plain, experts),
            Matrix("gate", router, experts, hidden, layers, False, True, plain),
        ]

    def _mlp(self, home: str, hidden: int, width: int, layers: range | tuple[int, ...]) -> list[Matrix]:
        names, home = self.family.mlp, self._home(home)
        first = [(n, width) for n in names[:-1]]
        if self.family.gated and len(names) == 2:
            first = [(names[0], 2 * width)]
        inward = [Matrix(n, home, rows, hidden, layers, False) for n, rows in first]
        return [*inward, Matrix(names[-1], home, hidden, width, layers, False)]

    def _norms(self) -> int:
        norms = self.family.norms
        if self.name == "falcon":
            return 2 if self.config.get("new_decoder_architecture") or not self.config["parallel_attn"] else 1
        if self.name == "stablelm" and self.config.get("use_parallel_residual"):
            return 1
        return norms

    def _others(
        self, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, matrices: list[Matrix]
    ) -> int:
        family = self.family
        total = (self._norms() * layers + family.extra_norms) * family.norm_width * hidden
        total += family.activation_weights * layers
        if family.qk_norm == "head":
            total += layers * 2 * head_dim * family.norm_width
        elif family.qk_norm == "all":
            total += layers * (heads + kv_heads) * head_dim
        out = family.attention[-1]
        for matrix in matrices:
            if not matrix.is_attention:
                biased = family.mlp_bias
            else:
                is_out = matrix.name == out and matrix.rows == hidden
                biased = family.out_bias if is_out and matrix is not matrices[0] else family.qkv_bias
            if self.config.get(biased) if isinstance(biased, str) else biased:
                total += matrix.rows * matrix.count
        return total + (self.need("vocab_size") if family.head_bias else 0)


def targeted(shape: ModelShape, target_modules: str | Collection[str]) -> tuple[Matrix, ...]:
    """The matrices that get an adapter.

    A dotted name is told from its namesake by the part before, GPT-2 having `attn.c_proj` and `mlp.c_proj`; with a
    layer's number it means that layer alone.
    """
    if target_modules == "attention":
        return tuple(matrix for matrix in shape.matrices if matrix.is_attention)
    if target_modules == "all-linear":
        return tuple(matrix for matrix in shape.matrices if matrix.adapter != "none")
    return _named(shape.matrices, tuple(target_modules))


@lru_cache(maxsize=1_024)
def _named(matrices: tuple[Matrix, ...], names: tuple[str, ...]) -> tuple[Matrix, ...]:
    """A mixture's stacked experts are no modules: their names mean none, also where other layers have namesakes."""
    stacked = {matrix.name for matrix in matrices if matrix.is_stacked}
    found = []
    for matrix in matrices:
        if matrix.is_expert or matrix.name in stacked:
            continue
        layers = {layer for name in names for layer in matrix.layers_named(name)}
        if layers:
            found.append(replace(matrix, layers=tuple(sorted(layers))))
    return tuple(found)


def lora_parameters(rank: int, matrices: Collection[Matrix]) -> int:
    """Trainable parameters that LoRA adds: A (rank, in) and B (out, rank) for each target matrix (out, in).

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    return sum(rank * (m.columns + m.rows * (2 if m.adapter == "fused" else 1)) * m.count for m in matrices)
