"""What autograd keeps of a decoder layer, and what its backward pass takes beside that.

Counted with `torch.autograd.graph.saved_tensors_hooks` on transformers 5.23 models with PEFT 0.21 adapters: what a
frozen linear layer was given is not kept, unless an adapter hangs on it; a frozen norm keeps its input in fp32 alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.model_shape import Matrix, ModelShape, targeted


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
    on_gpu: bool = True


def layer_bytes_per_token(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """Bytes a token that autograd keeps for one decoder layer, without attention scores."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = _feed_forward_width(shape)
    kept = _norms(config, shape, width)
    # Query, key and value as the kernel got them, its result, and an fp32 log-sum-exp a head.
    kept += width.attention * (2 * q + 2 * kv) + 4 * shape.heads
    if shape.fused_attention:
        # The value is a view of all that the fused matrix returned; without rotation so are query and key.
        kept += width.attention * ((q + kv) if shape.rotary else 0)
    if shape.qk_norm:
        kept += 4 * (q + kv)
    # What the activation was given; where it is gated, also what it returned and what that is multiplied with.
    kept += width.product * wide * (3 if shape.gated else 1)
    if shape.decomposed_activation:
        kept += width.product * wide * 3
    if shape.experts:
        # A copy of the token for each expert that it goes to, and each expert's answer before it is weighted.
        kept += 2 * width.stream * hidden * shape.experts_per_token
    return kept + _adapter_inputs(config, shape, width)


def _feed_forward_width(shape: ModelShape) -> int:
    if not shape.experts:
        return shape.intermediate
    return shape.intermediate * shape.experts_per_token + shape.shared_intermediate


def _norms(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    each = (4 if shape.rms_norm else width.stream) * shape.hidden
    if shape.model_type == "cohere":
        # Its norm is of its own and in fp32: what is normalised, and how far it is from its mean.
        return 8.0 * shape.hidden
    if config.trains_all_weights and shape.rms_norm:
        each += width.stream * shape.hidden
    return float(each * (1 if shape.parallel_residual else shape.norms_per_layer))


def _adapter_inputs(config: TrialConfig, shape: ModelShape, width: Widths) -> float:
    """What adapters, or weights that are trained, keep of their input; those that read the same share it."""
    matrices = shape.matrices if config.trains_all_weights else targeted(shape, config.target_modules)
    if not matrices:
        return 0.0
    tokens = [(matrix, _uses(matrix, shape)) for matrix in matrices]
    if config.trains_all_weights:
        return width.product * sum(n for n in _shared_inputs(tokens, shape))
    assert config.rank != "full"
    middle = config.rank * width.adapter * sum(uses for _, uses in tokens)
    if config.lora_dropout:
        return middle + (width.adapter + 1) * sum(m.columns * uses for m, uses in tokens)
    if width.adapter == width.stream and width.product == width.stream:
        return middle + width.stream * sum(_shared_inputs(tokens, shape))
    # PEFT casts the input to the adapter's type in each layer, and autocast likewise: nothing is shared.
    cast = min(width.adapter, width.product) if width.product < width.stream else width.adapter
    return middle + cast * sum(m.columns * uses for m, uses in tokens)


def _uses(matrix: Matrix, shape: ModelShape) -> float:
    """How often a token passes a matrix of this name in an average layer."""
    if matrix.is_expert and matrix.name != "gate":
        return matrix.count / (shape.layers * shape.experts) * shape.experts_per_token
    return matrix.count / shape.layers


def _shared_inputs(tokens: Iterable[tuple[Matrix, float]], shape: ModelShape) -> list[float]:
    """Elements a token: attention's input, the feed-forward part's, and down's. The kernel keeps its own result."""
    found: dict[tuple[bool, str], float] = {}
    for matrix, uses in tokens:
        if matrix.is_attention and matrix.columns == shape.heads * shape.head_dim and matrix.rows == shape.hidden:
            is_output = matrix.name in ("o_proj", "dense", "c_proj", "out_proj")
            if is_output:
                continue
        role = "in" if matrix.columns == shape.hidden else "down"
        key = (matrix.is_attention, role)
        found[key] = max(found.get(key, 0.0), matrix.columns * uses)
    return list(found.values())


def score_bytes(config: TrialConfig, shape: ModelShape, width: Widths, keeps: bool) -> float:
    """Attention scores of a layer and sequence: kept for the backward pass, or alive within it besides.

    Only kernels that write them out have any: eager (softmax in fp32 and its cast), and torch's plain kernel, which
    `sdpa` falls back to in fp32 with grouped queries (torch 2.6 to 2.13, sdp_utils.cpp: the memory-efficient kernel
    takes no enable_gqa, flash no fp32).
    """
    if not writes_scores(config, shape, width):
        return 0.0
    length = config.sequence_length
    scores = float(shape.heads * length * length)
    if config.attention == "eager":
        kept = scores * (4 + (width.attention if width.attention < 4 else 0))
    else:
        # Scaled copies of query and key, value repeated for each head.
        kept = scores * 4 + length * width.attention * 2 * (shape.heads - shape.kv_heads) * shape.head_dim
    return kept if keeps else 2 * scores * width.attention


def writes_scores(config: TrialConfig, shape: ModelShape, width: Widths) -> bool:
    """Whether the attention kernel has a matrix of scores."""
    if config.attention == "eager":
        return True
    # On a CPU the flash kernel takes fp32 and grouped queries (counted with torch 2.13).
    return width.on_gpu and config.attention == "sdpa" and width.attention == 4 and shape.kv_heads < shape.heads


def backward_bytes_per_token(shape: ModelShape, width: Widths) -> float:
    """Gradients alive at the worst place of a layer's backward pass: within the feed-forward part or the attention."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed_forward = width.product * _feed_forward_width(shape) * (2 if shape.gated else 1)
    attention = width.attention * (2 * q + 2 * kv)
    norm = 4 * 2 * shape.hidden if shape.rms_norm else 0
    return width.stream * shape.hidden + max(feed_forward, attention, norm)
