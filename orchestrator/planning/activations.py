"""What autograd keeps of a decoder layer, and what its backward pass takes beside that.

Counted with `torch.autograd.graph.saved_tensors_hooks` on transformers 5.23 models with PEFT 0.21 adapters: what a
frozen linear layer was given is not kept, unless an adapter hangs on it; a frozen norm keeps its input in fp32 alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.model_shape import Matrix, ModelShape, targeted

_FP32_GAIN = ("gemma", "gemma2", "gemma3", "gemma3_text", "olmo2", "olmoe")
"""Families whose norm is multiplied with its gain before it is cast back (transformers 5.23)."""

PYTHON_GELU = "gelu_new"
"""transformers' name of the one activation that is written in Python, step by step, of those that models here have."""

_OWN_SOFTMAX = ("gpt2", "falcon", "biogpt")
"""Families whose softmax is in the type that it is given, where autocast does not make it fp32 (transformers 5.23)."""


_FP32_QUERIES = ("gpt_neo", "gptj")
"""Families whose eager attention casts query and key to fp32 (transformers 5.23, `_attn`)."""

_XIELU = ("apertus",)
"""Families whose activation is written out, and keeps of its steps a product, a difference's exponential and which of
both it took (transformers 5.23, activations.py, XIELUActivation); trained, its two weights keep one step more."""

_BROADCAST_KEYS = ("falcon", "gpt_bigcode")
"""Families that multiply all query heads with a key as it is (transformers 5.23)."""


Loop = Literal["trainer", "bare", "any"]
"""What trains. `trainer`: transformers' Trainer and what stands on it, and this package's own loop: adapters of half or
quantised weights are computed under autocast, and logits go when the loss is there. `bare`: a loop of one's own that
does neither. It keeps an adapter's inputs, and all of a quantised model's activations, in fp32, logits until the
backward pass has gone by, and all that GPT-2's activation computes step by step. `any`: nobody knows which."""
LOOPS: tuple[Loop, ...] = ("trainer", "bare")


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes an element, by what the element is."""

    linear: float
    """A weight of the decoder layers' matrices."""
    rest: int
    """A weight of embeddings, head, norms."""
    stream: int
    """What flows from layer to layer."""
    product: int
    """What a linear layer returns."""
    attention: int
    """What the attention kernel computes in."""
    dequantised: int
    """A quantised weight while it is used; 0 where none is."""
    adapter: int
    adapter_input: int
    """What an adapter's product was given: autocast casts it, and so does PEFT where the types differ."""
    logits: int
    is_bare: bool
    """Whether a loop of one's own trains: it holds what the model returned until the backward pass has gone by, and an
    activation that transformers writes in Python stays so (training/model.py, `fuse_activations`)."""
    on_gpu: bool
    repeats_keys: bool
    """`sdpa` gets a key and a value for each query head, as training gives them on GPUs before Ampere: there the only
    kernel that writes no scores takes no grouped queries (training/model.py, `attend_without_grouped_queries`)."""


def layer_bytes_per_token(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Bytes a token that autograd keeps for one decoder layer, without attention scores."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = _feed_forward_width(shape)
    kept = _norms(config, shape, width)
    if shape.dropout:
        # What was drawn, after attention and after the feed-forward part.
        kept += 2 * hidden * _drawn(width.stream, width)
    # Query, key and value as the kernel got them, its result, and an fp32 log-sum-exp a head.
    kept += width.attention * (2 * q + 2 * kv) + 4 * shape.heads
    if config.attention == "eager" and shape.model_type in _FP32_QUERIES:
        kept += (4 - width.attention) * (q + kv)
    if shape.fused_attention:
        # The value is a view of all that the fused matrix returned; without rotation so are query and key.
        kept += width.attention * ((q + kv) if shape.rotary else 0)
    # What the activation was given; where it is gated, also what it returned and what that is multiplied with.
    kept += wide * (width.product * (3 if shape.gated else 1) + _more_of_the_activation(config, shape, width))
    if shape.experts:
        # A copy of the token for each expert that it goes to, and each expert's answer before it is weighted.
        kept += 2 * width.stream * hidden * shape.experts_per_token
    kept += linear_input_bytes(config, shape, width) + _adapter_inputs(config, shape, width)
    return kept + _dora_outputs(config, shape, width)


def _more_of_the_activation(config: TrialConfig, shape: ModelShape, width: Widths) -> int:
    """Bytes an element that an activation written in Python keeps beside its input.

    GPT-2's keeps tanh's result, that plus 1, and half of the input (transformers 5.23, activations.py,
    NewGELUActivation). On a GPU autocast makes fp32 of the input to raise it to its third power, and what follows is
    (torch 2.13, autocast_mode.h, `pow`).
    """
    if shape.model_type in _XIELU:
        return width.product * (3 if config.trains_all_weights else 2) + 1
    if not _is_in_python(shape, width):
        return 0
    is_autocast = config.precision.is_autocast or width.adapter_input < width.adapter
    return 3 * 4 + width.product if is_autocast and width.on_gpu else 3 * width.product


def _is_in_python(shape: ModelShape, width: Widths) -> bool:
    return width.is_bare and shape.activation == PYTHON_GELU


def _feed_forward_width(shape: ModelShape) -> int:
    if not shape.experts:
        return shape.intermediate
    return shape.intermediate * shape.experts_per_token + shape.shared_intermediate


def _norms(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    if shape.model_type == "cohere":
        # Its norm is of its own and in fp32: what is normalised, and how far it is from its mean.
        return 8.0 * shape.hidden
    normalised = shape.hidden * (1 if shape.parallel_residual else shape.norms_per_layer)
    # A fused matrix's result is kept already.
    of_its_own = shape.qk_norm and not shape.fused_attention
    queries_and_keys = (shape.heads + shape.kv_heads) * shape.head_dim if of_its_own else 0
    each = 4 if shape.rms_norm else width.stream
    if config.trains_all_weights and shape.rms_norm and shape.norm_gains:
        # Its gain's gradient needs what it is multiplied with: fp32 in some families, else already cast back.
        each += 4 if shape.model_type in _FP32_GAIN else width.stream
    return float(each * normalised + each * queries_and_keys)


def linear_input_bytes(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Bytes a token that the layer's own products keep of their inputs; those that read the same share it.

    A frozen one keeps none, but LLM.int8()'s does (bitsandbytes 0.50, autograd/_functions.py, MatMul8bitLt: ctx.tensors
    holds A).
    """
    if not config.trains_all_weights and config.precision is not Precision.INT8:
        return 0.0
    # A norm's result is as wide as the stream, and int8 keeps it so; autocast casts it for a trained product.
    of_norm = width.stream if config.precision is Precision.INT8 else width.product
    tokens = [(matrix, _uses(matrix, shape)) for matrix in shape.matrices]
    of_norms, others = ([t for t in tokens if (t[0].columns == shape.hidden) is reads] for reads in (True, False))
    return float(of_norm * sum(_shared_inputs(of_norms, shape)) + width.product * sum(_shared_inputs(others, shape)))


def _adapter_inputs(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """What adapters keep of their input, beside what is kept anyway."""
    if config.rank == "full":
        return 0.0
    tokens = [(matrix, _uses(matrix, shape)) for matrix in targeted(shape, config.target_modules)]
    middle = config.rank * width.adapter_input * sum(uses for _, uses in tokens)
    if config.lora_dropout:
        # What was dropped out of has the adapter's type already.
        each = width.adapter_input + _drawn(width.adapter, width)
        return middle + each * sum(m.columns * uses for m, uses in tokens)
    if width.adapter == width.stream == width.product == width.adapter_input:
        own_is_kept = config.precision is Precision.INT8
        return middle + (0.0 if own_is_kept else width.stream * sum(_shared_inputs(tokens, shape)))
    if config.precision.is_quantized and width.adapter_input == width.attention:
        # Under autocast the attention's result has the right type already (peft 0.21.2, tuners/lora/bnb.py).
        tokens = [(matrix, uses) for matrix, uses in tokens if not _reads_attention(matrix, shape)]
    return middle + width.adapter_input * sum(m.columns * uses for m, uses in tokens)


def _dora_outputs(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Bytes a token that DoRA's magnitudes keep: they are trained, so that their gradient needs what they multiply,
    which is what the matrix returned and what the adapter did (peft 0.21.2, tuners/lora/dora.py, forward).

    With dropout the matrix multiplies the adapter's input once more, in the adapter's type.
    """
    if not config.dora or config.rank == "full":
        return 0.0
    kept = 0.0
    for matrix in targeted(shape, config.target_modules):
        returned = width.attention if _reads_attention(matrix, shape) else width.product
        each = width.adapter_input + (width.adapter_input if config.lora_dropout else returned)
        kept += each * matrix.rows * _uses(matrix, shape)
    return kept


def _drawn(each: int, width: Widths) -> int:
    """Bytes an element by which dropout remembers what it drew: a GPU's kernel truth values, a CPU's numbers."""
    return 1 if width.on_gpu else each


def _uses(matrix: Matrix, shape: ModelShape) -> float:
    """How often a token passes a matrix of this name in an average layer."""
    if matrix.is_expert and matrix.name != "gate":
        return matrix.count / (shape.layers * shape.experts) * shape.experts_per_token
    return matrix.count / shape.layers


def _shared_inputs(tokens: Iterable[tuple[Matrix, float]], shape: ModelShape) -> list[float]:
    """Elements a token: attention's input, the feed-forward part's, and down's. The kernel keeps its own result."""
    found: dict[tuple[bool, str], float] = {}
    for matrix, uses in tokens:
        if _reads_attention(matrix, shape):
            continue
        role = "in" if matrix.columns == shape.hidden else "down"
        key = (matrix.is_attention, role)
        found[key] = max(found.get(key, 0.0), matrix.columns * uses)
    return list(found.values())


def _reads_attention(matrix: Matrix, shape: ModelShape) -> bool:
    return (
        matrix.is_attention
        and (matrix.rows, matrix.columns) == (shape.hidden, shape.heads * shape.head_dim)
        and matrix.name in ("o_proj", "dense", "c_proj", "out_proj")
    )


def score_bytes(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Attention scores of a layer and sequence that are kept for the backward pass.

    Only kernels that write them out have any: eager (softmax in fp32 and its cast), and torch's plain kernel, which
    `sdpa` falls back to in fp32 with grouped queries (torch 2.6 to 2.13, sdp_utils.cpp: the memory-efficient kernel
    takes no enable_gqa, flash no fp32), unless they are repeated.
    """
    length = config.sequence_length
    if not writes_scores(config, shape, width):
        masked = masked_layers(config, shape) / shape.layers
        repeated = 1 if width.repeats_keys else masked
        return masked * width.attention * length**2 + repeated * _repeated(length, shape, width)
    scores = float(shape.heads * length * length)
    kept = scores * _kept_of_a_score(config, shape, width)
    if config.attention != "eager":
        # In fp32: scaled copies of query and key, and value repeated for each head, in place of what they came from.
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        came_from = 2 * q + 3 * kv if shape.fused_attention and shape.rotary else q + 2 * kv
        return kept + length * (4 * 3 * q - width.attention * came_from)
    # Gemma 2 caps its scores by a tanh, which keeps its result.
    capped = width.attention if shape.model_type == "gemma2" else 0
    return kept + scores * capped + _repeated(length, shape, width)


def _kept_of_a_score(config: TrialConfig, shape: ModelShape, width: Widths) -> int:
    """Bytes: softmax's result, its cast where the kernel computes in less, of dropout what was drawn and is left."""
    if config.attention != "eager":
        return 4 + (4 + _drawn(4, width) if shape.attention_dropout else 0)
    softmax = _softmax_width(config, shape, width)
    kept = softmax + (width.attention if width.attention < softmax else 0)
    return kept + (_drawn(width.attention, width) + width.attention if shape.attention_dropout else 0)


def _softmax_width(config: TrialConfig, shape: ModelShape, width: Widths) -> int:
    is_own = config.attention == "eager" and shape.model_type in _OWN_SOFTMAX and width.stream < 4
    return width.attention if is_own else 4


def _softmax_backward(config: TrialConfig, shape: ModelShape, width: Widths) -> tuple[int, ...]:
    """Bytes of a score that are alive within softmax's backward pass: its result, the gradient of that, on a GPU the
    product of both (torch 2.13, ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out`), and what is given back."""
    each = _softmax_width(config, shape, width)
    given_back = width.attention if _is_cast_within(config, width) else each
    return (each, each, *([each] if width.on_gpu else []), given_back)


def _score_at_work(config: TrialConfig, shape: ModelShape, width: Widths) -> int:
    """Bytes of a score beside what is kept of it, at the worst place of attention's backward pass: softmax's own, or
    before it, where dropout gives back what it is given."""
    alive = sum(_softmax_backward(config, shape, width))
    return max(alive - _kept_of_a_score(config, shape, width), 2 * width.attention)


def score_blocks(config: TrialConfig, shape: ModelShape, width: Widths) -> tuple[list[float], list[float]]:
    """Bytes of the tensors of scores that are alive together while a GPU's kernel computes them, and in softmax's
    backward pass, of a kernel that writes them."""
    assert isinstance(config.micro_batch_size, int)
    scores = float(config.micro_batch_size * shape.heads * config.sequence_length**2)
    backward = [scores * each for each in _softmax_backward(config, shape, width)]
    softmax = _softmax_width(config, shape, width)
    # Scores and what they are scaled and masked to in turn, then that and softmax's result.
    forward = [scores * width.attention] * 2
    if width.attention < softmax:
        forward += [scores * softmax] * (1 if _is_cast_within(config, width) else 2)
    return forward, backward


def _is_cast_within(config: TrialConfig, width: Widths) -> bool:
    """A GPU's softmax takes fp16 scores as they are and returns fp32; of bf16 ones it gets an fp32 copy, and autocast's
    are fp32 from an fp32 mask on (torch 2.13, ATen/native/SoftMax.cpp, `softmax`)."""
    return width.on_gpu and config.precision is Precision.FP16 and width.stream == 2 and config.attention == "eager"


def _repeated(length: int, shape: ModelShape, width: Widths) -> float:
    """What key and value take more where each query head gets its own copy (transformers 5.23, `repeat_kv`)."""
    if shape.model_type in _BROADCAST_KEYS:
        return 0.0
    return float(2 * width.attention * length * (shape.heads - shape.kv_heads) * shape.head_dim)


def masked_layers(config: TrialConfig, shape: ModelShape) -> int:
    """Layers whose `sdpa` is given a mask, where rows are packed or the sequence reaches out of a sliding window.

    The kernel then takes no grouped queries, and keeps the mask in its own type, layer by layer (transformers 5.23,
    integrations/sdpa_attention.py, `use_gqa_in_sdpa`; torch 2.13, attention.cpp, `convert_boolean_attn_mask`).
    """
    if config.attention != "sdpa":
        return 0
    if config.packing:
        return shape.layers
    return shape.sliding_layers if config.sequence_length >= (shape.sliding_window or math.inf) else 0


def mask_bytes(config: TrialConfig, shape: ModelShape, width: Widths) -> int:
    """The mask of a sequence that all layers share: as numbers to add for eager attention, else true or false."""
    if config.attention == "eager":
        return width.stream * config.sequence_length**2
    return config.sequence_length**2 if masked_layers(config, shape) else 0


def writes_scores(config: TrialConfig, shape: ModelShape, width: Widths) -> bool:
    """Whether the attention kernel has a matrix of scores."""
    if config.attention == "eager":
        return True
    if config.attention != "sdpa" or config.packing:
        # Packed rows have a mask, with which key and value are repeated for each query head.
        return False
    if shape.model_type == "falcon" and shape.kv_heads < shape.heads:
        # Falcon hands its single key over unrepeated, which only the plain kernel broadcasts (torch 2.13,
        # sdp_utils_cpp.h, check_batch_size_and_num_heads_dense).
        return shape.kv_heads == 1
    if not width.on_gpu:
        # A CPU's flash kernel takes fp32 and grouped queries, and no dropout (counted with torch 2.13).
        return shape.attention_dropout
    return width.attention == 4 and shape.kv_heads < shape.heads and not width.repeats_keys


def backward_bytes(config: TrialConfig, shape: ModelShape, width: Widths, tokens: int) -> float:
    """Alive at the worst place of a layer's backward pass, beside what it kept: the feed-forward part or attention."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = _feed_forward_width(shape)
    # The gradient of what the activation (or the gate's product) returned, and those of what it was given, which an
    # activation written in Python adds up; a quantised weight is whole when the first is gone.
    gradients = width.product * wide * (3 if shape.gated or _is_in_python(shape, width) else 2)
    weight = max(m.rows * m.columns for m in shape.matrices) * width.dequantised
    feed_forward = max(gradients * tokens, (gradients - width.product * wide) * tokens + weight)
    if config.precision is Precision.INT8:
        # The product in int32 and in fp16, while a layer is recomputed.
        feed_forward = max(feed_forward, 6 * wide * tokens)
    attention = float(width.attention * (2 * q + 2 * kv))
    if writes_scores(config, shape, width):
        # The gradients of result and value; what the feed-forward part kept is gone by then.
        each = _score_at_work(config, shape, width)
        attention = width.attention * 2.0 * q + shape.heads * config.sequence_length * each
        attention -= width.product * wide * (3 if shape.gated else 1)
    norm = 4 * 2 * shape.hidden if shape.rms_norm else 0
    _, dora = dora_work_bytes(config, shape, width, tokens)
    return width.stream * shape.hidden * tokens + max(feed_forward, tokens * max(attention, norm), dora)


def dora_work_bytes(config: TrialConfig, shape: ModelShape, width: Widths, tokens: int) -> tuple[float, float]:
    """Alive beside what a layer keeps where DoRA's forward pass takes most, and where its backward pass does.

    Forward, until a matrix is done: what autograd does not keep of the input, of that in the adapter's type and of that
    dropped out of; an identity as wide as the input, held for a gradient that is not asked for, and the adapter's
    product with it; the weight, where it is not the parameter itself; and then the adapter's weight scaled and added to
    it, of which the norm is taken, or three outputs. Backward: the gradients of the output, of the adapter's result
    before and after it is scaled, and the magnitude's before it is summed over tokens (peft 0.21.2,
    tuners/lora/dora.py, `forward`, `get_lora_weight`, `get_weight_norm`).
    """
    if not config.dora or config.rank == "full":
        return 0.0, 0.0
    each, product, is_dropped = width.adapter, width.adapter_input, config.lora_dropout > 0
    is_cast = product < each
    given = width.product * (is_cast or is_dropped) + each * ((width.product < each) + (is_cast and is_dropped))
    weights = 1 + (width.dequantised > 0 or width.rest != each)
    wide = width.product * _feed_forward_width(shape) * tokens
    forward = backward = 0.0
    for matrix in targeted(shape, config.target_modules):
        identity, weight, out = matrix.columns**2, matrix.rows * matrix.columns, matrix.rows * tokens
        reads_stream = matrix.columns == shape.hidden
        # The feed-forward part keeps nothing yet, or no more. What gate and up returned is gone when they are at work.
        absent = wide * (3 if shape.gated else 1) if matrix.is_attention else 0.0
        gone = wide if shape.gated and reads_stream and not matrix.is_attention else absent
        held = product * identity + given * matrix.columns * tokens + is_dropped * width.product * out
        multiplied = each * identity * is_cast + product * weight
        normed = each * weight * (weights + 2)
        scaled = each * (weight * weights + 3 * out)
        forward = max(forward, held + max(multiplied, normed, scaled) - absent)
        backward = max(backward, out * (4 * each + (product + width.product) * is_cast) - gone)
    return forward, backward
